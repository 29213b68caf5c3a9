#include "tests/trainer_bridge/inspection/hand_made_batch.h"

#include <limits>
#include <span>
#include <stdexcept>

#include "kernels/base/checksum.h"

namespace rollpack::bridge::testing {
namespace {

constexpr float kNone = std::numeric_limits<float>::quiet_NaN();

std::vector<HandColumn> sample_columns() {
  return {hand_column<int64_t>("request_id", "<i8", {7, 7, 7}),
          i32_column("prompt_index", {0, 0, 1}),
          u8_column("prompt_id_bytes", {'a', 'a', 'b', '<'}),
          i32_column("prompt_id_starts", {0, 1, 2, 4}),
          i32_column("sample_index", {0, 1, 0}),
          i32_column("group_size", {2, 2, 1}),
          i32_column("prompt_lens", {2, 1, 4}),
          i32_column("response_lens", {3, 2, 0}),
          u8_column("finish_reason", {0, 1, 2}),
          i32_column("stop_token_id", {2, -1, -1}),
          hand_column<float>("temperature", "<f4", {1, 1, 1})};
}

void append(std::vector<HandColumn>& columns, std::vector<HandColumn> more) {
  for (HandColumn& column : more) columns.push_back(std::move(column));
}

}  // namespace

HandColumn i32_column(std::string name, const std::vector<int32_t>& values) {
  return hand_column(std::move(name), "<i4", values);
}

HandColumn u8_column(std::string name, const std::vector<uint8_t>& values) {
  return hand_column(std::move(name), "|u1", values);
}

std::vector<HandColumn> packed_columns() {
  std::vector<HandColumn> columns = {
      i32_column("input_ids", {11, 12, 13, 14, 2, 11, 15, 16, 17, 18, 19, 20}),
      i32_column("position_ids", {0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3}),
      i32_column("segment_ids", {0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2}),
      i32_column("cu_seqlens", {0, 5, 8, 12}),
      i32_column("row_starts", {0, 2, 3}),
      u8_column("loss_mask", {0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0}),
      hand_column<float>("rollout_log_probs", "<f4",
                         {kNone, kNone, -1, -2, -3, kNone, -1, -2, kNone, kNone, kNone, kNone}),
      i32_column("weight_versions", {-1, -1, 4, 4, 5, -1, 4, 4, -1, -1, -1, -1})};
  append(columns, sample_columns());
  return columns;
}

std::vector<HandColumn> padded_columns() {
  using Ids = std::vector<int64_t>;
  const std::vector<uint64_t> prompt = {3, 4}, response = {3, 3}, whole = {3, 7};
  std::vector<HandColumn> columns = {
      hand_column("prompts", "<i8", Ids{0, 0, 11, 12, 0, 0, 0, 11, 17, 18, 19, 20}, prompt),
      hand_column("responses", "<i8", Ids{13, 14, 2, 15, 16, 0, 0, 0, 0}, response),
      hand_column("input_ids", "<i8",
                  Ids{0, 0, 11, 12, 13, 14, 2, 0, 0, 0, 11, 15, 16, 0, 17, 18, 19, 20, 0, 0, 0},
                  whole),
      hand_column("attention_mask", "<i8",
                  Ids{0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0}, whole),
      hand_column("position_ids", "<i8",
                  Ids{0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 1, 2, 2, 0, 1, 2, 3, 3, 3, 3}, whole),
      hand_column("response_mask", "<i8", Ids{1, 1, 1, 1, 1, 0, 0, 0, 0}, response),
      hand_column<float>("rollout_log_probs", "<f4", {-1, -2, -3, -1, -2, 0, 0, 0, 0}, response)};
  append(columns, sample_columns());
  return columns;
}

HandColumn& column_of(std::vector<HandColumn>& columns, const std::string& name) {
  for (HandColumn& column : columns) {
    if (column.name == name) return column;
  }
  throw std::runtime_error("no column " + name);
}

std::vector<std::byte> batch_bytes(const std::vector<HandColumn>& columns) {
  std::vector<std::byte> bytes(entry_at(columns.size()));
  for (size_t c = 0; c < columns.size(); ++c) {
    const HandColumn& column = columns[c];
    bytes.resize((bytes.size() + 63) / 64 * 64);
    ColumnEntry entry;
    std::copy(column.name.begin(), column.name.end(), entry.name.begin());
    std::copy(column.dtype.begin(), column.dtype.end(), entry.dtype.begin());
    entry.ndim = static_cast<uint32_t>(column.shape.size());
    entry.alignment = column.alignment;
    std::copy(column.shape.begin(), column.shape.end(), entry.shape.begin());
    entry.offset = bytes.size();
    entry.bytes = column.bytes.size();
    put(bytes, entry_at(c), entry);
    bytes.insert(bytes.end(), column.bytes.begin(), column.bytes.end());
  }
  const BatchHeader header{
      .num_columns = static_cast<uint32_t>(columns.size()), .batch_seq = 12, .generation = 3};
  put(bytes, 0, header);
  stamp(bytes);
  return bytes;
}

void stamp(std::vector<std::byte>& bytes) {
  put(bytes, offsetof(BatchHeader, bytes), uint64_t{bytes.size()});
  const std::span<const std::byte> body = std::span(bytes).subspan(sizeof(BatchHeader));
  put(bytes, offsetof(BatchHeader, crc32), crc32_of(body));
}

}  // namespace rollpack::bridge::testing
