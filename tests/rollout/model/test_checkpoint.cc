#include "rollout/model/checkpoint.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "tests/error_text.h"
#include "tests/rollout/model/safetensors_bytes.h"
#include "tests/rollout/temporary_folder.h"

namespace rollpack::rollout {
namespace {

using testing::error_text;
using testing::safetensors_bytes;
using testing::TemporaryFolder;
using testing::with_replaced;

// A file with one F32 vector of 1.
std::string one_tensor(const std::string& name) {
  return safetensors_bytes(
      "{\"" + name + "\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4);
}

constexpr char kIndex[] = "model.safetensors.index.json";

// A folder with shards 1 (tensor a) and 2 (tensor b) and this index; the error of opening it.
std::string index_error(const std::string& index) {
  const TemporaryFolder folder;
  folder.write("1.safetensors", one_tensor("a"));
  folder.write("2.safetensors", one_tensor("b"));
  folder.write(kIndex, index);
  return with_replaced(error_text([&] { open_checkpoint(folder.path()); }), folder.path(), "DIR");
}

TEST(Checkpoint, OneFileIsRead) {
  const TemporaryFolder folder;
  folder.write("model.safetensors", one_tensor("a"));
  const auto checkpoint = open_checkpoint(folder.path());
  ASSERT_EQ(checkpoint->tensors().size(), 1u);
  std::vector<std::byte> buffer(4);
  checkpoint->read(0, 0, buffer);
  EXPECT_EQ(buffer,
            (std::vector<std::byte>{std::byte(0), std::byte(1), std::byte(2), std::byte(3)}));
}

// Folders of the Hugging Face cache hold links into a folder of blobs.
TEST(Checkpoint, ALinkToAFileIsFollowed) {
  const TemporaryFolder folder, blobs;
  const std::string blob = blobs.write("blob", one_tensor("a"));
  std::filesystem::create_symlink(blob, folder.file("model.safetensors"));
  EXPECT_EQ(open_checkpoint(folder.path())->tensors().size(), 1u);
}

TEST(Checkpoint, ShardsAreReadInTheOrderOfTheirNames) {
  const TemporaryFolder folder;
  folder.write("2.safetensors", one_tensor("a"));
  folder.write("1.safetensors", one_tensor("b"));
  folder.write(kIndex, R"({"metadata":{"total_size":8},)"
                       R"("weight_map":{"a":"2.safetensors","b":"1.safetensors"}})");
  const auto checkpoint = open_checkpoint(folder.path());
  ASSERT_EQ(checkpoint->tensors().size(), 2u);
  EXPECT_EQ(checkpoint->tensors()[0].name, "b");
  EXPECT_EQ(checkpoint->tensors()[1].name, "a");
  std::vector<std::byte> buffer(2);
  checkpoint->read(1, 2, buffer);
  EXPECT_EQ(buffer, (std::vector<std::byte>{std::byte(2), std::byte(3)}));
}

TEST(Checkpoint, AnIndexThatDisagreesWithItsShardsIsRefused) {
  const std::string ab = R"("a":"1.safetensors","b":"2.safetensors")";
  EXPECT_EQ(index_error("{\"weight_map\":{" + ab + "}}"), "no error");
  EXPECT_EQ(index_error("{}"),
            "invalid_argument: weight_map (DIR/model.safetensors.index.json): this key is missing");
  EXPECT_EQ(
      index_error("{\"weight_map\":{}}"),
      "invalid_argument: weight_map = 0 files (DIR/model.safetensors.index.json): expected 1 to "
      "4096 files");
  EXPECT_EQ(
      index_error("{\"weight_map\":{" + ab + ",\"a\":\"2.safetensors\"}}"),
      "invalid_argument: a (DIR/model.safetensors.index.json): expected each key once; this key "
      "is repeated in its object");
  EXPECT_EQ(index_error("{\"weight_map\":{" + ab + ",\"c\":\"3.safetensors\"}}"),
            "not_found: weight_map = 3.safetensors (DIR/model.safetensors.index.json): there is no "
            "such file in DIR");
  EXPECT_EQ(
      index_error("{\"weight_map\":{" + ab + ",\"c\":\"2.safetensors\"}}"),
      "invalid_argument: weight_map.\"c\" = 2.safetensors (DIR/model.safetensors.index.json): "
      "that file does not hold this tensor");
  EXPECT_EQ(index_error(R"({"weight_map":{"a":"2.safetensors","b":"1.safetensors"}})"),
            "invalid_argument: tensor \"a\" (DIR/1.safetensors): expected this tensor in "
            "2.safetensors; as DIR/model.safetensors.index.json has it");
  EXPECT_EQ(index_error(R"({"weight_map":{"a":"1.safetensors","z":"2.safetensors"}})"),
            "invalid_argument: tensor \"b\" (DIR/2.safetensors): expected a tensor that the index "
            "lists; as DIR/model.safetensors.index.json has it");
}

TEST(Checkpoint, AnIndexCannotPointOutOfItsFolder) {
  for (const char* file : {"../1.safetensors", "/etc/passwd", "sub/1.safetensors", "..", ".", ""}) {
    EXPECT_EQ(
        index_error(std::string("{\"weight_map\":{\"a\":\"") + file + "\"}}"),
        std::string("invalid_argument: weight_map.\"a\" = \"") + file +
            "\" (DIR/model.safetensors.index.json): expected the name of a file in the model's "
            "own folder");
  }
}

TEST(Checkpoint, AFolderWithoutWeightsSaysWhatIsLookedFor) {
  const TemporaryFolder folder;
  EXPECT_EQ(error_text([&] { open_checkpoint(folder.path()); }),
            "not_found: model.path = " + folder.path() +
                ": expected a folder with model.safetensors or model.safetensors.index.json; other "
                "formats are converted by save_pretrained() of transformers");
}

}  // namespace
}  // namespace rollpack::rollout
