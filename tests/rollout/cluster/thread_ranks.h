// Ranks as threads: a dispatcher and n workers with replicas of their own in one process. Messages
// to and from every worker but the first go through the codec, as they would between processes.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "rollout/cluster/dispatcher.h"
#include "rollout/cluster/message_codec.h"
#include "rollout/cluster/worker.h"
#include "tests/rollout/tiny_model.h"
#include "trainer_bridge/contract/sample_sink.h"

namespace rollpack::rollout {

// Keeps what it gets, under (prompt_id, sample_index).
class KeepingSink : public bridge::SampleSink {
 public:
  using Name = std::pair<std::string, int32_t>;

  void commit(bridge::Sample sample) override {
    const std::lock_guard lock(mutex_);
    const Name name{sample.key.prompt_id.text, sample.key.sample_index};
    EXPECT_TRUE(samples_.emplace(name, std::move(sample)).second) << "a sample came twice";
    changed_.notify_all();
  }
  void fail(bridge::FailedSample sample) override {
    const std::lock_guard lock(mutex_);
    failed_.push_back(std::move(sample));
    changed_.notify_all();
  }
  // Samples and failures so far, once there are `count`.
  bool wait_for(size_t count, std::chrono::seconds timeout = std::chrono::seconds(30)) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, timeout,
                             [&] { return samples_.size() + failed_.size() >= count; });
  }
  std::map<Name, bridge::Sample> samples() {
    const std::lock_guard lock(mutex_);
    return samples_;
  }
  // Hands them over, so that the same names may come again.
  std::map<Name, bridge::Sample> take_samples() {
    const std::lock_guard lock(mutex_);
    return std::exchange(samples_, {});
  }
  std::vector<bridge::FailedSample> failed() {
    const std::lock_guard lock(mutex_);
    return failed_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<Name, bridge::Sample> samples_;
  std::vector<bridge::FailedSample> failed_;
};

class ThreadRanks {
 public:
  explicit ThreadRanks(int num_ranks, const Config& config = tiny_config(),
                       RecoveryOptions recovery = {})
      : ThreadRanks(
            num_ranks, [&config](int) { return tiny_replica(config); }, recovery) {}

  // Every rank's replica from `make_replica(rank)`, all of one configuration and one model.
  template <class MakeReplica>
  ThreadRanks(int num_ranks, MakeReplica make_replica, RecoveryOptions recovery = {}) {
    for (int rank = 0; rank < num_ranks; ++rank) replicas_.push_back(make_replica(rank));
    Replica& first = *replicas_[0];
    dispatcher_ = std::make_unique<Dispatcher>(first.config(), first.model(), first.limits(),
                                               first.backend().info().fingerprint,
                                               first.backend().weights_hash(),
                                               /*shares_weights=*/false, recovery);
    dispatcher_->set_sink(sink);
    for (int rank = 0; rank < num_ranks; ++rank) {
      workers_.push_back(std::make_shared<Worker>(*replicas_[rank], [this, rank](Event event) {
        if (rank > 0) event = decode_event(encode(event));
        dispatcher_->handle(rank, std::move(event));
      }));
      if (rank == 0) {
        dispatcher_->add_worker(workers_[rank]);
      } else {
        dispatcher_->add_worker(std::make_shared<CodecLink>(workers_[rank]));
      }
    }
    for (const auto& worker : workers_) worker->start();
    try {
      dispatcher_->wait_ready(std::chrono::steady_clock::now() + std::chrono::seconds(30));
    } catch (...) {
      end();  // no destructor does, and the workers' threads go on
      throw;
    }
  }
  ~ThreadRanks() { end(); }

  Dispatcher& dispatcher() { return *dispatcher_; }
  // The numbers that all workers tell of, summed.
  std::map<std::string, double> stats() {
    std::promise<std::map<std::string, double>> told;
    dispatcher_->take_measurement([&](bridge::Outcome error, Measurement measured) {
      EXPECT_FALSE(error) << format_error(*error);
      told.set_value(std::move(measured.stats));
    });
    return told.get_future().get();
  }
  KeepingSink sink;

 private:
  void end() {
    dispatcher_->stop(false, std::chrono::steady_clock::now() + std::chrono::seconds(30));
    for (const auto& worker : workers_) worker->stop();  // also one that counts as lost
  }

  class CodecLink : public WorkerLink {
   public:
    explicit CodecLink(std::shared_ptr<Worker> worker) : worker_(std::move(worker)) {}
    void send(Command command) override { worker_->send(decode_command(encode(command))); }
    bool is_own_process() const override { return true; }
    // A thread cannot be killed: it goes on as a zombie whose results come late.

   private:
    std::shared_ptr<Worker> worker_;
  };

  std::vector<std::unique_ptr<Replica>> replicas_;
  std::unique_ptr<Dispatcher> dispatcher_;
  std::vector<std::shared_ptr<Worker>> workers_;
};

// A clock that only the test moves.
struct Clock {
  std::atomic<int64_t> ms = 1000000;
  RecoveryOptions recovery() {
    return {.is_on = true, .lease = std::chrono::seconds(10), .now = [this] {
              return std::chrono::steady_clock::time_point(std::chrono::milliseconds(ms));
            }};
  }
};

inline double stat(const Dispatcher& dispatcher, const std::string& name) {
  for (const auto& [known, value] : dispatcher.stats()) {
    if (known == name) return value;
  }
  ADD_FAILURE() << "no " << name;
  return -1;
}

inline std::vector<bridge::PromptRequest> numbered_prompts(int count) {
  std::mt19937 random(9);
  std::vector<bridge::PromptRequest> prompts(count);
  for (int i = 0; i < count; ++i) {
    prompts[i].prompt_id = bridge::PromptId{.text = fmt::format("p{}", i)};
    prompts[i].input_ids.resize(1 + random() % 20);
    for (int32_t& id : prompts[i].input_ids) id = static_cast<int32_t>(random() % 71);
    prompts[i].origin = fmt::format("prompts[{}]", i);
  }
  return prompts;
}

// A callback's outcome, with a deadline.
struct Waiter {
  std::promise<bridge::Outcome> promise;
  bridge::OutcomeCallback callback() {
    return [this](bridge::Outcome outcome) { promise.set_value(std::move(outcome)); };
  }
  bridge::Outcome wait() {
    auto future = promise.get_future();
    if (future.wait_for(std::chrono::seconds(30)) != std::future_status::ready) {
      return ErrorInfo{.code = ErrorCode::kDeadlineExceeded, .message = "no callback"};
    }
    return future.get();
  }
};

inline std::map<KeepingSink::Name, bridge::Sample> run(int num_ranks, int num_prompts) {
  ThreadRanks ranks(num_ranks);
  ranks.dispatcher().submit(numbered_prompts(num_prompts));
  EXPECT_TRUE(ranks.sink.wait_for(num_prompts * 3));
  return ranks.sink.samples();
}

inline void expect_equal(const bridge::Sample& a, const bridge::Sample& b) {
  EXPECT_EQ(a.response_ids, b.response_ids);
  EXPECT_EQ(a.logprobs, b.logprobs);
  EXPECT_EQ(a.scaled_logprobs, b.scaled_logprobs);
  EXPECT_EQ(a.finish_reason, b.finish_reason);
}

}  // namespace rollpack::rollout
