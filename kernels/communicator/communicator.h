// What the ranks of one replica say to each other in the middle of a step. Every rank makes the
// same calls in the same order. A call that does not end in time, or whose peer is gone, throws,
// and so does every call after it, on all ranks: a replica goes on whole or not at all.
//
// Sums are of integers only: they do not depend on an order. A sum of floats does not compile, so
// no result can depend on the number of ranks.
#pragma once

#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "kernels/shards.h"

namespace rollpack::kernels {

enum class Reduction : uint8_t { kSum, kMax, kMin };
enum class Number : uint8_t { kU8, kI32, kI64, kU32, kU64, kF32, kF64 };

template <class T>
constexpr Number number_of() {
  if constexpr (std::is_same_v<T, uint8_t>) return Number::kU8;
  if constexpr (std::is_same_v<T, int32_t>) return Number::kI32;
  if constexpr (std::is_same_v<T, int64_t>) return Number::kI64;
  if constexpr (std::is_same_v<T, uint32_t>) return Number::kU32;
  if constexpr (std::is_same_v<T, uint64_t>) return Number::kU64;
  if constexpr (std::is_same_v<T, float>) return Number::kF32;
  if constexpr (std::is_same_v<T, double>) return Number::kF64;
}

constexpr int64_t number_bytes(Number number) {
  if (number == Number::kU8) return 1;
  return number == Number::kI64 || number == Number::kU64 || number == Number::kF64 ? 8 : 4;
}

template <class T, Reduction R>
concept Reducible = std::integral<T> ||(std::floating_point<T>&& R != Reduction::kSum);

// Columns of a matrix, in bytes: rank r gives columns [starts[r], starts[r + 1]) of each row. The
// parts need not be equal, and may be empty.
struct GatherColumnsArgs {
  const void* in = nullptr;  // this rank's columns; may lie where they belong in `out`
  int64_t in_stride = 0;     // bytes from row to row
  void* out = nullptr;       // all columns
  int64_t out_stride = 0;
  int64_t rows = 0;
  std::span<const int64_t> starts;  // [size + 1] bytes, from 0, not descending
};

struct AllReduceArgs {
  void* values = nullptr;  // [count]
  int64_t count = 0;
  Number number = Number::kI32;
  Reduction reduction = Reduction::kSum;
};

// Memory is the device's, where the ranks compute on one; calls are enqueued there, or wait for it.
// Errors of every call: unavailable naming the ranks that did not come before its deadline, or have
// ended; failed_precondition after an earlier error; internal where ranks make different calls.
class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual ReplicaRank at() const = 0;
  int32_t rank() const { return at().rank; }
  int32_t size() const { return at().size; }

  virtual void gather_columns(const GatherColumnsArgs& args) = 0;
  // all[r] = what rank r gives; equally many bytes each.
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all);
  // Every rank's values become root's.
  virtual void broadcast(std::span<std::byte> values, int32_t root) = 0;
  virtual void barrier() = 0;
  // Element by element over all ranks, in rank order.
  template <Reduction R, class T>
  requires Reducible<T, R>
  void all_reduce(std::span<T> values) {
    reduce({.values = values.data(),
            .count = static_cast<int64_t>(values.size()),
            .number = number_of<T>(),
            .reduction = R});
  }
  // The same where the type is known at run time only. Never a sum of floats.
  virtual void reduce(const AllReduceArgs& args) = 0;

  // How long a call may take.
  virtual std::chrono::milliseconds timeout() const = 0;
  // A rank that has failed or whose process has ended, or -1. Never waits, and throws nothing: for
  // who waits for the others elsewhere.
  virtual int32_t find_lost_rank() const = 0;
  // This rank has failed: calls of all ranks, under way and to come, throw. Any thread.
  virtual void abandon() = 0;
  // Time spent in calls so far, seconds: moving bytes and waiting for others. Any thread.
  virtual double seconds() const = 0;
};

}  // namespace rollpack::kernels
