#include "kernels/reference/weights.h"

#include <fmt/format.h>

#include <utility>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"
#include "kernels/reference/stored.h"

namespace rollpack::kernels::reference {
namespace {

[[noreturn]] void refuse(const WeightSpec& spec, const std::string& what, const std::string& value,
                         const std::string& allowed) {
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = fmt::format("weight {} {}", spec.name, what),
               .value = value,
               .allowed = allowed});
}

void check_spec(const WeightSpec& spec) {
  if (spec.part_rows.empty()) refuse(spec, "parts", "0", "at least one part");
  for (const int64_t rows : spec.part_rows) {
    if (rows <= 0) refuse(spec, "part rows", fmt::to_string(rows), "a positive number");
  }
  if (spec.cols <= 0) refuse(spec, "cols", fmt::to_string(spec.cols), "a positive number");
  if (spec.kind == WeightKind::kVector && spec.cols != 1) {
    refuse(spec, "cols", fmt::to_string(spec.cols), "1 for a vector");
  }
  const size_t parts = spec.part_rows.size();
  if (spec.kind == WeightKind::kGated && (parts != 2 || spec.part_rows[0] != spec.part_rows[1])) {
    refuse(spec, "parts", fmt::to_string(parts), "two parts of equal rows, gate and up");
  }
  const bool is_vocabulary =
      spec.kind == WeightKind::kEmbedding || spec.kind == WeightKind::kLmHead;
  if (is_vocabulary && parts != 1) refuse(spec, "parts", fmt::to_string(parts), "one part");
}

double source_number(const ConstTensor& source, int64_t i) {
  switch (source.dtype) {
    case DType::kF32:
      return source.as<float>()[i];
    case DType::kBF16:
      return bf16_to_f32(source.as<uint16_t>()[i]);
    case DType::kF16:
      return f16_to_f32(source.as<uint16_t>()[i]);
    default:
      fail_invariant("a weight source has no float dtype");
  }
}

// A source number is an f32 number at most, so the cast is exact.
double rounded(double number, DType compute_dtype) {
  if (compute_dtype != DType::kBF16) return number;
  return bf16_to_f32(f32_to_bf16(static_cast<float>(number)));
}

void check_source(const WeightSpec& spec, int32_t part, const WeightSource& source,
                  ShardRange shard) {
  const int64_t rows = spec.part_rows[static_cast<size_t>(part)];
  const bool is_float =
      source.dtype == DType::kF32 || source.dtype == DType::kBF16 || source.dtype == DType::kF16;
  if (!is_float) {
    refuse(spec, "dtype", std::string(dtype_name(source.dtype)), "float32, bfloat16 or float16");
  }
  const bool fits = spec.kind == WeightKind::kVector
                        ? source.num_elements() == rows  // [N], [1, N] and [N, 1] are one vector
                        : source.rows == rows && source.cols == spec.cols;
  if (!fits) {
    refuse(spec, fmt::format("part {} shape", part),
           fmt::format("[{}, {}]", source.rows, source.cols),
           fmt::format("[{}, {}]", rows, spec.cols));
  }
  if (shard.begin < 0 || shard.begin >= shard.end || shard.end > rows) {
    refuse(spec, fmt::format("part {} shard", part),
           fmt::format("[{}, {})", shard.begin, shard.end),
           fmt::format("a range within [0, {})", rows));
  }
}

}  // namespace

int64_t Weight::num_rows() const {
  int64_t rows = 0;
  for (const WeightPart& part : parts) rows += part.num_rows();
  return rows;
}

double Weight::vector_element(int64_t i) const {
  for (const WeightPart& part : parts) {
    if (i < part.num_rows()) return reinterpret_cast<const float*>(part.numbers.data())[i];
    i -= part.num_rows();
  }
  fail_invariant(fmt::format("element out of range of weight {}", spec.name));
}

WeightId WeightStore::declare(const WeightSpec& spec) {
  check_spec(spec);
  if (staged_ || committed_) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "weight " + spec.name,
                 .message = "declare all weights before the first is staged"});
  }
  specs_.push_back(spec);
  return static_cast<WeightId>(specs_.size() - 1);
}

WeightStore::Set WeightStore::empty_set() const {
  Set set;
  for (const WeightSpec& spec : specs_) {
    const DType dtype = spec.kind == WeightKind::kVector ? DType::kF32 : compute_dtype_;
    set.push_back({spec, dtype, std::vector<WeightPart>(spec.part_rows.size())});
  }
  return set;
}

void WeightStore::require_staging(const char* call) const {
  if (staged_) return;
  throw Error({.code = ErrorCode::kFailedPrecondition,
               .field = call,
               .message = "no weights are being staged; call begin_staging first"});
}

void WeightStore::begin() {
  if (staged_) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "begin_staging",
                 .message = "weights are already being staged; commit or discard them first"});
  }
  staged_ = std::make_unique<Set>(empty_set());
}

void WeightStore::load(WeightId id, int32_t part, const WeightSource& source, ShardRange shard) {
  require_staging("load_weight");
  if (id < 0 || static_cast<size_t>(id) >= specs_.size()) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "weight id",
                 .value = fmt::to_string(id),
                 .allowed = fmt::format("an id from 0 to {}", specs_.size() - 1)});
  }
  Weight& weight = (*staged_)[static_cast<size_t>(id)];
  if (part < 0 || static_cast<size_t>(part) >= weight.parts.size()) {
    refuse(weight.spec, "part", fmt::to_string(part),
           fmt::format("a part from 0 to {}", weight.parts.size() - 1));
  }
  check_source(weight.spec, part, source, shard);
  const int64_t rows = weight.spec.part_rows[static_cast<size_t>(part)];
  const bool is_vocabulary =
      weight.spec.kind == WeightKind::kEmbedding || weight.spec.kind == WeightKind::kLmHead;
  if (is_vocabulary && shard.end - shard.begin != rows) {
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = fmt::format("weight {} shard", weight.spec.name),
                 .value = fmt::format("[{}, {})", shard.begin, shard.end),
                 .allowed = fmt::format("[0, {})", rows),
                 .message = "the reference backend keeps whole vocabularies"});
  }
  WeightPart& target = weight.parts[static_cast<size_t>(part)];
  const int64_t count = (shard.end - shard.begin) * weight.spec.cols;
  target.rows = shard;
  target.numbers.resize(static_cast<size_t>(count * dtype_bytes(weight.dtype)));
  std::vector<std::byte> scratch;
  const ConstTensor tensor{
      source.read_rows(0, source.rows, scratch), source.dtype, {source.rows, source.cols}};
  void* data = target.numbers.data();
  visit_numbers(weight.dtype, data, [&](auto* numbers) {
    const int64_t first = shard.begin * weight.spec.cols;
    for (int64_t i = 0; i < count; ++i) {
      write_number(numbers[i], rounded(source_number(tensor, first + i), compute_dtype_));
    }
  });
  target.is_loaded = true;
}

void WeightStore::copy_committed() {
  require_staging("copy_committed_to_staged");
  if (!committed_) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "copy_committed_to_staged",
                 .message = "no weights are committed yet"});
  }
  *staged_ = *committed_;
}

void WeightStore::require_complete(const char* call) const {
  require_staging(call);
  for (const Weight& weight : *staged_) {
    for (size_t part = 0; part < weight.parts.size(); ++part) {
      if (weight.parts[part].is_loaded) continue;
      throw Error({.code = ErrorCode::kFailedPrecondition,
                   .field = fmt::format("weight {} part {}", weight.spec.name, part),
                   .message = fmt::format("not loaded; load every part before {}", call)});
    }
  }
}

void WeightStore::commit() {
  require_complete("commit_weights");
  committed_ = std::move(staged_);
}

void WeightStore::drop() {
  if (staged_) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "weights",
                 .value = "staged",
                 .message = "commit or discard the staged set first"});
  }
  committed_.reset();
}

const Weight& WeightStore::committed(WeightId id) const {
  if (!committed_ || id < 0 || static_cast<size_t>(id) >= committed_->size()) {
    fail_invariant(fmt::format("an op names weight {}, which is not committed", id));
  }
  return (*committed_)[static_cast<size_t>(id)];
}

uint64_t WeightStore::hash() const {
  if (!committed_) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "weights_hash",
                 .message = "no weights are committed yet"});
  }
  return hash_of(*committed_);
}

uint64_t WeightStore::staged_hash() const {
  require_complete("staged_weights_hash");
  return hash_of(*staged_);
}

uint64_t WeightStore::hash_of(const Set& set) {
  std::string digest;  // one hash a part, then the hash of those
  for (const Weight& weight : set) {
    for (const WeightPart& part : weight.parts) {
      const auto* text = reinterpret_cast<const char*>(part.numbers.data());
      digest += fmt::format("{}:{}:{:016x};", part.rows.begin, part.rows.end,
                            fnv1a64({text, part.numbers.size()}));
    }
  }
  return fnv1a64(digest);
}

}  // namespace rollpack::kernels::reference
