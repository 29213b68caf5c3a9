#include "kernels/cpu/weight_store.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <span>
#include <utility>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"
#include "kernels/cpu/thread_pool.h"

namespace rollpack::kernels::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kHashBlock = 1 << 20;
// Memory is taken from the system window by window, in pages of 2 MiB. Threads that pack panels
// next to each other would fault the same page at once, and each clear one; those that share a
// window clear a page each, and what they cleared is still in L3 when panels are written.
constexpr int64_t kPageBytes = int64_t{2} << 20;
constexpr int64_t kWindowPages = 8;
constexpr int64_t kWindowBytes = kWindowPages * kPageBytes;

// First bytes of an arena.
struct ArenaHeader {
  char magic[8] = {'R', 'P', 'K', 'W', 'G', 'H', 'T', '1'};
  uint64_t layout_hash = 0;
  int64_t bytes = 0;
};

uint64_t block_hash(const Arena& arena, int64_t block, int64_t end) {
  const int64_t first = kHeaderBytes + block * kHashBlock;
  const int64_t last = std::min(first + kHashBlock, end);
  return hash64({arena.data() + first, static_cast<size_t>(last - first)});
}

// Calls task(index, thread) for each index, on the pool's threads if there is a pool.
template <class Task>
void for_each(ThreadPool* pool, int64_t num_tasks, const Task& task) {
  if (pool != nullptr) return pool->parallel_for(num_tasks, task);
  for (int64_t index = 0; index < num_tasks; ++index) task(index, 0);
}

}  // namespace

WeightId WeightStore::declare(const WeightSpec& spec) {
  if (committed_ || staged_) {
    fail_weight_state("weight", spec.name, "all weights are declared before the first is staged");
  }
  DeclaredWeight weight = DeclaredWeights::checked(spec);
  weight.offset = next_offset_;
  weight.bytes = bytes_of(weight);
  next_offset_ += (weight.bytes + kAlignment - 1) / kAlignment * kAlignment;
  return weights_.add(std::move(weight));
}

int64_t WeightStore::bytes_of(const DeclaredWeight& weight) const {
  if (weight.spec.kind != WeightKind::kVector) return view(weight, nullptr).bytes();
  return weight.first_row(weight.num_parts()) * 4;
}

void WeightStore::begin_staging() {
  if (staged_) fail_weight_state("weights", "staged", "commit or discard the staged set first");
  if (weights_.empty())
    fail_weight_state("weights", "none", "declare the weights before staging them");
  Set set{.is_loaded = weights_.flags(false)};
  set.arena = is_shared_ ? Arena::make_shareable(next_offset_, "weights")
                         : Arena::make_private(next_offset_, "weights");
  set.is_populated.resize(
      static_cast<size_t>((set.arena.bytes() + kWindowBytes - 1) / kWindowBytes));
  set.block_hashes.resize(num_hash_blocks());
  staged_ = std::move(set);
}

void WeightStore::populate(Set& set, int64_t begin, int64_t end, ThreadPool* pool) const {
  const auto populate_page = [&](int64_t page, int) {
    set.arena.populate(page * kPageBytes, (page + 1) * kPageBytes);
  };
  for (int64_t window = begin / kWindowBytes; window * kWindowBytes < end; ++window) {
    if (set.is_populated[static_cast<size_t>(window)]) continue;
    set.is_populated[static_cast<size_t>(window)] = true;
    const int64_t first = window * kWindowPages;
    for_each(pool, kWindowPages,
             [&](int64_t page, int thread) { populate_page(first + page, thread); });
  }
}

void WeightStore::load_matrix(Set& set, const DeclaredWeight& weight, const PackTarget& target,
                              const WeightSource& source, ShardRange shard, bool is_last_part,
                              ThreadPool* pool) {
  const PackedMatrix matrix = view(weight, set.arena.data());
  const int64_t per_panel = matrix.columns_per_panel();
  const int64_t slice_rows = std::max<int64_t>(1, kWindowBytes / matrix.panel_bytes()) * per_panel;
  for (int64_t begin = shard.begin; begin < shard.end; begin += slice_rows) {
    const int64_t end = std::min(begin + slice_rows, shard.end);
    PackTarget slice = target;
    slice.first_column += begin - shard.begin;
    const int64_t first_panel = slice.first_column / per_panel;
    const int64_t last_panel = (slice.first_column + end - begin - 1) / per_panel;
    const int64_t from = weight.offset + first_panel * matrix.panel_bytes();
    const int64_t to = weight.offset + (last_panel + 1) * matrix.panel_bytes();
    populate(set, from, to, pool);
    forget_hashes(set, from, to);
    pack_rows(kernels_, source, begin, end, matrix, slice, pool);
    if (is_last_part) take_hashes(set, from, to, pool);
  }
}

void WeightStore::forget_hashes(Set& set, int64_t begin, int64_t end) {
  const int64_t last = (end - 1 - kHeaderBytes) / kHashBlock;
  for (int64_t block = (begin - kHeaderBytes) / kHashBlock; block <= last; ++block) {
    set.block_hashes[static_cast<size_t>(block)].reset();
  }
}

void WeightStore::take_hashes(Set& set, int64_t begin, int64_t end, ThreadPool* pool) {
  const int64_t first = (begin - kHeaderBytes + kHashBlock - 1) / kHashBlock;
  const int64_t num_whole = std::max<int64_t>(0, (end - kHeaderBytes) / kHashBlock - first);
  for_each(pool, num_whole, [&](int64_t index, int) {
    const int64_t block = first + index;
    set.block_hashes[static_cast<size_t>(block)] = block_hash(set.arena, block, end);
  });
}

size_t WeightStore::num_hash_blocks() const {
  return static_cast<size_t>((next_offset_ - kHeaderBytes + kHashBlock - 1) / kHashBlock);
}

WeightStore::Set& WeightStore::staged() {
  if (!staged_) fail_weight_state("weights", "not staged", "call begin_staging() first");
  return *staged_;
}

PackedMatrix WeightStore::view(const DeclaredWeight& weight, std::byte* base) const {
  const bool is_gated = weight.spec.kind == WeightKind::kGated;
  return {.panels = base == nullptr ? nullptr : base + weight.offset,
          .dtype = compute_,
          .columns = weight.first_row(is_gated ? 1 : weight.num_parts()),
          .K_in = weight.spec.cols,
          .is_gated = is_gated};
}

void WeightStore::load(WeightId id, int32_t part, const WeightSource& source, ShardRange shard,
                       ThreadPool* pool) {
  Set& set = staged();
  DeclaredWeight& weight = weights_.at(id, "load_weight");
  if (set.arena.is_read_only()) {
    fail_weight_state(weight.spec.name, "sealed",
                      "an exported or adopted set takes no more tensors");
  }
  DeclaredWeights::begin_load(weight, part, source, shard);
  std::vector<bool>::reference is_loaded =
      set.is_loaded[static_cast<size_t>(id)][static_cast<size_t>(part)];
  is_loaded = false;  // until all of it has been read
  set.hash.reset();
  std::byte* at = set.arena.data() + weight.offset;
  const int64_t first = weight.first_row(part);
  if (weight.spec.kind == WeightKind::kVector) {
    forget_hashes(set, weight.offset, weight.offset + weight.bytes);
    unpack_vector(source, shard.begin, shard.end, compute_, reinterpret_cast<float*>(at) + first);
  } else {
    const bool is_gated = weight.spec.kind == WeightKind::kGated;
    const PackTarget target{.panels = at,
                            .first_column = is_gated ? 0 : first,
                            .lane_offset = is_gated && part == 1 ? 32 : 0};
    // A gated panel is hashed when both halves of its columns are there.
    const bool is_last_part =
        !is_gated || set.is_loaded[static_cast<size_t>(id)][static_cast<size_t>(1 - part)];
    load_matrix(set, weight, target, source, shard, is_last_part, pool);
  }
  is_loaded = true;
}

void WeightStore::copy_committed_to_staged(ThreadPool* pool) {
  Set& set = staged();
  if (!committed_) fail_weight_state("weights", "none committed", "there is nothing to copy");
  if (set.arena.is_read_only())
    fail_weight_state("weights", "sealed", "an adopted set is complete");
  const auto copy_page = [&](int64_t page, int) {
    const int64_t begin = std::max(page * kPageBytes, kHeaderBytes);
    const int64_t end = std::min((page + 1) * kPageBytes, next_offset_);
    std::memcpy(set.arena.data() + begin, committed_->arena.data() + begin,
                static_cast<size_t>(end - begin));
  };
  for_each(pool, (next_offset_ + kPageBytes - 1) / kPageBytes, copy_page);
  set.is_loaded = weights_.flags(true);
  set.block_hashes = committed_->block_hashes;
  set.hash.reset();
}

void WeightStore::require_complete() const {
  if (!staged_) fail_weight_state("weights", "not staged", "call begin_staging() first");
  weights_.require_loaded(staged_->is_loaded);
}

void WeightStore::commit() {
  require_complete();
  committed_ = std::move(staged_);
  staged_.reset();
}

void WeightStore::discard() {
  staged_.reset();
}

void WeightStore::drop() {
  if (staged_) fail_weight_state("weights", "staged", "commit or discard the staged set first");
  committed_.reset();
}

int64_t WeightStore::held_bytes() const {
  int64_t bytes = 0;
  for (const std::optional<Set>* set : {&committed_, &staged_}) {
    if (*set && !(*set)->is_adopted) bytes += (*set)->arena.bytes();
  }
  return bytes;
}

uint64_t WeightStore::committed_hash(ThreadPool* pool) const {
  if (!committed_)
    fail_weight_state("weights", "none committed", "commit weights before hashing them");
  return committed_->hash ? *committed_->hash : hash_of(*committed_, pool);
}

uint64_t WeightStore::staged_hash() {
  require_complete();
  if (!staged_->hash) staged_->hash = hash_of(*staged_, nullptr);
  return *staged_->hash;
}

uint64_t WeightStore::hash_of(const Set& set, ThreadPool* pool) const {
  std::vector<uint64_t> hashes(num_hash_blocks());
  for_each(pool, static_cast<int64_t>(hashes.size()), [&](int64_t block, int) {
    const std::optional<uint64_t>& known = set.block_hashes[static_cast<size_t>(block)];
    hashes[static_cast<size_t>(block)] =
        known ? *known : block_hash(set.arena, block, next_offset_);
  });
  return hash64(std::as_bytes(std::span(hashes)), layout_hash());
}

uint64_t WeightStore::layout_hash() const {
  return weights_.layout_hash(fmt::format("cpu-v1 {} {}", dtype_name(compute_), next_offset_));
}

int WeightStore::export_staged() {
  require_complete();
  if (!staged_->arena.is_read_only()) {
    const ArenaHeader header{.layout_hash = layout_hash(), .bytes = next_offset_};
    std::memcpy(staged_->arena.data(), &header, sizeof header);
  }
  staged_->arena.seal();
  return staged_->arena.fd();
}

void WeightStore::adopt_staged(int fd) {
  if (staged_) fail_weight_state("weights", "staged", "commit or discard the staged set first");
  Set set{.is_adopted = true, .is_loaded = weights_.flags(true)};
  set.arena = Arena::adopt(fd, next_offset_);
  set.block_hashes.resize(num_hash_blocks());
  ArenaHeader header;
  std::memcpy(&header, set.arena.data(), sizeof header);
  if (std::memcmp(header.magic, ArenaHeader{}.magic, sizeof header.magic) != 0 ||
      header.layout_hash != layout_hash() || header.bytes != next_offset_) {
    throw Error({.code = ErrorCode::kDataLoss,
                 .field = "weights descriptor",
                 .value = fmt::format("layout {:016x}, {} bytes", header.layout_hash, header.bytes),
                 .allowed = fmt::format("layout {:016x}, {} bytes", layout_hash(), next_offset_),
                 .message = "the packed weights are of another model or layout"});
  }
  weights_.hold_rest();
  staged_ = std::move(set);
}

bool WeightStore::has_committed() const {
  return committed_.has_value();
}

double WeightStore::huge_page_share() const {
  return committed_ ? committed_->arena.huge_page_share() : 0;
}

PackedMatrix WeightStore::matrix(WeightId id, const char* op) const {
  const DeclaredWeight& weight = weights_.at(id, op);
  if (!committed_)
    fail_weight_state(weight.spec.name, "not committed", "commit weights before a step");
  if (weight.spec.kind == WeightKind::kVector) {
    fail_weight_argument(fmt::format("{} weight", op), weight.spec.name, "a matrix");
  }
  return view(weight, committed_->arena.data());
}

const float* WeightStore::vector(WeightId id, int64_t expected, const char* op) const {
  const DeclaredWeight& weight = weights_.at(id, op);
  if (!committed_)
    fail_weight_state(weight.spec.name, "not committed", "commit weights before a step");
  if (weight.spec.kind != WeightKind::kVector || weight.first_row(weight.num_parts()) != expected) {
    fail_weight_argument(fmt::format("{} weight", op), weight.spec.name,
                         fmt::format("a vector of {} elements", expected));
  }
  return reinterpret_cast<const float*>(committed_->arena.data() + weight.offset);
}

}  // namespace rollpack::kernels::cpu
