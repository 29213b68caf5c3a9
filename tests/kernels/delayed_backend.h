// A backend around another one that takes its time, as a device does: steps run on a thread of its
// own, in order, each beginning and ending late by times drawn from a seed. It asks to have the
// next step while one is under way, and refuses one that begins anew what the other still writes.
// Over a backend that fills unused page slots with NaN, whatever is used too early shows.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/forwarding_backend.h"
#include "kernels/step/step_queue.h"
#include "tests/kernels/step_overlap.h"

namespace rollpack::kernels::testing {

class DelayedBackend final : public ForwardingBackend {
 public:
  // Waits up to `longest` before and after each step; every eighth time ten times as long.
  DelayedBackend(std::unique_ptr<Backend> inner, uint32_t seed, std::chrono::microseconds longest)
      : ForwardingBackend(std::move(inner)),
        info_(this->inner().info()),
        random_(seed),
        longest_(longest),
        queue_([this](const StepPlan& plan, StepProgram&) { return run(plan); }) {
    info_.max_steps_under_way = 2;
  }
  ~DelayedBackend() override {
    sync();
    inner().set_program(nullptr);  // while this is whole: a program may free its buffers here
  }

  const BackendInfo& info() const override { return info_; }

  void sync() override {
    queue_.drain();
    inner().sync();
  }
  void free(Buffer buffer) override {
    queue_.drain();
    inner().free(buffer);
  }
  void commit_weights() override {
    queue_.drain();
    inner().commit_weights();
  }
  void set_program(std::shared_ptr<StepProgram> program) override {
    queue_.drain();
    inner().set_program(std::move(program));
  }

  StepHandle submit(StepPlan plan) override {
    const int32_t page_tokens = info_.kv.page_tokens;
    for (const StepOverlap& under_way : under_way_) under_way.check(plan, page_tokens);
    StepOverlap overlap(plan, page_tokens);
    const StepHandle handle = queue_.submit(std::move(plan), no_program_);
    under_way_.push_back(std::move(overlap));
    return handle;
  }
  bool poll(StepHandle handle) override { return queue_.poll(handle); }
  StepResult wait(StepHandle handle, Deadline deadline) override {
    StepResult result = queue_.wait(handle, deadline);
    under_way_.pop_front();  // its caller waits for the oldest first
    return result;
  }

 private:
  struct NoProgram final : StepProgram {  // the inner backend has the real one
    void run(Backend&, int64_t, int64_t) override {}
  };

  StepResult run(const StepPlan& plan) {
    pause();
    StepResult result = inner().wait(inner().submit(plan),
                                     std::chrono::steady_clock::now() + std::chrono::minutes(1));
    pause();
    return result;
  }
  void pause() {
    const auto longest = static_cast<uint32_t>(longest_.count()) * (random_() % 8 == 0 ? 10u : 1u);
    if (const uint32_t time = random_() % (longest + 1); time > 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(time));
    }
  }

  BackendInfo info_;
  std::mt19937 random_;  // of the queue's thread
  const std::chrono::microseconds longest_;
  const std::shared_ptr<StepProgram> no_program_ = std::make_shared<NoProgram>();
  std::deque<StepOverlap> under_way_;
  StepQueue queue_;  // last: its thread uses all of the above
};

}  // namespace rollpack::kernels::testing
