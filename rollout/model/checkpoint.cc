#include "rollout/model/checkpoint.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <utility>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"
#include "rollout/jsonl/strict_json.h"
#include "rollout/model/safetensors.h"

namespace rollpack::rollout {
namespace {

constexpr char kSingleName[] = "model.safetensors";
constexpr char kIndexName[] = "model.safetensors.index.json";
constexpr JsonLimits kIndexLimits = {.max_bytes = size_t{32} << 20, .max_depth = 4};
constexpr size_t kMaxShards = 4096;

namespace fs = std::filesystem;

class SafetensorsCheckpoint : public Checkpoint {
 public:
  explicit SafetensorsCheckpoint(std::vector<SafetensorsFile> files) : files_(std::move(files)) {
    for (size_t file = 0; file < files_.size(); ++file) {
      const std::vector<TensorInfo>& tensors = files_[file].tensors();
      for (size_t i = 0; i < tensors.size(); ++i) {
        tensors_.push_back(tensors[i]);
        places_.push_back({file, i});
      }
    }
  }

  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  void require_readable(size_t index) const override {
    const auto [file, tensor] = places_.at(index);
    files_[file].require_readable(tensor);
  }
  void read(size_t index, int64_t offset, std::span<std::byte> out) const override {
    const auto [file, tensor] = places_.at(index);
    files_[file].read(tensor, offset, out);
  }

 private:
  struct Place {
    size_t file, tensor;
  };

  std::vector<SafetensorsFile> files_;
  std::vector<TensorInfo> tensors_;
  std::vector<Place> places_;  // beside tensors_
};

using WeightMap = std::map<std::string, std::string>;  // tensor -> file

WeightMap read_weight_map(const std::string& index_path) {
  const Json index = read_json_file(index_path, kIndexLimits);
  json_object(index, {"index", index_path});
  // metadata.total_size is not compared: published indexes state it in several meanings.
  const auto map = index.find("weight_map");
  if (map == index.end()) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "weight_map",
                 .origin = index_path,
                 .message = "this key is missing"});
  }
  json_object(*map, {"weight_map", index_path});
  WeightMap weight_map;
  for (const auto& [tensor, value] : map->items()) {
    const JsonPlace place = {fmt::format("weight_map.{}", brief_json(Json(tensor))), index_path};
    const std::string file = json_string(value, place);
    const bool is_plain_name = !file.empty() && file != "." && file != ".." &&
                               file.find('/') == std::string::npos &&
                               file.find('\0') == std::string::npos;
    if (!is_plain_name) {
      fail_json(value, place, "the name of a file in the model's own folder");
    }
    weight_map.emplace(tensor, file);
  }
  return weight_map;
}

// Index and shards must list the same tensors in the same files.
void check_against(const WeightMap& weight_map, const SafetensorsFile& shard,
                   const std::string& shard_name, const std::string& index_path,
                   std::set<std::string>& found) {
  for (const TensorInfo& tensor : shard.tensors()) {
    const auto listed = weight_map.find(tensor.name);
    if (listed == weight_map.end() || listed->second != shard_name) {
      throw Error({.code = ErrorCode::kInvalidArgument,
                   .field = fmt::format("tensor {}", brief_json(Json(tensor.name))),
                   .origin = shard.path(),
                   .allowed = listed == weight_map.end()
                                  ? "a tensor that the index lists"
                                  : fmt::format("this tensor in {}", listed->second),
                   .message = fmt::format("as {} has it", index_path)});
    }
    found.insert(tensor.name);
  }
}

std::vector<SafetensorsFile> open_shards(const fs::path& folder) {
  const std::string index_path = (folder / kIndexName).string();
  const WeightMap weight_map = read_weight_map(index_path);
  std::set<std::string> shard_names;
  for (const auto& [tensor, file] : weight_map) shard_names.insert(file);
  if (shard_names.empty() || shard_names.size() > kMaxShards) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "weight_map",
                 .value = fmt::format("{} files", shard_names.size()),
                 .origin = index_path,
                 .allowed = fmt::format("1 to {} files", kMaxShards)});
  }
  std::vector<SafetensorsFile> shards;
  std::set<std::string> found;
  for (const std::string& name : shard_names) {
    if (!fs::exists(folder / name)) {
      throw Error({.code = ErrorCode::kNotFound,
                   .field = "weight_map",
                   .value = name,
                   .origin = index_path,
                   .message = fmt::format("there is no such file in {}", folder.string())});
    }
    shards.emplace_back((folder / name).string());
    check_against(weight_map, shards.back(), name, index_path, found);
  }
  for (const auto& [tensor, file] : weight_map) {
    if (found.contains(tensor)) continue;
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = fmt::format("weight_map.{}", brief_json(Json(tensor))),
                 .value = file,
                 .origin = index_path,
                 .message = "that file does not hold this tensor"});
  }
  return shards;
}

}  // namespace

std::unique_ptr<Checkpoint> open_checkpoint(const std::string& folder) {
  std::vector<SafetensorsFile> files;
  // As transformers does: the single file wins where both are there.
  if (fs::exists(fs::path(folder) / kSingleName)) {
    files.emplace_back((fs::path(folder) / kSingleName).string());
  } else if (fs::exists(fs::path(folder) / kIndexName)) {
    files = open_shards(folder);
  } else {
    throw Error({.code = ErrorCode::kNotFound,
                 .field = "model.path",
                 .value = folder,
                 .allowed = fmt::format("a folder with {} or {}", kSingleName, kIndexName),
                 .message = "other formats are converted by save_pretrained() of transformers"});
  }
  return std::make_unique<SafetensorsCheckpoint>(std::move(files));
}

uint32_t checkpoint_digest(const Checkpoint& checkpoint) {
  constexpr int64_t kSampleBytes = 2048;
  uint32_t digest = 0;
  for (size_t i = 0; i < checkpoint.tensors().size(); ++i) {
    const TensorInfo& tensor = checkpoint.tensors()[i];
    const std::string head =
        fmt::format("{} {} [{}]", tensor.name, tensor.file_dtype, fmt::join(tensor.shape, ", "));
    digest = crc32_of(std::as_bytes(std::span(head)), digest);
    if (!tensor.is_readable) continue;
    std::vector<std::byte> bytes(static_cast<size_t>(std::min(kSampleBytes, tensor.bytes)));
    for (const int64_t offset : {int64_t{0}, tensor.bytes - static_cast<int64_t>(bytes.size())}) {
      checkpoint.read(i, offset, bytes);
      digest = crc32_of(bytes, digest);
    }
  }
  return digest;
}

}  // namespace rollpack::rollout
