// Steps on the device: the plan's arrays in one block of memory, uploaded by one copy, the sequence
// slots, and the results on their way back by another. A step may begin while the one before still
// runs: what the head has drawn, and whether a slot has finished, is read on the device.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
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
  // the step. `graph_rows` above 0: the plan is_pure_decoding(), and rows that kernels skip follow
  // its own, up to so many. Fewer than kMaxStepsUnderWay may be handed over. Errors:
  // invalid_argument naming the entry of the plan and what is allowed; nothing is changed then.
  void begin(Stream stream, const StepPlan& plan, int32_t graph_rows);
  // Between the two, ops see a step of `graph_rows` skipped rows in one of the kMaxStepsUnderWay
  // places: all that they give to kernels is what they give in a step that was begun with as many
  // there and is_in_place().
  void begin_capture(size_t place, int32_t graph_rows);
  void end_capture() { plan_ = nullptr; }
  // The program has enqueued its kernels: enqueues the copy of what the head says.
  void hand_over(Stream stream, uint64_t number);
  // The program has failed: what it has enqueued is waited for and forgotten.
  void abandon(Stream stream, Deadline deadline) noexcept;

  // Of the oldest step handed over.
  bool has_step() const { return num_under_way_ > 0; }
  uint64_t number() const { return oldest().number; }
  // Its result once the device is done with it, and it is forgotten. Errors: those of its kernels;
  // it stays.
  std::optional<StepResult> take_result();
  void forget_step();

  // Of the step that began last, while its program runs: the rows that ops compute.
  int64_t num_rows() const;
  int32_t highest_position() const { return highest_position_; }
  // Which place it has, and whether its arrays lie where they never move: they do if they fit
  // there.
  size_t place() const { return next_; }
  bool is_in_place() const { return is_in_place_; }

  const StepRows& rows() const { return rows_; }
  const HeadRows& head() const { return head_; }
  const Slots& slots() const { return slots_; }
  const AttentionWork& attention_work() const { return attention_work_; }
  const int32_t* head_queries() const { return head_queries_; }
  std::span<const HeadGroup> head_groups() const { return head_plan_.groups; }

 private:
  // What check_plan asks of a slot, and what its draws may need: known on the host from the plans.
  struct SlotMirror {
    bool is_set = false;
    bool has_pending = false;
    bool is_cut = false;
    int32_t min_position = 0;   // below it stop tokens are out of the support; 0: it has none
    int32_t next_position = 0;  // at least: of its drafts one may have counted

    bool may_keep_logits() const { return is_cut || next_position < min_position; }
  };
  // The same bytes on both sides of a copy.
  struct Block {
    Block() = default;
    Block(Device& device, int64_t bytes, const char* what)
        : on_host(device, bytes, what), on_device(device, bytes, what) {}

    HostMemory on_host;  // where copies reach it
    DeviceMemory on_device;
  };
  // What a step has for itself, until its result is taken.
  struct Place {
    Place(Device& device, int64_t array_bytes);

    Block arrays, large_arrays;  // its own; where they do not fit into the first, the second grows
    Block results, large_results;  // [HeadResult..][row_failed..], likewise
    const Block* used_results = nullptr;
    int64_t failed_at = 0;  // bytes before row_failed
    int64_t results_bytes = 0;
    OwnEvent has_ended;
    const StepPlan* plan = nullptr;
    uint64_t number = 0;
  };

  // Appends an array to what is uploaded; its place there.
  template <class T>
  size_t add(const std::vector<T>& values);
  // Room for an array there, to be written later.
  template <class T>
  size_t reserve(size_t count);
  template <class T>
  void write(size_t place, const std::vector<T>& values);
  template <class T>
  const T* at(size_t place) const {
    return reinterpret_cast<const T*>(used_arrays_->on_device.as<>() + place);
  }
  // The block that has `bytes`, of the two.
  Block& block_for(Block& fixed, Block& large, int64_t bytes, const char* what);
  // Lists the step's arrays in arrays_ and says where ops find them; what begin_step is to do.
  BeginStepInputs lay_out(const StepPlan& plan, Place& place, int32_t graph_rows);
  // Notes the slots that the plan fills, then what is drawn, on the way telling the head's groups
  // which logits they may need.
  void note_slots(const StepPlan& plan);
  const Place& current() const { return places_[next_]; }
  Place& current() { return places_[next_]; }
  const Place& oldest() const {
    return places_[(next_ + places_.size() - num_under_way_) % places_.size()];
  }

  Device& device_;
  const ModelShape shape_;
  const BackendOptions options_;
  const KvCache cache_;
  const StepPlan* plan_ = nullptr;  // while its program runs
  int32_t highest_position_ = kPadPosition;
  bool is_in_place_ = false;

  DeviceMemory slot_states_, stop_bits_;
  Slots slots_;
  std::vector<SlotMirror> slot_mirrors_;

  std::vector<std::byte> arrays_;  // of the step that begins
  const Block* used_arrays_ = nullptr;
  std::array<Place, kMaxStepsUnderWay> places_;
  size_t next_ = 0;           // place of the step that begins
  size_t num_under_way_ = 0;  // handed over, in the places before it

  StepRows rows_;
  HeadRows head_;
  AttentionWork attention_work_;
  HeadPlan head_plan_;
  const int32_t* head_queries_ = nullptr;  // head_plan_.queries in device memory
};

}  // namespace rollpack::kernels::cuda
