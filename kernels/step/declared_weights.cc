#include "kernels/step/declared_weights.h"

#include <fmt/format.h>

#include <utility>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"

namespace rollpack::kernels {
namespace {

bool is_float(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16;
}

int64_t total_rows(const WeightSpec& spec) {
  int64_t rows = 0;
  for (const int64_t part : spec.part_rows) rows += part;
  return rows;
}

void check_load(const DeclaredWeight& weight, int32_t part, const WeightSource& source,
                ShardRange shard) {
  const WeightSpec& spec = weight.spec;
  if (part < 0 || part >= static_cast<int32_t>(spec.part_rows.size())) {
    fail_weight_argument(spec.name + " part", std::to_string(part),
                         fmt::format("0 to {}", spec.part_rows.size() - 1));
  }
  const int64_t rows = spec.part_rows[static_cast<size_t>(part)];
  const bool is_vector = spec.kind == WeightKind::kVector;
  const bool fits =
      is_vector ? source.num_elements() == rows : source.rows == rows && source.cols == spec.cols;
  if (!fits) {
    fail_weight_argument(
        fmt::format("{} part {}", spec.name, part),
        fmt::format("[{}, {}]", source.rows, source.cols),
        is_vector ? fmt::format("{} elements", rows) : fmt::format("[{}, {}]", rows, spec.cols));
  }
  if (!is_float(source.dtype)) {
    fail_weight_argument(fmt::format("{} part {} dtype", spec.name, part),
                         std::string(dtype_name(source.dtype)), "float32, bfloat16 or float16");
  }
  const bool is_declared = !spec.shards.empty();
  if (is_declared && shard != spec.shards[static_cast<size_t>(part)]) {
    const ShardRange& wanted = spec.shards[static_cast<size_t>(part)];
    fail_weight_argument(fmt::format("{} part {} shard", spec.name, part),
                         fmt::format("[{}, {})", shard.begin, shard.end),
                         fmt::format("[{}, {}), as declared", wanted.begin, wanted.end));
  }
  if (!is_declared && (shard.begin < 0 || shard.begin >= shard.end || shard.end > rows)) {
    fail_weight_argument(fmt::format("{} part {} shard", spec.name, part),
                         fmt::format("[{}, {})", shard.begin, shard.end),
                         fmt::format("a range of rows in [0, {})", rows));
  }
}

void fix_local_rows(DeclaredWeight& weight, int32_t part, ShardRange shard) {
  const auto index = static_cast<size_t>(part);
  const int64_t rows = shard.end - shard.begin;
  std::optional<int64_t>& local = weight.local_rows[index];
  if (local && *local != rows) {
    fail_weight_argument(fmt::format("{} part {} shard", weight.spec.name, part),
                         fmt::format("{} rows", rows),
                         fmt::format("{} rows, as loaded before", *local));
  }
  // Parts lie one after the other, so a shard moves what follows it: parts after it must come
  // later.
  const bool moves_others = !local && rows != weight.spec.part_rows[index];
  for (size_t later = index + 1; moves_others && later < weight.local_rows.size(); ++later) {
    if (weight.local_rows[later] && weight.spec.kind != WeightKind::kGated) {
      fail_weight_state(fmt::format("{} part {}", weight.spec.name, part),
                        "loaded after a later part", "load the parts of a sharded weight in order");
    }
  }
  // Steps read this from another thread once a set is committed; it has its value by then.
  if (!local) local = rows;
}

}  // namespace

int64_t DeclaredWeight::first_row(int32_t part) const {
  int64_t row = 0;
  for (size_t i = 0; i < static_cast<size_t>(part); ++i) {
    row += local_rows[i].value_or(spec.part_rows[i]);
  }
  return row;
}

DeclaredWeight DeclaredWeights::checked(const WeightSpec& spec) {
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
    fail_weight_argument(
        spec.name,
        fmt::format("{} parts, {} rows, {} columns", spec.part_rows.size(), total_rows(spec),
                    spec.cols),
        "parts of positive size; two equal ones where gated; one column in a vector; a "
        "shard within each part or none");
  }
  DeclaredWeight weight{.spec = spec};
  weight.local_rows.resize(spec.part_rows.size());
  for (size_t part = 0; part < spec.shards.size(); ++part) {
    weight.local_rows[part] = spec.shards[part].size();
  }
  return weight;
}

WeightId DeclaredWeights::add(DeclaredWeight weight) {
  all_.push_back(std::move(weight));
  return static_cast<WeightId>(all_.size()) - 1;
}

const DeclaredWeight& DeclaredWeights::at(WeightId id, const char* op) const {
  if (id < 0 || id >= static_cast<WeightId>(all_.size())) {
    fail_weight_argument(fmt::format("{} weight", op), std::to_string(id),
                         fmt::format("a declared weight, 0 to {}", all_.size() - 1));
  }
  return all_[static_cast<size_t>(id)];
}

DeclaredWeight& DeclaredWeights::at(WeightId id, const char* op) {
  return const_cast<DeclaredWeight&>(std::as_const(*this).at(id, op));
}

void DeclaredWeights::begin_load(DeclaredWeight& weight, int32_t part, const WeightSource& source,
                                 ShardRange shard) {
  check_load(weight, part, source, shard);
  fix_local_rows(weight, part, shard);
}

void DeclaredWeights::hold_rest() {
  for (DeclaredWeight& weight : all_) {
    for (size_t part = 0; part < weight.local_rows.size(); ++part) {
      if (!weight.local_rows[part]) weight.local_rows[part] = weight.spec.part_rows[part];
    }
  }
}

DeclaredWeights::Flags DeclaredWeights::flags(bool value) const {
  Flags flags;
  for (const DeclaredWeight& weight : all_) flags.emplace_back(weight.spec.part_rows.size(), value);
  return flags;
}

void DeclaredWeights::require_loaded(const Flags& is_loaded) const {
  for (size_t id = 0; id < all_.size(); ++id) {
    for (size_t part = 0; part < is_loaded[id].size(); ++part) {
      if (is_loaded[id][part]) continue;
      fail_weight_state(fmt::format("{} part {}", all_[id].spec.name, part), "not loaded",
                        "every part is loaded before a commit or an export");
    }
  }
}

uint64_t DeclaredWeights::layout_hash(std::string layout) const {
  for (const DeclaredWeight& weight : all_) {
    layout += fmt::format("|{} {} {}", weight.spec.name, static_cast<int>(weight.spec.kind),
                          weight.spec.cols);
    for (size_t part = 0; part < weight.spec.part_rows.size(); ++part) {
      // Rows held, not rows of the whole part: shards lie elsewhere than whole parts.
      layout += fmt::format(" {}", weight.local_rows[part].value_or(weight.spec.part_rows[part]));
    }
  }
  return fnv1a64(layout);
}

void fail_weight_state(std::string field, std::string value, std::string message) {
  throw Error({.code = ErrorCode::kFailedPrecondition,
               .field = std::move(field),
               .value = std::move(value),
               .message = std::move(message)});
}

void fail_weight_argument(std::string field, std::string value, std::string allowed) {
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = std::move(field),
               .value = std::move(value),
               .allowed = std::move(allowed)});
}

}  // namespace rollpack::kernels
