#include "rollout/model/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

#include "kernels/base/error.h"
#include "rollout/jsonl/strict_json.h"
#include "rollout/jsonl/text_file.h"

namespace rollpack::rollout {
namespace {

constexpr uint64_t kMaxHeaderBytes = uint64_t{32} << 20;  // 100,000 tensors need about 12 MB
constexpr size_t kMaxTensors = 100000;
constexpr size_t kMaxRank = 8;
constexpr size_t kMaxNameBytes = 1024;
constexpr int64_t kSizeBytes = 8;  // of the header size itself

struct FileDType {
  std::string_view name;
  int64_t bits;
  std::optional<DType> dtype = {};  // what we read it as
};
constexpr std::array<FileDType, 23> kDTypes = {{
    {"F32", 32, DType::kF32},
    {"F16", 16, DType::kF16},
    {"BF16", 16, DType::kBF16},
    {"F64", 64},
    {"I64", 64},
    {"I32", 32},
    {"I16", 16},
    {"I8", 8},
    {"U64", 64},
    {"U32", 32},
    {"U16", 16},
    {"U8", 8},
    {"BOOL", 8},
    {"C64", 64},
    {"F8_E4M3", 8},
    {"F8_E5M2", 8},
    {"F8_E8M0", 8},
    {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8},
    {"F6_E2M3", 6},
    {"F6_E3M2", 6},
    {"F4", 4},
    {"F4_E2M1", 4},
}};

[[noreturn]] void fail(ErrorCode code, const std::string& path, std::string field,
                       std::string value, std::string allowed, std::string message = {}) {
  throw Error(
      {code, std::move(field), std::move(value), path, std::move(allowed), std::move(message)});
}

// A name that is safe to print, whatever it holds.
std::string tensor_field(std::string_view name) {
  return fmt::format("tensor {}", brief_json(Json(name)));
}

// Tensor and where its data lies behind the header.
struct Entry {
  TensorInfo info;
  int64_t begin = 0, end = 0;
};

void check_name(const std::string& name, const std::string& path) {
  const bool has_control =
      std::any_of(name.begin(), name.end(), [](char c) { return static_cast<uint8_t>(c) < 0x20; });
  if (!name.empty() && name.size() <= kMaxNameBytes && !has_control) return;
  fail(ErrorCode::kInvalidArgument, path, tensor_field(name), {},
       fmt::format("a name of 1 to {} bytes without control characters", kMaxNameBytes));
}

const FileDType& find_dtype(const Json& value, const JsonPlace& place) {
  const std::string name = json_string(value, place);
  const auto found = std::find_if(kDTypes.begin(), kDTypes.end(),
                                  [&](const FileDType& dtype) { return dtype.name == name; });
  if (found == kDTypes.end()) fail_json(value, place, "a dtype of the safetensors format");
  return *found;
}

// Bytes of `shape` elements of `bits` bits; nothing where that overflows or is no whole number.
std::optional<int64_t> shape_bytes(const std::vector<int64_t>& shape, int64_t bits) {
  int64_t total_bits = bits;
  // A 0 anywhere makes the product 0 whatever the others are, so overflow must not depend on order.
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  for (const int64_t dim : shape) {
    if (__builtin_mul_overflow(total_bits, dim, &total_bits)) return std::nullopt;
  }
  return total_bits % 8 == 0 ? std::optional(total_bits / 8) : std::nullopt;
}

Entry read_entry(const std::string& name, const Json& value, const std::string& path) {
  check_name(name, path);
  const std::string field = tensor_field(name);
  json_object(value, {field, path});
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!value.contains(key)) {
      fail(ErrorCode::kInvalidArgument, path, field, {}, "dtype, shape and data_offsets",
           fmt::format("{} is missing", key));
    }
  }
  if (value.size() != 3) fail_json(value, {field, path}, "dtype, shape and data_offsets, no more");

  Entry entry;
  entry.info.name = name;
  const FileDType& dtype = find_dtype(value["dtype"], {field + ".dtype", path});
  entry.info.file_dtype = dtype.name;
  entry.info.is_readable = dtype.dtype.has_value();
  entry.info.dtype = dtype.dtype.value_or(DType::kU8);

  const Json& shape = json_array(value["shape"], {field + ".shape", path});
  if (shape.size() > kMaxRank) {
    fail_json(shape, {field + ".shape", path}, fmt::format("at most {} dimensions", kMaxRank));
  }
  for (const Json& dim : shape) {
    entry.info.shape.push_back(json_integer(dim, {field + ".shape", path}, 0));
  }
  const JsonPlace offsets_place = {field + ".data_offsets", path};
  const Json& offsets = json_array(value["data_offsets"], offsets_place);
  if (offsets.size() != 2) fail_json(offsets, offsets_place, "a list of two, [begin, end]");
  entry.begin = json_integer(offsets[0], offsets_place, 0);
  entry.end = json_integer(offsets[1], offsets_place, 0);
  if (entry.begin > entry.end) fail_json(offsets, offsets_place, "begin not above end");

  entry.info.bytes = entry.end - entry.begin;
  const std::optional<int64_t> bytes = shape_bytes(entry.info.shape, dtype.bits);
  if (!bytes) {
    fail_json(shape, {field + ".shape", path}, "a whole number of bytes below 2^60",
              fmt::format("of {}", dtype.name));
  }
  if (*bytes != entry.info.bytes) {
    fail_json(offsets, offsets_place,
              fmt::format("{} bytes: {} of {}", *bytes, shape.dump(), dtype.name),
              fmt::format("they span {}", entry.info.bytes));
  }
  return entry;
}

void check_metadata(const Json& metadata, const std::string& path) {
  json_object(metadata, {"__metadata__", path});
  for (const auto& [key, value] : metadata.items()) {
    json_string(value, {"__metadata__." + brief_json(Json(key)), path});
  }
}

// Sorted entries must lie one behind the other and fill the file.
void check_layout(const std::vector<Entry>& entries, int64_t data_bytes, const std::string& path) {
  int64_t expected = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != expected) {
      fail(ErrorCode::kInvalidArgument, path, tensor_field(entry.info.name) + ".data_offsets",
           fmt::format("[{},{}]", entry.begin, entry.end), fmt::format("a begin of {}", expected),
           entry.begin < expected ? "it overlaps the tensor before it"
                                  : "there is a hole before it");
    }
    expected = entry.end;
  }
  if (expected == data_bytes) return;
  fail(ErrorCode::kDataLoss, path, "data", fmt::format("{} bytes", data_bytes),
       fmt::format("{} bytes, as the header says", expected),
       data_bytes < expected ? "the file is cut short" : "bytes follow the last tensor");
}

std::string read_header(const RegularFile& file, const std::string& path) {
  std::array<unsigned char, kSizeBytes> prefix = {};
  if (read_at(file.fd, prefix.data(), prefix.size(), 0, path) != prefix.size()) {
    fail(ErrorCode::kDataLoss, path, "file size", fmt::format("{} bytes", file.bytes),
         "at least 8 bytes");
  }
  uint64_t size = 0;
  for (size_t i = prefix.size(); i-- > 0;) size = size << 8 | prefix[i];
  if (size < 2 || size > kMaxHeaderBytes) {
    fail(ErrorCode::kInvalidArgument, path, "header size", std::to_string(size),
         fmt::format("2 to {} bytes", kMaxHeaderBytes), "is this a safetensors file?");
  }
  const auto available = static_cast<uint64_t>(std::max<int64_t>(file.bytes - kSizeBytes, 0));
  if (size > available) {
    fail(ErrorCode::kDataLoss, path, "header size", std::to_string(size),
         fmt::format("at most the {} bytes that follow it", available), "the file is cut short");
  }
  std::string header(size, '\0');
  header.resize(read_at(file.fd, header.data(), header.size(), kSizeBytes, path));
  if (header.empty() || header.front() != '{') {
    fail(ErrorCode::kInvalidArgument, path, "header", {}, "a JSON object, from its first byte on");
  }
  return header;
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path) {
  RegularFile file = open_regular_file(path, "weights");
  const std::string header = read_header(file, path);
  const Json object = parse_json(header, path, {.max_bytes = kMaxHeaderBytes, .max_depth = 3});
  if (object.size() > kMaxTensors) {
    fail(ErrorCode::kInvalidArgument, path, "number of tensors", std::to_string(object.size()),
         fmt::format("at most {}", kMaxTensors));
  }
  std::vector<Entry> entries;
  for (const auto& [name, value] : object.items()) {
    if (name == "__metadata__") {
      check_metadata(value, path);
    } else {
      entries.push_back(read_entry(name, value, path));
    }
  }
  // Empty tensors share their offset with the next: by end as well, then by name for one order.
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end, a.info.name) < std::tie(b.begin, b.end, b.info.name);
  });
  const auto data_begin = kSizeBytes + static_cast<int64_t>(header.size());
  check_layout(entries, file.bytes - data_begin, path);
  for (Entry& entry : entries) {
    offsets_.push_back(data_begin + entry.begin);
    tensors_.push_back(std::move(entry.info));
  }
  fd_ = std::move(file.fd);
}

void SafetensorsFile::require_readable(size_t index) const {
  const TensorInfo& info = tensors_.at(index);
  if (info.is_readable) return;
  fail(ErrorCode::kUnsupported, path_, tensor_field(info.name) + ".dtype", info.file_dtype,
       "one of F32, F16, BF16", kNoQuantizedWeights);
}

void SafetensorsFile::read(size_t index, int64_t offset, std::span<std::byte> out) const {
  require_readable(index);
  const TensorInfo& info = tensors_[index];
  const auto bytes = static_cast<int64_t>(out.size());
  if (offset < 0 || offset > info.bytes || bytes > info.bytes - offset) {
    fail_invariant(
        fmt::format("bytes [{}, {}) of a tensor of {}", offset, offset + bytes, info.bytes));
  }
  const size_t got = read_at(fd_, out.data(), out.size(), offsets_[index] + offset, path_);
  if (got == out.size()) return;
  fail(ErrorCode::kDataLoss, path_, tensor_field(info.name),
       fmt::format("{} bytes", offset + static_cast<int64_t>(got)),
       fmt::format("{} bytes", info.bytes), "the file became shorter after it was opened");
}

}  // namespace rollpack::rollout
