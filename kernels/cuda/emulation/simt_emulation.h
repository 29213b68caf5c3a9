// simt.h on the host: CUDA's names over emulation/block_runner.h. See README.md for what this shows
// and what it cannot.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "kernels/cuda/emulation/block_runner.h"
#include "kernels/cuda/emulation/emulated_stream.h"
#include "kernels/cuda/launch_shape.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace rollpack::kernels::cuda::emulation {

inline BlockRunner& runner() {
  return BlockRunner::of_this_thread();
}

// One lane's part of a shuffle.
template <class Value>
struct ShuffleRecord {
  Value value;
  Value result;
  int source;  // lane; its own where there is none
};

template <class Value>
void combine_shuffle(void* const* records) {
  for (uint32_t i = 0; i < kWarpLanes; ++i) {
    auto* record = static_cast<ShuffleRecord<Value>*>(records[i]);
    record->result = static_cast<ShuffleRecord<Value>*>(records[record->source])->value;
  }
}

template <class Value>
Value shuffle(unsigned mask, Value value, int source, const char* name) {
  static_assert(sizeof(Value) == 4 || sizeof(Value) == 8);
  if (mask != kAllLanes) runner().fail("a shuffle of less than a whole warp");
  ShuffleRecord<Value> record{value, value, source};
  runner().wait_for_warp({name, combine_shuffle<Value>}, &record);
  return record.result;
}

inline int own_lane() {
  return static_cast<int>(threadIdx.x % kWarpLanes);
}

struct BallotRecord {
  bool holds;
  unsigned result;
};
void combine_ballot(void* const* records);
void combine_sync(void* const* records);

struct MmaRecord {
  float* acc;         // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};
void combine_mma(void* const* records);

struct LdmatrixRecord {
  uint32_t* r;  // [4]
  const void* row;
};
void combine_ldmatrix(void* const* records);
void combine_ldmatrix_trans(void* const* records);

}  // namespace rollpack::kernels::cuda::emulation

inline void __syncthreads() {
  rollpack::kernels::cuda::emulation::runner().wait_for_block("__syncthreads");
}
inline void __syncwarp() {
  namespace emulation = rollpack::kernels::cuda::emulation;
  emulation::runner().wait_for_warp({"__syncwarp", emulation::combine_sync}, nullptr);
}
// Blocks run one after the other, each to its end.
inline void __threadfence() {}
template <class Value>
Value __shfl_sync(unsigned mask, Value value, int lane) {
  return rollpack::kernels::cuda::emulation::shuffle(mask, value, lane % 32, "__shfl_sync");
}
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lane_mask) {
  namespace emulation = rollpack::kernels::cuda::emulation;
  return emulation::shuffle(mask, value, emulation::own_lane() ^ lane_mask, "__shfl_xor_sync");
}
template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned delta) {
  namespace emulation = rollpack::kernels::cuda::emulation;
  const int lane = emulation::own_lane(), source = lane - static_cast<int>(delta);
  return emulation::shuffle(mask, value, source >= 0 ? source : lane, "__shfl_up_sync");
}
template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned delta) {
  namespace emulation = rollpack::kernels::cuda::emulation;
  const int lane = emulation::own_lane(), source = lane + static_cast<int>(delta);
  return emulation::shuffle(mask, value, source < 32 ? source : lane, "__shfl_down_sync");
}
inline unsigned __ballot_sync(unsigned mask, bool holds) {
  namespace emulation = rollpack::kernels::cuda::emulation;
  if (mask != rollpack::kernels::cuda::kAllLanes) {
    emulation::runner().fail("a ballot of less than a whole warp");
  }
  emulation::BallotRecord record{holds, 0};
  emulation::runner().wait_for_warp({"__ballot_sync", emulation::combine_ballot}, &record);
  return record.result;
}
inline int __popc(unsigned bits) {
  return std::popcount(bits);
}
inline int __clz(int bits) {
  return std::countl_zero(static_cast<unsigned>(bits));
}
inline int __ffs(int bits) {
  return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1;
}
// One OS thread runs all threads of a launch, so plain reads and writes are atomic.
inline int atomicAdd(int* target, int value) {
  const int before = *target;
  *target += value;
  return before;
}
inline unsigned atomicOr(unsigned* target, unsigned value) {
  const unsigned before = *target;
  *target |= value;
  return before;
}

namespace rollpack::kernels::cuda::inline emulated {

inline std::byte* dynamic_shared() {
  return emulation::runner().shared_memory();
}

inline void mma_bf16_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::MmaRecord record{acc, a, b};
  emulation::runner().wait_for_warp({"mma", emulation::combine_mma}, &record);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  emulation::runner().require_shared(shared, "ldmatrix");
  emulation::LdmatrixRecord record{r, shared};
  emulation::runner().wait_for_warp({"ldmatrix", emulation::combine_ldmatrix}, &record);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  emulation::runner().require_shared(shared, "ldmatrix");
  emulation::LdmatrixRecord record{r, shared};
  emulation::runner().wait_for_warp({"ldmatrix.trans", emulation::combine_ldmatrix_trans}, &record);
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
  emulation::runner().copy_async(shared, global, valid);
}
inline void cp_async_commit() {
  emulation::runner().commit_copies();
}
template <int kGroups>
void cp_async_wait() {
  emulation::runner().wait_for_copies(kGroups);
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, Stream stream, Args... args) {
  struct Call {
    void (*kernel)(Params...);
    LaunchShape shape;
    std::tuple<Params...> params;

    void run() {
      emulation::runner().run(
          shape,
          [](void* context) {
            const Call& call = *static_cast<const Call*>(context);
            std::apply(call.kernel, call.params);
          },
          this);
    }
  } call{kernel, shape, {static_cast<Params>(args)...}};
  emulation::submit(stream, shape.kernel, [call]() mutable { call.run(); });
}

}  // namespace rollpack::kernels::cuda::inline emulated
