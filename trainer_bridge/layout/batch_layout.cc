#include "trainer_bridge/layout/batch_layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <limits>
#include <string_view>
#include <utility>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"
#include "trainer_bridge/contract/batch_schema.h"
#include "trainer_bridge/layout/column.h"
#include "trainer_bridge/layout/layouts.h"
#include "trainer_bridge/layout/sample_columns.h"

namespace rollpack::bridge {
namespace {

struct NamedLayout {
  std::string_view name;
  std::unique_ptr<BatchLayout> (*make)(const LayoutOptions&);
};
constexpr std::array<NamedLayout, 2> kLayouts = {
    {{"packed", make_packed_layout}, {"padded", make_padded_layout}}};

constexpr int64_t kMaxI32 = std::numeric_limits<int32_t>::max();

[[noreturn]] void refuse(std::string field, std::string value, std::string allowed,
                         std::string message = {}) {
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = std::move(field),
               .value = std::move(value),
               .allowed = std::move(allowed),
               .message = std::move(message)});
}

// `name` reads the name of an element of `known`.
template <class Range, class Name>
void check_one_of(const std::string& field, const std::string& value, const Range& known,
                  Name name) {
  if (std::ranges::find(known, value, name) != known.end()) return;
  std::string allowed;
  for (const auto& each : known) {
    allowed += (allowed.empty() ? "" : " or ") + std::string(std::invoke(name, each));
  }
  refuse(field, value, allowed);
}

void check_widths(const LayoutOptions& options) {
  if (options.pad_to_multiple_of < 1) {
    refuse("bridge.pad_to_multiple_of", std::to_string(options.pad_to_multiple_of), "1 or more");
  }
  for (const auto& [field, width] : {std::pair{"bridge.prompt_width", options.prompt_width},
                                     std::pair{"bridge.response_width", options.response_width}}) {
    if (width >= 0 && width % options.pad_to_multiple_of == 0) continue;
    refuse(field, std::to_string(width),
           fmt::format("0, or a multiple of bridge.pad_to_multiple_of = {}",
                       options.pad_to_multiple_of));
  }
}

void check_columns(const std::vector<std::string>& columns) {
  for (size_t i = 0; i < columns.size(); ++i) {
    const std::string field = fmt::format("bridge.columns[{}]", i);
    check_one_of(field, columns[i], optional_response_values(), &ResponseValues::name);
    const auto first = std::find(columns.begin(), columns.end(), columns[i]) - columns.begin();
    if (first != static_cast<int64_t>(i)) {
      refuse(field, columns[i], "each column once", fmt::format("columns[{}] is the same", first));
    }
  }
}

// Offsets inside a batch are i32: of tokens in cu_seqlens, of bytes in prompt_id_starts.
void check_totals(std::span<const Sample* const> samples) {
  int64_t num_tokens = 0;
  int64_t num_id_bytes = 0;
  for (const Sample* sample : samples) {
    num_tokens += static_cast<int64_t>(sample->prompt_ids->size() + sample->response_ids.size());
    num_id_bytes += static_cast<int64_t>(sample->key.prompt_id.text.size());
  }
  if (std::max(num_tokens, num_id_bytes) <= kMaxI32) return;
  throw Error({.code = ErrorCode::kUnsupported,
               .field = "batch",
               .value = fmt::format("{} tokens, {} bytes of prompt ids", num_tokens, num_id_bytes),
               .allowed = fmt::format("{} of each, as offsets are i32", kMaxI32),
               .message = "ask for fewer groups a batch"});
}

void check_entropy(const LayoutOptions& options, const Sample& sample) {
  const bool is_wanted =
      std::find(options.columns.begin(), options.columns.end(), "entropy") != options.columns.end();
  if (!is_wanted || sample.entropy.size() == sample.response_ids.size()) return;
  throw Error({.code = ErrorCode::kFailedPrecondition,
               .field = "bridge.columns",
               .value = "entropy",
               .origin = sample_name(sample),
               .allowed = "columns the engine computes",
               .message = "the sample was made without entropy"});
}

// A column's place in the batch.
struct Placed {
  uint64_t begin = 0;
  uint64_t end = 0;
};

constexpr uint64_t align_up(uint64_t offset) {
  return (offset + kColumnAlignment - 1) / kColumnAlignment * kColumnAlignment;
}

uint64_t table_end(const std::vector<Column>& columns) {
  return sizeof(BatchHeader) + columns.size() * sizeof(ColumnEntry);
}

std::vector<Placed> place(const std::vector<Column>& columns) {
  std::vector<Placed> places;
  uint64_t end = table_end(columns);
  for (const Column& column : columns) {
    const uint64_t begin = align_up(end);
    end = begin + column.bytes;
    places.push_back({begin, end});
  }
  return places;
}

ColumnEntry make_entry(const Column& column, Placed place) {
  ColumnEntry entry;
  if (column.name.size() >= entry.name.size() || column.shape.size() > entry.shape.size()) {
    fail_invariant("column " + column.name + " does not fit a table entry");
  }
  std::copy(column.name.begin(), column.name.end(), entry.name.begin());
  std::copy(column.dtype.begin(), column.dtype.end(), entry.dtype.begin());
  entry.ndim = static_cast<uint32_t>(column.shape.size());
  entry.alignment = static_cast<uint32_t>(column.alignment);
  std::copy(column.shape.begin(), column.shape.end(), entry.shape.begin());
  entry.offset = place.begin;
  entry.bytes = column.bytes;
  return entry;
}

void check_slot(std::span<const std::byte> slot, uint64_t bytes) {
  if (reinterpret_cast<uintptr_t>(slot.data()) % kColumnAlignment != 0) {
    fail_invariant("a slot does not start at a multiple of 64 bytes");
  }
  if (bytes <= slot.size()) return;
  throw Error({.code = ErrorCode::kResourceExhausted,
               .field = "bridge.slot_bytes",
               .value = std::to_string(slot.size()),
               .allowed = fmt::format("{} or more, the bytes of the batch", bytes)});
}

// Table and columns; the gaps between them become zeros, so that equal batches are equal bytes.
void write_columns(const std::vector<Column>& columns, const std::vector<Placed>& places,
                   std::byte* out) {
  uint64_t written = table_end(columns);
  for (size_t c = 0; c < columns.size(); ++c) {
    const ColumnEntry entry = make_entry(columns[c], places[c]);
    std::memcpy(out + sizeof(BatchHeader) + c * sizeof entry, &entry, sizeof entry);
    std::memset(out + written, 0, places[c].begin - written);
    columns[c].write(out + places[c].begin);
    written = places[c].end;
  }
}

}  // namespace

void check_layout_options(const LayoutOptions& options) {
  check_one_of("bridge.layout", options.layout, kLayouts, &NamedLayout::name);
  if (options.max_tokens_per_row < 1) {
    refuse("bridge.max_tokens_per_row", std::to_string(options.max_tokens_per_row),
           fmt::format("1 to {}", kMaxI32));
  }
  check_widths(options);
  check_columns(options.columns);
  check_one_of("rollout.logprobs_mode", options.logprobs_mode, logprobs_modes(), std::identity());
  if (options.pad_token_id < 0) {
    refuse("pad_token_id", std::to_string(options.pad_token_id), "a token id, 0 or more");
  }
}

std::unique_ptr<BatchLayout> make_layout(const LayoutOptions& options) {
  check_layout_options(options);
  const auto* known = std::find_if(kLayouts.begin(), kLayouts.end(), [&](const NamedLayout& each) {
    return each.name == options.layout;
  });
  return known->make(options);
}

std::vector<Column> BatchLayout::checked_columns(std::span<const Sample* const> samples,
                                                 std::span<const int32_t> row_starts) const {
  for (const Sample* sample : samples) {
    check_sample(*sample);
    check_entropy(options_, *sample);
  }
  check_totals(samples);
  return columns(samples, row_starts);
}

int64_t BatchLayout::batch_bytes(std::span<const Sample* const> samples,
                                 std::span<const int32_t> row_starts) const {
  return static_cast<int64_t>(place(checked_columns(samples, row_starts)).back().end);
}

int64_t BatchLayout::write(std::span<const Sample* const> samples, uint64_t batch_seq,
                           uint64_t generation, std::span<std::byte> slot, uint32_t& crc32,
                           std::span<const int32_t> row_starts) const {
  const std::vector<Column> columns = checked_columns(samples, row_starts);
  const std::vector<Placed> places = place(columns);
  const uint64_t bytes = places.back().end;
  check_slot(slot, bytes);

  write_columns(columns, places, slot.data());
  crc32 = crc32_of(slot.first(bytes).subspan(sizeof(BatchHeader)));
  const BatchHeader header{.num_columns = static_cast<uint32_t>(columns.size()),
                           .batch_seq = batch_seq,
                           .generation = generation,
                           .bytes = bytes,
                           .crc32 = crc32};
  std::memcpy(slot.data(), &header, sizeof header);
  return static_cast<int64_t>(bytes);
}

}  // namespace rollpack::bridge
