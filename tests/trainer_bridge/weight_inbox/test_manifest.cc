// Manifests: what is read from a good one, and in which words each bad one is refused.
#include "trainer_bridge/weight_inbox/manifest.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "tests/trainer_bridge/wire/sockets.h"

namespace rollpack::bridge {
namespace {

Json tensor(const std::string& name, const Json& shape, int64_t offset, int64_t bytes) {
  return {{"name", name},     {"dtype", "float32"}, {"shape", shape},
          {"offset", offset}, {"bytes", bytes},     {"crc32", 7}};
}

ChunkManifest read(const Json& chunk) {
  Fields fields(chunk, "", "update_weights chunk");
  return read_manifest(fields);
}

TEST(Manifest, IsReadWithCanonicalNames) {
  Json second = tensor("module._orig_mod.module.b", {2}, 64, 4);
  second["dtype"] = "bfloat16";
  const ChunkManifest manifest =
      read({{"bytes", 128}, {"tensors", {tensor("a.weight", {2, 3}, 0, 24), second}}});
  ASSERT_EQ(manifest.tensors.size(), 2u);
  EXPECT_EQ(manifest.bytes, 128);
  EXPECT_EQ(manifest.tensors[0].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(manifest.tensors[0].crc32, 7u);
  EXPECT_EQ(manifest.tensors[1].name, "b");
  EXPECT_EQ(manifest.tensors[1].dtype, DType::kBF16);
}

TEST(Manifest, OnlyPrefixesAreStripped) {
  EXPECT_EQ(canonical_name("_orig_mod.module._orig_mod.x"), "x");
  EXPECT_EQ(canonical_name("model.module.x"), "model.module.x");
  EXPECT_EQ(canonical_name("modulex"), "modulex");
}

struct BadManifest {
  const char* what;
  std::function<void(Json& chunk)> spoil;  // a good one of two tensors
  ErrorCode code;
  const char* field;
  const char* said;  // a part of value, allowed or message
};

std::vector<BadManifest> bad_manifests() {
  constexpr ErrorCode kInvalid = ErrorCode::kInvalidArgument;
  const auto set = [](const char* key, Json value) {
    return [key, value](Json& chunk) { chunk["tensors"][1][key] = value; };
  };
  const auto name = [](const char* text) {
    return [text](Json& chunk) { chunk["tensors"][1]["name"] = text; };
  };
  return {
      {"no bytes", [](Json& c) { c.erase("bytes"); }, kInvalid, "bytes", "missing"},
      {"zero bytes", [](Json& c) { c["bytes"] = 0; }, kInvalid, "bytes", "at least 1"},
      {"no tensors", [](Json& c) { c["tensors"] = Json::array(); }, kInvalid, "tensors",
       "at least one tensor"},
      {"a tensor that is no map", [](Json& c) { c["tensors"][1] = 3; }, kInvalid, "tensors[1]",
       "a map"},
      {"no name", name(""), kInvalid, "tensors[1].name", "printable ASCII"},
      {"only a prefix", name("module."), kInvalid, "tensors[1].name", "printable ASCII"},
      {"a control character", name("a\nb"), kInvalid, "tensors[1].name", "printable ASCII"},
      {"a name of a megabyte", set("name", std::string(1 << 20, 'x')), kInvalid, "tensors[1].name",
       "1 to 512"},
      {"lora_A", name("x.lora_A.default.weight"), ErrorCode::kUnsupported, "tensors[1].name",
       "merge_and_unload"},
      {"lora_B", name("x.lora_B.weight"), ErrorCode::kUnsupported, "tensors[1].name",
       "merge_and_unload"},
      {"base_layer", name("x.base_layer.weight"), ErrorCode::kUnsupported, "tensors[1].name",
       "merge_and_unload"},
      {"an adapter", name("x.adapter.up"), ErrorCode::kUnsupported, "tensors[1].name",
       "merge_and_unload"},
      {"an unknown dtype", set("dtype", "int8"), kInvalid, "tensors[1].dtype",
       "float32, float16, bfloat16"},
      {"no dimensions", set("shape", Json::array()), kInvalid, "tensors[1].shape", "1 to 8"},
      {"nine dimensions", set("shape", Json(std::vector<int>(9, 1))), kInvalid, "tensors[1].shape",
       "1 to 8"},
      {"a dimension of 0", set("shape", {0, 2}), kInvalid, "tensors[1].shape", "positive"},
      {"a negative dimension", set("shape", {-1, 2}), kInvalid, "tensors[1].shape", "positive"},
      {"a fractional dimension", set("shape", {1.5}), kInvalid, "tensors[1].shape", "positive"},
      {"a product that wraps to 4", set("shape", {4194305, 4194305, 211106198978564}), kInvalid,
       "tensors[1].shape", "63 bits"},
      {"bytes that are not the shape's", set("bytes", 12), kInvalid, "tensors[1].bytes",
       "8, the bytes of shape [2] in float32"},
      {"an offset behind the chunk", set("offset", 129), kInvalid, "tensors[1].offset", "0 to 128"},
      {"a negative offset", set("offset", -4), kInvalid, "tensors[1].offset", "0 to 128"},
      {"an end behind the chunk", set("offset", 124), kInvalid, "tensors[1].bytes",
       "at most the 4 bytes behind"},
      {"an odd offset", set("offset", 66), kInvalid, "tensors[1].offset", "a multiple of 4"},
      {"an overlap", set("offset", 20), kInvalid, "offset", "b not to overlap a"},
      {"a name twice", name("a"), kInvalid, "name", "each tensor once"},
      {"a name twice once stripped", name("module.a"), kInvalid, "name", "each tensor once"},
      {"a checksum of 33 bits", set("crc32", 4294967296), kInvalid, "tensors[1].crc32",
       "0 to 4294967295"},
      {"an unknown key", set("stride", 1), kInvalid, "tensors[1].stride", "unknown key"},
  };
}

TEST(Manifest, BadOnesAreRefusedInTheirOwnWords) {
  for (const BadManifest& bad : bad_manifests()) {
    Json chunk = {{"bytes", 128},
                  {"tensors", {tensor("a", {2, 3}, 0, 24), tensor("b", {2}, 64, 8)}}};
    ASSERT_NO_THROW(read(chunk));
    bad.spoil(chunk);
    const ErrorInfo error = error_of([&] { read(chunk); });
    EXPECT_EQ(error.code, bad.code) << bad.what;
    EXPECT_EQ(error.field, bad.field) << bad.what;
    EXPECT_NE(format_error(error).find(bad.said), std::string::npos)
        << bad.what << ": " << format_error(error);
  }
}

Json lent_tensor(const std::string& name, const Json& shape, int64_t address, int64_t bytes) {
  return {{"name", name},
          {"dtype", "float32"},
          {"shape", shape},
          {"bytes", bytes},
          {"address", address}};
}

ChunkManifest read_lent(const Json& chunk) {
  Fields fields(chunk, "", "update_weights chunk");
  ChunkManifest manifest = read_lent_manifest(fields);
  fields.finish();
  return manifest;
}

TEST(Manifest, OfLentTensorsSaysWhereTheyLieAndTheyMayBeTheSameMemory) {
  const ChunkManifest manifest = read_lent(
      {{"tensors", {lent_tensor("module.a", {2, 3}, 4098, 24), lent_tensor("b", {2}, 4098, 8)}}});
  ASSERT_EQ(manifest.tensors.size(), 2u);
  EXPECT_EQ(manifest.tensors[0].name, "a");
  EXPECT_EQ(manifest.tensors[0].address, 4098u);
  EXPECT_EQ(manifest.tensors[1].address, 4098u);
  EXPECT_EQ(manifest.tensors[1].bytes, 8);
}

TEST(Manifest, BadOnesOfLentTensorsAreRefusedInTheirOwnWords) {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  const auto set = [](const char* key, Json value) {
    return [key, value](Json& chunk) { chunk["tensors"][1][key] = value; };
  };
  constexpr ErrorCode kInvalid = ErrorCode::kInvalidArgument;
  const std::vector<BadManifest> all_bad = {
      {"no tensors", [](Json& c) { c["tensors"] = Json::array(); }, kInvalid, "tensors",
       "at least one tensor"},
      {"a size of its own", [](Json& c) { c["bytes"] = 32; }, kInvalid, "bytes", "unknown key"},
      {"an offset", set("offset", 0), kInvalid, "tensors[1].offset", "unknown key"},
      {"no address", [](Json& c) { c["tensors"][1].erase("address"); }, kInvalid,
       "tensors[1].address", "missing"},
      {"address 0", set("address", 0), kInvalid, "tensors[1].address",
       "from 1 to 9223372036854775799"},
      {"an end behind all memory", set("address", kMax - 4), kInvalid, "tensors[1].address",
       "1 to 9223372036854775799"},
      {"bytes that are not the shape's", set("bytes", 12), kInvalid, "tensors[1].bytes",
       "8, the bytes of shape [2] in float32"},
      {"a name twice", set("name", "a"), kInvalid, "name", "each tensor once"},
  };
  for (const BadManifest& bad : all_bad) {
    Json chunk = {
        {"tensors", {lent_tensor("a", {2, 3}, 4096, 24), lent_tensor("b", {2}, 8192, 8)}}};
    ASSERT_NO_THROW(read_lent(chunk));
    bad.spoil(chunk);
    const ErrorInfo error = error_of([&] { read_lent(chunk); });
    EXPECT_EQ(error.code, bad.code) << bad.what;
    EXPECT_EQ(error.field, bad.field) << bad.what;
    EXPECT_NE(format_error(error).find(bad.said), std::string::npos)
        << bad.what << ": " << format_error(error);
  }
}

}  // namespace
}  // namespace rollpack::bridge
