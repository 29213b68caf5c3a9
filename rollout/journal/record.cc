#include "rollout/journal/record.h"

#include <bit>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

static_assert(std::endian::native == std::endian::little);

[[noreturn]] void refuse(const char* what) {
  throw Error({.code = ErrorCode::kDataLoss, .field = "journal record", .value = what});
}

class Writer {
 public:
  static constexpr bool kReads = false;
  template <class T>
  void number(const T& value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  template <class T>
  void numbers(const std::vector<T>& list) {
    number(static_cast<uint32_t>(list.size()));
    if (list.empty()) return;
    bytes.append(reinterpret_cast<const char*>(list.data()), list.size() * sizeof(T));
  }
  void text(const std::string& value) {
    number(static_cast<uint32_t>(value.size()));
    bytes += value;
  }
  std::string bytes;
};

class Reader {
 public:
  static constexpr bool kReads = true;
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}
  template <class T>
  void number(T& value) {
    std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
  }
  template <class T>
  void numbers(std::vector<T>& list) {
    const std::string_view bytes = take(length(sizeof(T)) * sizeof(T));
    list.resize(bytes.size() / sizeof(T));
    if (!list.empty()) std::memcpy(list.data(), bytes.data(), bytes.size());
  }
  void text(std::string& value) { value = take(length(1)); }
  // Of a list whose entries take at least `entry_bytes`: never more than there can be.
  size_t length(size_t entry_bytes) {
    uint32_t length = 0;
    number(length);
    if (length > bytes_.size() / entry_bytes) refuse("a list longer than the record");
    return length;
  }
  void finish() const {
    if (!bytes_.empty()) refuse("more bytes than it says");
  }

 private:
  std::string_view take(size_t size) {
    if (size > bytes_.size()) refuse("fewer bytes than it says");
    const std::string_view taken = bytes_.substr(0, size);
    bytes_.remove_prefix(size);
    return taken;
  }
  std::string_view bytes_;
};

// One visitor a struct, for both directions: what is written and what is read cannot drift apart.
// `T` is const where it is written.

template <class Archive, class T>
void visit_flag(Archive& archive, T& flag) {
  uint8_t byte = flag ? 1 : 0;
  archive.number(byte);
  if (byte > 1) refuse("a flag that is neither 0 nor 1");
  if constexpr (Archive::kReads) flag = byte == 1;
}

// visit_list(archive, list, least bytes of an entry, visit an entry)
template <class Archive, class List, class Visit>
void visit_list(Archive& archive, List& list, size_t entry_bytes, Visit visit) {
  if constexpr (Archive::kReads) {
    list.resize(archive.length(entry_bytes));
  } else {
    archive.number(static_cast<uint32_t>(list.size()));
  }
  for (auto& entry : list) visit(entry);
}

template <class Archive, class T>
void visit_error(Archive& archive, T& error) {
  auto code = static_cast<uint8_t>(error.code);
  archive.number(code);
  if (code > static_cast<uint8_t>(ErrorCode::kInternal)) refuse("an unknown error code");
  if constexpr (Archive::kReads) error.code = static_cast<ErrorCode>(code);
  archive.text(error.field);
  archive.text(error.value);
  archive.text(error.origin);
  archive.text(error.allowed);
  archive.text(error.message);
}

template <class Archive, class T>
void visit_outcome(Archive& archive, T& outcome) {
  bool is_error = outcome.has_value();
  visit_flag(archive, is_error);
  if (!is_error) return;
  if constexpr (Archive::kReads) outcome.emplace();
  visit_error(archive, *outcome);
}

template <class Archive, class T>
void visit_key(Archive& archive, T& key) {
  archive.number(key.request_id);
  archive.number(key.prompt_index);
  archive.text(key.prompt_id.text);
  visit_flag(archive, key.prompt_id.is_integer);
  archive.number(key.sample_index);
  archive.number(key.group_size);
}

template <class Archive, class T>
void visit_request(Archive& archive, T& request) {
  visit_key(archive, request.key);
  if constexpr (Archive::kReads) {
    std::vector<int32_t> prompt_ids;
    archive.numbers(prompt_ids);
    request.prompt_ids = std::make_shared<const std::vector<int32_t>>(std::move(prompt_ids));
  } else {
    archive.numbers(*request.prompt_ids);
  }
  auto& sampling = request.sampling;
  archive.number(sampling.params.temperature);
  archive.number(sampling.params.top_k);
  archive.number(sampling.params.top_p);
  archive.number(sampling.params.min_p);
  archive.number(sampling.seed);
  archive.number(sampling.response_length);
  archive.number(sampling.min_tokens);
  archive.numbers(sampling.stop_token_ids);
}

template <class Archive, class T>
void visit_group(Archive& archive, T& group) {
  visit_request(archive, group.accepted.request);
  archive.text(group.accepted.origin);
  visit_outcome(archive, group.accepted.skipped);
  visit_flag(archive, group.is_aborted);
  archive.numbers(group.released);
}

template <class Archive, class T>
void visit_batch(Archive& archive, T& batch) {
  archive.number(batch.batch_seq);
  archive.number(batch.num_groups);
  archive.number(batch.num_complete_groups);
  archive.number(batch.step);
  archive.number(batch.dp_rank);
  archive.number(batch.dp_size);
  visit_flag(archive, batch.keeps_groups_whole);
  visit_flag(archive, batch.needs_slot);
  archive.numbers(batch.row_starts);
  visit_list(archive, batch.samples, 20, [&](auto& sample) {
    archive.number(sample.request_id);
    archive.number(sample.prompt_index);
    archive.number(sample.sample_index);
    archive.number(sample.num_tokens);
  });
  visit_list(archive, batch.failed, 46, [&](auto& sample) {
    visit_key(archive, sample.key);
    visit_error(archive, sample.error);
  });
}

template <class Archive, class T>
void visit_fields(Archive& archive, T& fields) {
  using Plain = std::remove_const_t<T>;
  if constexpr (std::is_same_v<Plain, record::Header>) {
    archive.text(fields.instance);
    archive.text(fields.maker);
  } else if constexpr (std::is_same_v<Plain, record::Counters>) {
    archive.number(fields.num_requests);
    archive.number(fields.last_batch_seq);
    archive.number(fields.num_steps);
    archive.number(fields.weight_version);
  } else if constexpr (std::is_same_v<Plain, record::Accepted>) {
    archive.number(fields.request_id);
    visit_list(archive, fields.groups, 80, [&](auto& group) { visit_group(archive, group); });
  } else if constexpr (std::is_same_v<Plain, record::Aborted>) {
    bool is_one = fields.request_id.has_value();
    visit_flag(archive, is_one);
    if (!is_one) return;
    if constexpr (Archive::kReads) fields.request_id.emplace();
    archive.number(*fields.request_id);
  } else if constexpr (std::is_same_v<Plain, record::Formed>) {
    visit_list(archive, fields.batches, 58, [&](auto& batch) { visit_batch(archive, batch); });
  } else if constexpr (std::is_same_v<Plain, record::Released>) {
    archive.number(fields.batch_seq);
  } else if constexpr (std::is_same_v<Plain, record::NodeAccepted>) {
    archive.number(fields.node);
    visit_fields(archive, fields.accepted);
  } else if constexpr (std::is_same_v<Plain, record::NodeCounters>) {
    archive.number(fields.node);
    archive.number(fields.last_batch_seq);
    archive.number(fields.num_steps);
  } else {
    static_assert(std::is_same_v<Plain, record::Switched>);
    archive.number(fields.weight_version);
  }
}

// The alternative that `index` stands for.
template <size_t I = 0>
Record empty_record(size_t index) {
  if constexpr (I == std::variant_size_v<Record>) {
    refuse("an unknown kind");
  } else {
    return index == I ? Record(std::in_place_index<I>) : empty_record<I + 1>(index);
  }
}

}  // namespace

std::string encode(const Record& record) {
  Writer writer;
  writer.number(static_cast<uint8_t>(record.index()));
  std::visit([&](const auto& fields) { visit_fields(writer, fields); }, record);
  return std::move(writer.bytes);
}

Record decode_record(std::string_view bytes) {
  Reader reader(bytes);
  uint8_t kind = 0;
  reader.number(kind);
  Record record = empty_record(kind);
  std::visit([&](auto& fields) { visit_fields(reader, fields); }, record);
  reader.finish();
  return record;
}

}  // namespace rollpack::rollout
