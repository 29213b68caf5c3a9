// The weights: what was declared, the committed set that kernels read, at addresses that never
// change, and the staged set that the next commit copies over it. A set is one block of memory with
// every weight in the order of declaration.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/step_memory.h"
#include "kernels/step/declared_weights.h"

namespace rollpack::kernels::cuda {

class WeightStore {
 public:
  // stages_on_device: whether the staged set lies on the device or in host memory.
  WeightStore(Device& device, DType compute, bool stages_on_device)
      : device_(device), compute_(compute), stages_on_device_(stages_on_device), stream_(device) {}

  // The calls of backend.h, with its errors.
  WeightId declare(const WeightSpec& spec);
  void begin_staging();
  void load(WeightId id, int32_t part, const WeightSource& source, ShardRange shard);
  void copy_committed_to_staged();
  // Errors: failed_precondition naming the first part that was not loaded.
  void require_complete() const;
  // No step may run meanwhile.
  void commit();
  void discard();
  // Gives the committed set's memory back, with or without a copy in host memory. Not while steps
  // run. Errors: failed_precondition where a set is staged; resource_exhausted where the host has
  // no room for the copy: nothing has changed then.
  void sleep(bool keeps_copy);
  // Takes it again. Errors: resource_exhausted: it sleeps on.
  void wake_up();
  // Also where the copy back has failed: it is tried again.
  bool is_asleep() const {
    return sleeping_.bytes() > 0 || (committed_.bytes() > 0 && !committed_.has_memory());
  }
  int64_t held_bytes() const {
    return committed_.held_bytes() + (staged_ ? staged_->on_device.bytes() : 0);
  }
  uint64_t committed_hash();
  uint64_t staged_hash();

  int64_t set_bytes() const { return next_offset_; }
  bool has_committed() const { return has_committed_; }

  // Views of the committed set. Errors: failed_precondition before the first commit,
  // invalid_argument for an id or a kind that does not fit the op.
  DeviceMatrix matrix(WeightId id, const char* op) const;
  SliceRule slices(WeightId id) const;
  const float* vector(WeightId id, int64_t expected, const char* op) const;

 private:
  struct Staged {
    DeviceMemory on_device;
    HostMemory on_host;
    DeclaredWeights::Flags is_loaded;
    std::optional<uint64_t> hash;  // once asked for, and nothing loaded since
  };

  DeviceMatrix view(const DeclaredWeight& weight, const void* base) const;
  int64_t bytes_of(const DeclaredWeight& weight) const;
  Staged& staged();
  void load_vector(const DeclaredWeight& weight, int64_t first, const WeightSource& source,
                   ShardRange shard);
  void load_matrix(const DeclaredWeight& weight, int32_t part, int64_t first,
                   const WeightSource& source, ShardRange shard);
  // Copies rows of `width` bytes, close together in host memory, to the staged set.
  void write(int64_t offset, int64_t pitch, const void* source, int64_t width, int64_t num_rows);
  void finish_copies();
  uint64_t hash_of(const std::byte* set, bool is_on_device);
  uint64_t layout_hash() const;

  Device& device_;
  const DType compute_;
  const bool stages_on_device_;
  OwnStream stream_;  // of copies; never the one that steps run on
  DeclaredWeights weights_;
  int64_t next_offset_ = 0;
  DeviceRange committed_;
  HostMemory sleeping_;  // the committed set, while it sleeps
  bool has_committed_ = false;
  std::optional<uint64_t> committed_hash_;
  std::optional<Staged> staged_;
  HostMemory bounce_;  // what was packed and is on its way
};

}  // namespace rollpack::kernels::cuda
