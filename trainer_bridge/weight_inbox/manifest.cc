#include "trainer_bridge/weight_inbox/manifest.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>

#include "kernels/base/error.h"
#include "trainer_bridge/wire/utf8.h"

namespace rollpack::bridge {
namespace {

constexpr int64_t kMaxBytes = std::numeric_limits<int64_t>::max();
constexpr size_t kMaxNameBytes = 512;
constexpr const char* kOrigin = "update_weights chunk";

std::string read_name(Fields& fields) {
  const std::string given = fields.text("name");
  const bool printable =
      std::all_of(given.begin(), given.end(), [](char c) { return c >= ' ' && c <= '~'; });
  std::string name = canonical_name(given);
  if (name.empty() || name.size() > kMaxNameBytes || !printable) {
    fields.refuse("name", given, fmt::format("1 to {} printable ASCII characters", kMaxNameBytes));
  }
  for (const std::string_view part :
       {"lora_A", "lora_B", "lora_embedding", "base_layer", "adapter"}) {
    if (name.find(part) == std::string::npos) continue;
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = fields.path_of("name"),
                 .value = shortened(given),
                 .origin = kOrigin,
                 .allowed = "a tensor of the model itself",
                 .message = "merge the adapter first (PEFT: merge_and_unload) and send the merged "
                            "weights"});
  }
  return name;
}

std::vector<int64_t> read_shape(Fields& fields) {
  const Json& dims = fields.array("shape");
  if (dims.empty() || dims.size() > static_cast<size_t>(kMaxTensorRank)) {
    fields.refuse("shape", dims, fmt::format("1 to {} dimensions", kMaxTensorRank));
  }
  std::vector<int64_t> shape;
  for (const Json& dim : dims) {
    if (!is_integer_in(dim, 1, kMaxBytes)) {
      fields.refuse("shape", dim, "dimensions that are positive integers");
    }
    shape.push_back(dim.get<int64_t>());
  }
  return shape;
}

// Product of the shape times the element's bytes, refused where it leaves 63 bits.
int64_t shape_bytes(const Fields& fields, const Json& shape_value,
                    const std::vector<int64_t>& shape, DType dtype) {
  int64_t bytes = dtype_bytes(dtype);
  for (const int64_t dim : shape) {
    if (__builtin_mul_overflow(bytes, dim, &bytes)) {
      fields.refuse("shape", shape_value.dump(), "a product that fits 63 bits");
    }
  }
  return bytes;
}

// What a tensor is, wherever it lies.
TensorEntry read_tensor(Fields& fields, const Json& map) {
  TensorEntry tensor;
  tensor.name = read_name(fields);
  constexpr std::array kDTypes = {DType::kF32, DType::kF16, DType::kBF16};
  tensor.dtype = kDTypes[fields.one_of("dtype", {"float32", "float16", "bfloat16"})];
  tensor.shape = read_shape(fields);
  const int64_t expected = shape_bytes(fields, map["shape"], tensor.shape, tensor.dtype);
  tensor.bytes = fields.integer("bytes", 1, kMaxBytes);
  if (tensor.bytes != expected) {
    fields.refuse("bytes", tensor.bytes,
                  fmt::format("{}, the bytes of shape {} in {}", expected, map["shape"].dump(),
                              dtype_name(tensor.dtype)));
  }
  return tensor;
}

TensorEntry read_tensor_of_chunk(Fields& fields, const Json& map, int64_t chunk_bytes) {
  TensorEntry tensor = read_tensor(fields, map);
  tensor.offset = fields.integer("offset", 0, chunk_bytes);
  tensor.crc32 =
      static_cast<uint32_t>(fields.integer("crc32", 0, std::numeric_limits<uint32_t>::max()));
  fields.finish();
  if (tensor.bytes > chunk_bytes - tensor.offset) {
    fields.refuse("bytes", tensor.bytes,
                  fmt::format("at most the {} bytes behind its offset in the chunk",
                              chunk_bytes - tensor.offset));
  }
  if (tensor.offset % dtype_bytes(tensor.dtype) != 0) {
    fields.refuse("offset", tensor.offset,
                  fmt::format("a multiple of {}", dtype_bytes(tensor.dtype)));
  }
  return tensor;
}

[[noreturn]] void refuse_pair(std::string field, std::string value, std::string allowed) {
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = std::move(field),
               .value = std::move(value),
               .origin = kOrigin,
               .allowed = std::move(allowed)});
}

TensorEntry read_lent_tensor(Fields& fields, const Json& map) {
  TensorEntry tensor = read_tensor(fields, map);
  tensor.address =
      static_cast<uint64_t>(fields.integer("address", 1, kMaxBytes - tensor.bytes));
  fields.finish();
  return tensor;
}

std::vector<const TensorEntry*> pointers_to(const std::vector<TensorEntry>& tensors) {
  std::vector<const TensorEntry*> pointers;
  pointers.reserve(tensors.size());
  for (const TensorEntry& tensor : tensors) pointers.push_back(&tensor);
  return pointers;
}

void check_apart(const std::vector<TensorEntry>& tensors) {
  std::vector<const TensorEntry*> sorted = pointers_to(tensors);
  std::sort(sorted.begin(), sorted.end(),
            [](const auto* a, const auto* b) { return a->offset < b->offset; });
  for (size_t i = 1; i < sorted.size(); ++i) {
    if (sorted[i]->offset >= sorted[i - 1]->offset + sorted[i - 1]->bytes) continue;
    refuse_pair("offset", std::to_string(sorted[i]->offset),
                fmt::format("{} not to overlap {}", sorted[i]->name, sorted[i - 1]->name));
  }
}

void check_names(const std::vector<TensorEntry>& tensors) {
  std::vector<const TensorEntry*> sorted = pointers_to(tensors);
  std::sort(sorted.begin(), sorted.end(),
            [](const auto* a, const auto* b) { return a->name < b->name; });
  for (size_t i = 1; i < sorted.size(); ++i) {
    if (sorted[i]->name != sorted[i - 1]->name) continue;
    refuse_pair("name", sorted[i]->name, "each tensor once");
  }
}

template <class ReadTensor>
std::vector<TensorEntry> read_tensors(Fields& fields, const ReadTensor& read) {
  const Json& maps = fields.array("tensors");
  if (maps.empty()) fields.refuse("tensors", maps, "at least one tensor");
  std::vector<TensorEntry> tensors;
  for (size_t i = 0; i < maps.size(); ++i) {
    Fields of_tensor(maps[i], fmt::format("tensors[{}]", i), kOrigin);
    tensors.push_back(read(of_tensor, maps[i]));
  }
  check_names(tensors);
  return tensors;
}

}  // namespace

std::string canonical_name(std::string_view name) {
  for (bool stripped = true; stripped;) {
    stripped = false;
    for (const std::string_view prefix : {"module.", "_orig_mod."}) {
      if (!name.starts_with(prefix)) continue;
      name.remove_prefix(prefix.size());
      stripped = true;
    }
  }
  return std::string(name);
}

ChunkManifest read_manifest(Fields& fields) {
  ChunkManifest manifest;
  manifest.bytes = fields.integer("bytes", 1, kMaxBytes);
  manifest.tensors = read_tensors(fields, [&](Fields& of_tensor, const Json& map) {
    return read_tensor_of_chunk(of_tensor, map, manifest.bytes);
  });
  check_apart(manifest.tensors);
  return manifest;
}

ChunkManifest read_lent_manifest(Fields& fields) {
  return {.tensors = read_tensors(fields, read_lent_tensor)};
}

}  // namespace rollpack::bridge
