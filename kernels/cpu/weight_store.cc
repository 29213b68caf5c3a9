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

// Calls task(index, thread) for each index, on the pool's threads if there is a pool.
template <class Task>
void for_each(ThreadPool* pool, int64_t num_tasks, const Task& task) {
  if (pool != nullptr) return pool->parallel_for(num_tasks, task);
  for (int64_t index = 0; index < num_tasks; ++index) task(index, 0);
}

bool is_float(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16;
}

int64_t total_rows(const WeightSpec& spec) {
  int64_t rows = 0;
  for (const int64_t part : spec.part_rows) rows += part;
  return rows;
}

[[noreturn]] void fail_state(std::string field, std::string value, std::string message) {
  throw Error({.code = ErrorCode::kFailedPrecondition,
               .field = std::move(field),
               .value = std::move(value),
               .message = std::move(message)});
}

[[noreturn]] void fail_argument(std::string field, std::string value, std::string allowed) {
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = std::move(field),
               .value = std::move(value),
               .allowed = std::move(allowed)});
}

}  // namespace

WeightId WeightStore::declare(const WeightSpec& spec) {
  if (committed_ || staged_) {
    fail_state("weight", spec.name, "all weights are declared before the first is staged");
  }
  const bool is_vector = spec.kind == WeightKind::kVector;
  bool is_valid = !spec.part_rows.empty() && spec.cols > 0 && (!is_vector || spec.cols == 1);
  for (const int64_t rows : spec.part_rows) is_valid = is_valid && rows > 0;
  is_valid = is_valid && (spec.shards.empty() || spec.shards.size() == spec.part_rows.size());
  for (size_t part = 0; is_valid && part < spec.shards.size(); ++part) {
    const ShardRange& shard = spec.shards[part];
    is_valid = shard.begin >= 0 && shard.begin <= shard.end && shard.end <= spec.part_rows[part];
  }
  if (spec.kind == WeightKind::kGated) {
    is_valid = is_valid && spec.part_rows.size() == 2 && spec.part_rows[0] == spec.part_rows[1];
  }
  if (!is_valid) {
    fail_argument(spec.name,
                  fmt::format("{} parts, {} rows, {} columns", spec.part_rows.size(),
                              total_rows(spec), spec.cols),
                  "parts of positive size; two equal ones where gated; one column in a vector; a "
                  "shard within each part or none");
  }
  Declared weight{.spec = spec, .offset = next_offset_};
  weight.local_rows.resize(spec.part_rows.size());
  for (size_t part = 0; part < spec.shards.size(); ++part) {
    weight.local_rows[part] = spec.shards[part].size();
  }
  const auto num_parts = static_cast<int32_t>(spec.part_rows.size());
  weight.bytes = is_vector ? first_row(weight, num_parts) * 4 : view(weight, nullptr).bytes();
  next_offset_ += (weight.bytes + kAlignment - 1) / kAlignment * kAlignment;
  weights_.push_back(std::move(weight));
  return static_cast<WeightId>(weights_.size()) - 1;
}

WeightStore::Set WeightStore::make_set(bool is_loaded) const {
  Set set;
  for (const Declared& weight : weights_) {
    set.is_loaded.emplace_back(weight.spec.part_rows.size(), is_loaded);
  }
  return set;
}

void WeightStore::begin_staging() {
  if (staged_) fail_state("weights", "staged", "commit or discard the staged set first");
  if (weights_.empty()) fail_state("weights", "none", "declare the weights before staging them");
  Set set = make_set(false);
  set.arena = is_shared_ ? Arena::make_shareable(next_offset_, "weights")
                         : Arena::make_private(next_offset_, "weights");
  set.is_populated.resize(
      static_cast<size_t>((set.arena.bytes() + kWindowBytes - 1) / kWindowBytes));
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

void WeightStore::load_matrix(Set& set, const Declared& weight, const PackTarget& target,
                              const WeightSource& source, ShardRange shard, ThreadPool* pool) {
  const PackedMatrix matrix = view(weight, set.arena.data());
  const int64_t per_panel = matrix.columns_per_panel();
  const int64_t slice_rows = std::max<int64_t>(1, kWindowBytes / matrix.panel_bytes()) * per_panel;
  for (int64_t begin = shard.begin; begin < shard.end; begin += slice_rows) {
    const int64_t end = std::min(begin + slice_rows, shard.end);
    PackTarget slice = target;
    slice.first_column += begin - shard.begin;
    const int64_t first_panel = slice.first_column / per_panel;
    const int64_t last_panel = (slice.first_column + end - begin - 1) / per_panel;
    populate(set, weight.offset + first_panel * matrix.panel_bytes(),
             weight.offset + (last_panel + 1) * matrix.panel_bytes(), pool);
    pack_rows(kernels_, source, begin, end, matrix, slice, pool);
  }
}

WeightStore::Set& WeightStore::staged() {
  if (!staged_) fail_state("weights", "not staged", "call begin_staging() first");
  return *staged_;
}

void WeightStore::check_load(const Declared& weight, int32_t part, const WeightSource& source,
                             ShardRange shard) const {
  const WeightSpec& spec = weight.spec;
  if (part < 0 || part >= static_cast<int32_t>(spec.part_rows.size())) {
    fail_argument(spec.name + " part", std::to_string(part),
                  fmt::format("0 to {}", spec.part_rows.size() - 1));
  }
  const int64_t rows = spec.part_rows[static_cast<size_t>(part)];
  const bool is_vector = spec.kind == WeightKind::kVector;
  const bool fits =
      is_vector ? source.num_elements() == rows : source.rows == rows && source.cols == spec.cols;
  if (!fits) {
    fail_argument(
        fmt::format("{} part {}", spec.name, part),
        fmt::format("[{}, {}]", source.rows, source.cols),
        is_vector ? fmt::format("{} elements", rows) : fmt::format("[{}, {}]", rows, spec.cols));
  }
  if (!is_float(source.dtype)) {
    fail_argument(fmt::format("{} part {} dtype", spec.name, part),
                  std::string(dtype_name(source.dtype)), "float32, bfloat16 or float16");
  }
  const bool is_declared = !spec.shards.empty();
  if (is_declared && shard != spec.shards[static_cast<size_t>(part)]) {
    const ShardRange& wanted = spec.shards[static_cast<size_t>(part)];
    fail_argument(fmt::format("{} part {} shard", spec.name, part),
                  fmt::format("[{}, {})", shard.begin, shard.end),
                  fmt::format("[{}, {}), as declared", wanted.begin, wanted.end));
  }
  if (!is_declared && (shard.begin < 0 || shard.begin >= shard.end || shard.end > rows)) {
    fail_argument(fmt::format("{} part {} shard", spec.name, part),
                  fmt::format("[{}, {})", shard.begin, shard.end),
                  fmt::format("a range of rows in [0, {})", rows));
  }
}

void WeightStore::fix_local_rows(Declared& weight, int32_t part, ShardRange shard) {
  const auto index = static_cast<size_t>(part);
  const int64_t rows = shard.end - shard.begin;
  std::optional<int64_t>& local = weight.local_rows[index];
  if (local && *local != rows) {
    fail_argument(fmt::format("{} part {} shard", weight.spec.name, part),
                  fmt::format("{} rows", rows), fmt::format("{} rows, as loaded before", *local));
  }
  // Parts lie one after the other, so a shard moves what follows it: parts after it must come
  // later.
  const bool moves_others = !local && rows != weight.spec.part_rows[index];
  for (size_t later = index + 1; moves_others && later < weight.local_rows.size(); ++later) {
    if (weight.local_rows[later] && weight.spec.kind != WeightKind::kGated) {
      fail_state(fmt::format("{} part {}", weight.spec.name, part), "loaded after a later part",
                 "load the parts of a sharded weight in order");
    }
  }
  // Steps read this from another thread once a set is committed; it has its value by then.
  if (!local) local = rows;
}

int64_t WeightStore::first_row(const Declared& weight, int32_t part) const {
  int64_t row = 0;
  for (size_t i = 0; i < static_cast<size_t>(part); ++i) {
    row += weight.local_rows[i].value_or(weight.spec.part_rows[i]);
  }
  return row;
}

PackedMatrix WeightStore::view(const Declared& weight, std::byte* base) const {
  const bool is_gated = weight.spec.kind == WeightKind::kGated;
  const auto parts = static_cast<int32_t>(weight.spec.part_rows.size());
  return {.panels = base == nullptr ? nullptr : base + weight.offset,
          .dtype = compute_,
          .columns = first_row(weight, is_gated ? 1 : parts),
          .K_in = weight.spec.cols,
          .is_gated = is_gated};
}

void WeightStore::load(WeightId id, int32_t part, const WeightSource& source, ShardRange shard,
                       ThreadPool* pool) {
  Set& set = staged();
  declared(id, "load_weight");  // checks the id
  Declared& weight = weights_[static_cast<size_t>(id)];
  if (set.arena.is_read_only()) {
    fail_state(weight.spec.name, "sealed", "an exported or adopted set takes no more tensors");
  }
  check_load(weight, part, source, shard);
  fix_local_rows(weight, part, shard);
  std::vector<bool>::reference is_loaded =
      set.is_loaded[static_cast<size_t>(id)][static_cast<size_t>(part)];
  is_loaded = false;  // until all of it has been read
  set.hash.reset();
  std::byte* at = set.arena.data() + weight.offset;
  const int64_t first = first_row(weight, part);
  if (weight.spec.kind == WeightKind::kVector) {
    unpack_vector(source, shard.begin, shard.end, compute_, reinterpret_cast<float*>(at) + first);
  } else {
    const bool is_gated = weight.spec.kind == WeightKind::kGated;
    const PackTarget target{.panels = at,
                            .first_column = is_gated ? 0 : first,
                            .lane_offset = is_gated && part == 1 ? 32 : 0};
    load_matrix(set, weight, target, source, shard, pool);
  }
  is_loaded = true;
}

void WeightStore::copy_committed_to_staged(ThreadPool* pool) {
  Set& set = staged();
  if (!committed_) fail_state("weights", "none committed", "there is nothing to copy");
  if (set.arena.is_read_only()) fail_state("weights", "sealed", "an adopted set is complete");
  const auto copy_page = [&](int64_t page, int) {
    const int64_t begin = std::max(page * kPageBytes, kHeaderBytes);
    const int64_t end = std::min((page + 1) * kPageBytes, next_offset_);
    std::memcpy(set.arena.data() + begin, committed_->arena.data() + begin,
                static_cast<size_t>(end - begin));
  };
  for_each(pool, (next_offset_ + kPageBytes - 1) / kPageBytes, copy_page);
  set.is_loaded = make_set(true).is_loaded;
  set.hash.reset();
}

void WeightStore::require_complete() const {
  if (!staged_) fail_state("weights", "not staged", "call begin_staging() first");
  for (size_t id = 0; id < weights_.size(); ++id) {
    for (size_t part = 0; part < staged_->is_loaded[id].size(); ++part) {
      if (staged_->is_loaded[id][part]) continue;
      fail_state(fmt::format("{} part {}", weights_[id].spec.name, part), "not loaded",
                 "every part is loaded before a commit or an export");
    }
  }
}

void WeightStore::commit() {
  require_complete();
  committed_ = std::move(staged_);
  staged_.reset();
}

void WeightStore::discard() {
  staged_.reset();
}

uint64_t WeightStore::committed_hash(ThreadPool* pool) const {
  if (!committed_) fail_state("weights", "none committed", "commit weights before hashing them");
  return committed_->hash ? *committed_->hash : hash_of(*committed_, pool);
}

uint64_t WeightStore::staged_hash() {
  require_complete();
  if (!staged_->hash) staged_->hash = hash_of(*staged_, nullptr);
  return *staged_->hash;
}

uint64_t WeightStore::hash_of(const Set& set, ThreadPool* pool) const {
  const int64_t bytes = next_offset_ - kHeaderBytes;
  const int64_t num_blocks = (bytes + kHashBlock - 1) / kHashBlock;
  std::vector<uint64_t> hashes(static_cast<size_t>(num_blocks));
  const auto hash_one = [&](int64_t block, int) {
    const int64_t begin = block * kHashBlock;
    const int64_t end = std::min(begin + kHashBlock, bytes);
    hashes[static_cast<size_t>(block)] =
        hash64({set.arena.data() + kHeaderBytes + begin, static_cast<size_t>(end - begin)});
  };
  for_each(pool, num_blocks, hash_one);
  return hash64(std::as_bytes(std::span(hashes)), layout_hash());
}

uint64_t WeightStore::layout_hash() const {
  std::string text = fmt::format("cpu-v1 {} {}", dtype_name(compute_), next_offset_);
  for (const Declared& weight : weights_) {
    text += fmt::format("|{} {} {}", weight.spec.name, static_cast<int>(weight.spec.kind),
                        weight.spec.cols);
    for (size_t part = 0; part < weight.spec.part_rows.size(); ++part) {
      // Rows held, not rows of the whole part: shards lie elsewhere than whole parts.
      text += fmt::format(" {}", weight.local_rows[part].value_or(weight.spec.part_rows[part]));
    }
  }
  return fnv1a64(text);
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
  if (staged_) fail_state("weights", "staged", "commit or discard the staged set first");
  Set set = make_set(true);
  set.arena = Arena::adopt(fd, next_offset_);
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
  for (Declared& weight : weights_) {
    for (size_t part = 0; part < weight.local_rows.size(); ++part) {
      if (!weight.local_rows[part]) weight.local_rows[part] = weight.spec.part_rows[part];
    }
  }
  staged_ = std::move(set);
}

const WeightStore::Declared& WeightStore::declared(WeightId id, const char* op) const {
  if (id < 0 || id >= static_cast<WeightId>(weights_.size())) {
    fail_argument(fmt::format("{} weight", op), std::to_string(id),
                  fmt::format("a declared weight, 0 to {}", weights_.size() - 1));
  }
  return weights_[static_cast<size_t>(id)];
}

bool WeightStore::has_committed() const {
  return committed_.has_value();
}

double WeightStore::huge_page_share() const {
  return committed_ ? committed_->arena.huge_page_share() : 0;
}

PackedMatrix WeightStore::matrix(WeightId id, const char* op) const {
  const Declared& weight = declared(id, op);
  if (!committed_) fail_state(weight.spec.name, "not committed", "commit weights before a step");
  if (weight.spec.kind == WeightKind::kVector) {
    fail_argument(fmt::format("{} weight", op), weight.spec.name, "a matrix");
  }
  return view(weight, committed_->arena.data());
}

const float* WeightStore::vector(WeightId id, int64_t expected, const char* op) const {
  const Declared& weight = declared(id, op);
  if (!committed_) fail_state(weight.spec.name, "not committed", "commit weights before a step");
  const auto parts = static_cast<int32_t>(weight.spec.part_rows.size());
  if (weight.spec.kind != WeightKind::kVector || first_row(weight, parts) != expected) {
    fail_argument(fmt::format("{} weight", op), weight.spec.name,
                  fmt::format("a vector of {} elements", expected));
  }
  return reinterpret_cast<const float*>(committed_->arena.data() + weight.offset);
}

}  // namespace rollpack::kernels::cpu
