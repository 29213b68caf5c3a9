// One step on the device: the plan's arrays in one block of memory, uploaded by one copy, the
// sequence slots, and the results on their way back by another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/lm_head.h"
#include "kernels/cuda/step_memory.h"

namespace rollpack::kernels::cuda {

class StepContext {
 public:
  StepContext(Device& device, const ModelShape& shape, const BackendOptions& options,
              const KvCache& cache);

  // Starts a step: checks the plan, uploads it, fills the slots and copies pages. The plan outlives
  // the step. Errors: invalid_argument naming the entry of the plan and what is allowed; nothing is
  // changed then.
  void begin(Stream stream, const StepPlan& plan);
  // Enqueues the copy of what the head says, waits for the stream and returns it.
  // Errors: those of the step's kernels.
  StepResult finish(Stream stream, Deadline deadline);
  void end() { plan_ = nullptr; }

  const StepPlan& plan() const;
  int32_t highest_position() const { return highest_position_; }

  const StepRows& rows() const { return rows_; }
  const HeadRows& head() const { return head_; }
  const Slots& slots() const { return slots_; }
  const AttentionWork& attention_work() const { return attention_work_; }
  const int32_t* head_queries() const { return head_queries_; }
  std::span<const HeadGroup> head_groups() const { return head_plan_.groups; }

 private:
  // What check_plan asks of a slot: known on the host from the results of the steps before.
  struct SlotMirror {
    bool is_set = false;
    bool has_pending = false;
  };

  // Appends an array to what is uploaded; its place there.
  template <class T>
  size_t add(const std::vector<T>& values);
  void upload(Stream stream);
  template <class T>
  const T* at(size_t place) const {
    return reinterpret_cast<const T*>(on_device_.as<>() + place);
  }
  void add_rows(Stream stream);
  std::vector<int32_t> distinct_head_rows() const;

  Device& device_;
  const ModelShape shape_;
  const BackendOptions options_;
  const KvCache cache_;
  const StepPlan* plan_ = nullptr;
  int32_t highest_position_ = kPadPosition;

  DeviceMemory slot_states_, stop_bits_;
  Slots slots_;
  std::vector<SlotMirror> slot_mirrors_;

  std::vector<std::byte> arrays_;  // of the step that begins
  HostMemory on_host_;             // the same, where copies reach it
  DeviceMemory on_device_;
  DeviceMemory results_on_device_;  // [HeadResult..][row_failed..]
  HostMemory results_on_host_;
  int64_t results_bytes_ = 0;

  StepRows rows_;
  HeadRows head_;
  AttentionWork attention_work_;
  HeadPlan head_plan_;
  const int32_t* head_queries_ = nullptr;  // head_plan_.queries in device memory
};

}  // namespace rollpack::kernels::cuda
