#include "kernels/cuda/weight_store.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <span>
#include <utility>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"
#include "kernels/cuda/rounded_rows.h"

namespace rollpack::kernels::cuda {
namespace {

constexpr int64_t kWeightAlignment = 256;
constexpr int64_t kBounceBytes = int64_t{8} << 20;
constexpr int64_t kHashBlock = 1 << 20;
// A copy of all weights over PCIe takes seconds; one that takes this long never ends.
constexpr std::chrono::minutes kCopyLimit{2};

std::chrono::steady_clock::time_point copy_deadline() {
  return std::chrono::steady_clock::now() + kCopyLimit;
}

}  // namespace

WeightId WeightStore::declare(const WeightSpec& spec) {
  if (has_committed_ || staged_) {
    fail_weight_state("weight", spec.name, "declare all weights before the first is staged");
  }
  DeclaredWeight weight = DeclaredWeights::checked(spec);
  weight.offset = next_offset_;
  weight.bytes = bytes_of(weight);
  next_offset_ += (weight.bytes + kWeightAlignment - 1) / kWeightAlignment * kWeightAlignment;
  return weights_.add(std::move(weight));
}

int64_t WeightStore::bytes_of(const DeclaredWeight& weight) const {
  if (weight.spec.kind == WeightKind::kVector) {
    return weight.first_row(weight.num_parts()) * 4;
  }
  const DeviceMatrix matrix = view(weight, nullptr);
  return packed_rows(matrix) * matrix.row_stride * dtype_bytes(compute_);
}

void WeightStore::begin_staging() {
  if (staged_) fail_weight_state("weights", "staged", "commit or discard the staged set first");
  if (weights_.empty())
    fail_weight_state("weights", "none", "declare the weights before staging them");
  if (committed_.bytes() == 0) committed_ = DeviceRange(device_, next_offset_, "weights");
  if (is_asleep()) fail_weight_state("weights", "asleep", "wake them up before staging others");
  if (bounce_.bytes() == 0) bounce_ = HostMemory(device_, kBounceBytes, "weights on their way");
  Staged set{.is_loaded = weights_.flags(false)};
  if (stages_on_device_) {
    set.on_device = DeviceMemory(device_, next_offset_, "staged weights");
  } else {
    set.on_host = HostMemory(device_, next_offset_, "staged weights");
    std::memset(set.on_host.as<>(), 0, static_cast<size_t>(next_offset_));
  }
  staged_ = std::move(set);
}

WeightStore::Staged& WeightStore::staged() {
  if (!staged_) fail_weight_state("weights", "not staged", "call begin_staging() first");
  return *staged_;
}

DeviceMatrix WeightStore::view(const DeclaredWeight& weight, const void* base) const {
  const bool is_gated = weight.spec.kind == WeightKind::kGated;
  const int64_t per_piece = 16 / dtype_bytes(compute_);
  const auto* const bytes = static_cast<const std::byte*>(base);
  return {.data = bytes == nullptr ? nullptr : bytes + weight.offset,
          .N = weight.first_row(is_gated ? 1 : weight.num_parts()),
          .K_in = weight.spec.cols,
          .row_stride = (weight.spec.cols + per_piece - 1) / per_piece * per_piece,
          .is_gated = is_gated};
}

void WeightStore::load(WeightId id, int32_t part, const WeightSource& source, ShardRange shard) {
  Staged& set = staged();
  DeclaredWeight& weight = weights_.at(id, "load_weight");
  DeclaredWeights::begin_load(weight, part, source, shard);
  std::vector<bool>::reference is_loaded =
      set.is_loaded[static_cast<size_t>(id)][static_cast<size_t>(part)];
  is_loaded = false;  // until all of it has been read
  set.hash.reset();
  const int64_t first = weight.first_row(part);
  if (weight.spec.kind == WeightKind::kVector)
    load_vector(weight, first, source, shard);
  else
    load_matrix(weight, part, first, source, shard);
  is_loaded = true;
}

void WeightStore::load_vector(const DeclaredWeight& weight, int64_t first,
                              const WeightSource& source, ShardRange shard) {
  std::vector<std::byte> scratch;
  const std::byte* all = source.read_rows(0, source.rows, scratch);
  std::vector<float> values(static_cast<size_t>(shard.end - shard.begin));
  read_f32(all + shard.begin * dtype_bytes(source.dtype), source.dtype, values);
  if (compute_ == DType::kBF16) {
    for (float& value : values) value = bf16_to_f32(f32_to_bf16(value));
  }
  const auto bytes = static_cast<int64_t>(values.size()) * 4;
  write(weight.offset + first * 4, bytes, values.data(), bytes, 1);
  finish_copies();
}

// Rows go through the bounce buffer, as many at a time as it holds; of gate and up in groups of 8,
// which are far apart in the set by as much again.
void WeightStore::load_matrix(const DeclaredWeight& weight, int32_t part, int64_t first,
                              const WeightSource& source, ShardRange shard) {
  const DeviceMatrix matrix = view(weight, nullptr);
  const int64_t row_bytes = matrix.row_stride * dtype_bytes(compute_);
  const int64_t at_once = std::max<int64_t>(8, kBounceBytes / row_bytes / 8 * 8);
  if (at_once * row_bytes > bounce_.bytes()) {
    bounce_ = HostMemory(device_, at_once * row_bytes, "weights on their way");
  }
  std::vector<std::byte> scratch;
  std::byte* const packed = bounce_.as<>();
  for (int64_t begin = shard.begin; begin < shard.end; begin += at_once) {
    const int64_t count = std::min(at_once, shard.end - begin);
    const std::byte* rows = source.read_rows(begin, begin + count, scratch);
    round_rows(rows, source, count, matrix.row_stride, compute_, packed);
    if (!matrix.is_gated) {
      const int64_t bytes = count * row_bytes;
      write(weight.offset + (first + begin - shard.begin) * row_bytes, bytes, packed, bytes, 1);
    } else {
      // begin - shard.begin is a multiple of 8.
      const int64_t at = weight.offset + gated_row(begin - shard.begin, part) * row_bytes;
      const int64_t groups = count / 8;
      write(at, 16 * row_bytes, packed, 8 * row_bytes, groups);
      write(at + groups * 16 * row_bytes, 16 * row_bytes, packed + groups * 8 * row_bytes,
            count % 8 * row_bytes, count % 8 > 0 ? 1 : 0);
    }
    finish_copies();  // before the bounce buffer is filled again
  }
}

void WeightStore::write(int64_t offset, int64_t pitch, const void* source, int64_t width,
                        int64_t num_rows) {
  if (num_rows == 0) return;
  if (stages_on_device_) {
    device_.copy_rows_to_device(stream_, staged_->on_device.as<>() + offset, pitch, source, width,
                                num_rows);
    return;
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    std::memcpy(staged_->on_host.as<>() + offset + row * pitch,
                static_cast<const std::byte*>(source) + row * width, static_cast<size_t>(width));
  }
}

void WeightStore::finish_copies() {
  device_.wait(stream_, copy_deadline());
}

void WeightStore::copy_committed_to_staged() {
  Staged& set = staged();
  if (!has_committed_) fail_weight_state("weights", "none committed", "there is nothing to copy");
  if (stages_on_device_) {
    device_.copy_on_device(stream_, set.on_device.as<>(), committed_.as<>(), next_offset_);
  } else {
    device_.copy_to_host(stream_, set.on_host.as<>(), committed_.as<>(), next_offset_);
  }
  finish_copies();
  set.is_loaded = weights_.flags(true);
  set.hash.reset();
}

void WeightStore::require_complete() const {
  if (!staged_) fail_weight_state("weights", "not staged", "call begin_staging() first");
  weights_.require_loaded(staged_->is_loaded);
}

void WeightStore::commit() {
  require_complete();
  if (stages_on_device_) {
    device_.copy_on_device(stream_, committed_.as<>(), staged_->on_device.as<>(), next_offset_);
  } else {
    device_.copy_to_device(stream_, committed_.as<>(), staged_->on_host.as<>(), next_offset_);
  }
  finish_copies();
  committed_hash_ = staged_->hash;
  has_committed_ = true;
  staged_.reset();
}

void WeightStore::discard() {
  staged_.reset();
}

void WeightStore::sleep(bool keeps_copy) {
  if (staged_) fail_weight_state("weights", "staged", "commit or discard the staged set first");
  if (keeps_copy && has_committed_ && !is_asleep()) {
    HostMemory copy(device_, next_offset_, "weights that sleep");
    device_.copy_to_host(stream_, copy.as<>(), committed_.as<>(), next_offset_);
    finish_copies();
    sleeping_ = std::move(copy);
  } else if (!keeps_copy) {
    sleeping_ = {};
    has_committed_ = false;
    committed_hash_.reset();
  }
  committed_.give_back();
}

void WeightStore::wake_up() {
  if (!is_asleep()) return;
  if (!committed_.has_memory()) committed_.take();
  if (sleeping_.bytes() == 0) return;
  device_.copy_to_device(stream_, committed_.as<>(), sleeping_.as<>(), next_offset_);
  finish_copies();
  sleeping_ = {};
}

uint64_t WeightStore::committed_hash() {
  if (!has_committed_)
    fail_weight_state("weights", "none committed", "commit weights before hashing them");
  if (!committed_hash_ && is_asleep())
    fail_weight_state("weights", "asleep", "wake them up before hashing them");
  if (!committed_hash_) committed_hash_ = hash_of(committed_.as<>(), true);
  return *committed_hash_;
}

uint64_t WeightStore::staged_hash() {
  require_complete();
  Staged& set = *staged_;
  if (!set.hash) {
    set.hash =
        hash_of(stages_on_device_ ? set.on_device.as<>() : set.on_host.as<>(), stages_on_device_);
  }
  return *set.hash;
}

uint64_t WeightStore::hash_of(const std::byte* set, bool is_on_device) {
  device_.bind_thread();
  std::vector<uint64_t> hashes;
  for (int64_t begin = 0; begin < next_offset_; begin += kBounceBytes) {
    const int64_t bytes = std::min(kBounceBytes, next_offset_ - begin);
    const std::byte* block = set + begin;
    if (is_on_device) {
      device_.copy_to_host(stream_, bounce_.as<>(), block, bytes);
      finish_copies();
      block = bounce_.as<>();
    }
    for (int64_t at = 0; at < bytes; at += kHashBlock) {
      hashes.push_back(hash64({block + at, static_cast<size_t>(std::min(kHashBlock, bytes - at))}));
    }
  }
  return hash64(std::as_bytes(std::span(hashes)), layout_hash());
}

uint64_t WeightStore::layout_hash() const {
  return weights_.layout_hash(fmt::format("cuda-v1 {} {}", dtype_name(compute_), next_offset_));
}

DeviceMatrix WeightStore::matrix(WeightId id, const char* op) const {
  const DeclaredWeight& weight = weights_.at(id, op);
  if (!has_committed_)
    fail_weight_state(weight.spec.name, "not committed", "commit weights before a step");
  if (weight.spec.kind == WeightKind::kVector) {
    fail_weight_argument(fmt::format("{} weight", op), weight.spec.name, "a matrix");
  }
  return view(weight, committed_.as<>());
}

SliceRule WeightStore::slices(WeightId id) const {
  const WeightSpec& spec = weights_.at(id, "linear").spec;
  return slice_rule(std::reduce(spec.part_rows.begin(), spec.part_rows.end()), spec.cols);
}

const float* WeightStore::vector(WeightId id, int64_t expected, const char* op) const {
  const DeclaredWeight& weight = weights_.at(id, op);
  if (!has_committed_)
    fail_weight_state(weight.spec.name, "not committed", "commit weights before a step");
  if (weight.spec.kind != WeightKind::kVector || weight.first_row(weight.num_parts()) != expected) {
    fail_weight_argument(fmt::format("{} weight", op), weight.spec.name,
                         fmt::format("a vector of {} elements", expected));
  }
  return reinterpret_cast<const float*>(committed_.as<>() + weight.offset);
}

}  // namespace rollpack::kernels::cuda
