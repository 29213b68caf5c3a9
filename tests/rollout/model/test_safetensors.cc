#include "rollout/model/safetensors.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <string>
#include <vector>

#include "tests/error_text.h"
#include "tests/rollout/model/safetensors_bytes.h"
#include "tests/rollout/temporary_folder.h"

namespace rollpack::rollout {
namespace {

using testing::error_text;
using testing::header_size_bytes;
using testing::safetensors_bytes;
using testing::TemporaryFolder;
using testing::with_replaced;

// The error of opening a file of these bytes, its path replaced by "FILE".
std::string open_error(const std::string& bytes) {
  const TemporaryFolder folder;
  const std::string path = folder.write("x.safetensors", bytes);
  return with_replaced(error_text([&] { SafetensorsFile file(path); }), path, "FILE");
}

// The error of a file with one tensor "a" of these members.
std::string tensor_error(const std::string& members, size_t data_bytes = 8) {
  return open_error(safetensors_bytes("{\"a\":{" + members + "}}", data_bytes));
}

TEST(Safetensors, TensorsComeInTheOrderOfTheirBytes) {
  const TemporaryFolder folder;
  const std::string path = folder.write(
      "x.safetensors",
      safetensors_bytes(R"({"__metadata__":{"format":"pt"},)"
                        R"("a":{"dtype":"F32","shape":[1,2],"data_offsets":[6,14]},)"
                        R"("b":{"dtype":"BF16","shape":[3],"data_offsets":[0,6]},)"
                        R"("s":{"dtype":"F16","shape":[],"data_offsets":[14,16]},)"
                        R"("e":{"dtype":"F32","shape":[0,4],"data_offsets":[14,14]}}  )",
                        16));
  const SafetensorsFile file(path);
  ASSERT_EQ(file.tensors().size(), 4u);
  std::vector<std::string> names;
  for (const TensorInfo& tensor : file.tensors()) names.push_back(tensor.name);
  EXPECT_EQ(names, (std::vector<std::string>{"b", "a", "e", "s"}));
  EXPECT_EQ(file.tensors()[0].dtype, DType::kBF16);
  EXPECT_EQ(file.tensors()[1].shape, (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(file.tensors()[1].bytes, 8);

  std::vector<std::byte> buffer(8);
  file.read(1, 0, buffer);
  for (size_t i = 0; i < 8; ++i) EXPECT_EQ(buffer[i], std::byte(6 + i));
  file.read(1, 5, std::span(buffer).first(3));
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(buffer[i], std::byte(11 + i));
  file.read(2, 0, {});
  EXPECT_NE(error_text([&] { file.read(1, 1, buffer); }).find("bytes [1, 9) of a tensor of 8"),
            std::string::npos);
}

TEST(Safetensors, OtherDTypesAreListedButRefusedWhenRead) {
  const TemporaryFolder folder;
  const std::string path =
      folder.write("x.safetensors",
                   safetensors_bytes(R"({"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]},)"
                                     R"("q":{"dtype":"F4","shape":[3,2],"data_offsets":[4,7]}})",
                                     7));
  const SafetensorsFile file(path);
  EXPECT_FALSE(file.tensors()[0].is_readable);
  EXPECT_EQ(file.tensors()[0].file_dtype, "F8_E4M3");
  EXPECT_EQ(file.tensors()[1].bytes, 3);
  EXPECT_EQ(with_replaced(error_text([&] { file.read(0, 0, {}); }), path, "FILE"),
            "unsupported: tensor \"w\".dtype = F8_E4M3 (FILE): expected one of F32, F16, BF16; "
            "quantized weights are another policy than the one that is trained, with other "
            "log-probabilities; dequantize them to bfloat16 first");
}

TEST(Safetensors, EveryQuantizedDtypeIsRefusedByName) {
  const TemporaryFolder folder;
  for (const std::string dtype : {"I8", "U8", "I32", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F4"}) {
    const std::string bytes = dtype == "I32" ? "8" : dtype == "F4" ? "1" : "2";
    const std::string path = folder.write(
        dtype, safetensors_bytes(R"({"w":{"dtype":")" + dtype +
                                     R"(","shape":[2],"data_offsets":[0,)" + bytes + "]}}",
                                 std::stoul(bytes)));
    const SafetensorsFile file(path);
    EXPECT_EQ(with_replaced(error_text([&] { file.require_readable(0); }), path, "FILE"),
              "unsupported: tensor \"w\".dtype = " + dtype +
                  " (FILE): expected one of F32, F16, BF16; quantized weights are another policy "
                  "than the one that is trained, with other log-probabilities; dequantize them to "
                  "bfloat16 first");
  }
}

TEST(Safetensors, BadFilesNameWhatIsWrong) {
  const std::string json = "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}";
  const std::string size_range =
      " (FILE): expected 2 to 33554432 bytes; is this a safetensors file?";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "data_loss: file size = 0 bytes (FILE): expected at least 8 bytes"},
      {"1234567", "data_loss: file size = 7 bytes (FILE): expected at least 8 bytes"},
      {header_size_bytes(0), "invalid_argument: header size = 0" + size_range},
      {header_size_bytes(1) + "{", "invalid_argument: header size = 1" + size_range},
      {header_size_bytes(uint64_t{1} << 63),
       "invalid_argument: header size = 9223372036854775808" + size_range},
      {header_size_bytes(~uint64_t{0}),
       "invalid_argument: header size = 18446744073709551615" + size_range},
      {header_size_bytes(100000001), "invalid_argument: header size = 100000001" + size_range},
      {header_size_bytes(50) + "{}",
       "data_loss: header size = 50 (FILE): expected at most the 2 bytes that follow it; the file "
       "is "
       "cut short"},
      {safetensors_bytes(" " + json, 8),
       "invalid_argument: header (FILE): expected a JSON object, from its first byte on"},
      {safetensors_bytes("[1]", 0),
       "invalid_argument: header (FILE): expected a JSON object, from its first byte on"},
      {safetensors_bytes(json + std::string(1, '\0'), 8),
       "invalid_argument: FILE: expected valid JSON; byte 54 is NUL"},
      {safetensors_bytes("{\"a\":{\"dtype\":\"F\xFF\"}}", 0),
       "invalid_argument: FILE: expected valid JSON; syntax error while parsing value - invalid "
       "string: ill-formed UTF-8 byte; last read: '\"F\xFF'"},
      {safetensors_bytes("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
                         "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}",
                         8),
       "invalid_argument: a (FILE): expected each key once; this key is repeated in its object"},
      {safetensors_bytes(json, 7),
       "data_loss: data = 7 bytes (FILE): expected 8 bytes, as the header says; the file is cut "
       "short"},
      {safetensors_bytes(json, 9),
       "data_loss: data = 9 bytes (FILE): expected 8 bytes, as the header says; bytes follow the "
       "last "
       "tensor"},
      {safetensors_bytes("{\"__metadata__\":{\"n\":1}}", 0),
       "invalid_argument: __metadata__.\"n\" = 1 (FILE): expected a string"},
      {safetensors_bytes("{\"__metadata__\":[]}", 0),
       "invalid_argument: __metadata__ = [] (FILE): expected a JSON object"},
      {safetensors_bytes("{\"a\":[[[1]]]}", 0),
       "invalid_argument: FILE: expected JSON of at most 3 nested objects and arrays"},
      {safetensors_bytes("{\"a\":3}", 0),
       "invalid_argument: tensor \"a\" = 3 (FILE): expected a JSON object"},
      {safetensors_bytes("{\"\":" + json.substr(5), 8),
       "invalid_argument: tensor \"\" (FILE): expected a name of 1 to 1024 bytes without control "
       "characters"},
      {safetensors_bytes("{\"x\\u0000y\":" + json.substr(5), 8),
       "invalid_argument: tensor \"x\\u0000y\" (FILE): expected a name of 1 to 1024 bytes without "
       "control characters"},
      {safetensors_bytes("{\"" + std::string(1000000, 'n') + "\":" + json.substr(5), 8),
       "invalid_argument: tensor \"" + std::string(59, 'n') +
           "... (FILE): expected a name of 1 to 1024 bytes without control characters"},
  };
  for (const auto& [bytes, error] : cases) EXPECT_EQ(open_error(bytes), error);
}

TEST(Safetensors, BadTensorsNameThemselvesAndWhatIsAllowed) {
  const std::string offsets = "\"data_offsets\":[0,8]";
  const std::string offset_range = " (FILE): expected an integer of at least 0";
  const std::string a = "invalid_argument: tensor \"a\"";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"\"dtype\":\"F32\",\"shape\":[2]",
       a + " (FILE): expected dtype, shape and data_offsets; data_offsets is missing"},
      {"\"dtype\":\"F32\",\"shape\":[2],\"x\":1," + offsets,
       a + " = {\"data_offsets\":[0,8],\"dtype\":\"F32\",\"shape\":[2],\"x\":1} (FILE): expected "
           "dtype, shape and data_offsets, no more"},
      {"\"dtype\":\"Q4\",\"shape\":[2]," + offsets,
       a + ".dtype = \"Q4\" (FILE): expected a dtype of the safetensors format"},
      {"\"dtype\":7,\"shape\":[2]," + offsets, a + ".dtype = 7 (FILE): expected a string"},
      {"\"dtype\":\"F32\",\"shape\":2," + offsets, a + ".shape = 2 (FILE): expected a list"},
      {"\"dtype\":\"F32\",\"shape\":[-2]," + offsets, a + ".shape = -2" + offset_range},
      {"\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,2]," + offsets,
       a + ".shape = [1,1,1,1,1,1,1,1,2] (FILE): expected at most 8 dimensions"},
      {"\"dtype\":\"F32\",\"shape\":[3]," + offsets,
       a + ".data_offsets = [0,8] (FILE): expected 12 bytes: [3] of F32; they span 8"},
      {"\"dtype\":\"F32\",\"shape\":[0]," + offsets,
       a + ".data_offsets = [0,8] (FILE): expected 0 bytes: [0] of F32; they span 8"},
      {"\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,2]",
       a + ".shape = [3] (FILE): expected a whole number of bytes below 2^60; of F4"},
      // 4 modulo 2^64: the product of an exploit of another reader.
      {"\"dtype\":\"F32\",\"shape\":[4194305,4194305,211106198978564],\"data_offsets\":[0,16]",
       a + ".shape = [4194305,4194305,211106198978564] (FILE): expected a whole number of bytes "
           "below "
           "2^60; of F32"},
      {"\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,-1]",
       a + ".data_offsets = -1" + offset_range},
      {"\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8.0]",
       a + ".data_offsets = 8.0" + offset_range},
      {"\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[\"0\",8]",
       a + ".data_offsets = \"0\"" + offset_range},
      {"\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,18446744073709551615]",
       a + ".data_offsets = 18446744073709551615" + offset_range},
      {"\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,18446744073709551616]",
       "invalid_argument: data_offsets = 18446744073709551616 (FILE): expected an integer of at "
       "most "
       "64 bits"},
      {"\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]",
       a + ".data_offsets = [8,0] (FILE): expected begin not above end"},
      {"\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,16]",
       a + ".data_offsets = [0,8,16] (FILE): expected a list of two, [begin, end]"},
      {"\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]",
       a + ".data_offsets = [4,12] (FILE): expected a begin of 0; there is a hole before it"},
      {"\"dtype\":\"U8\",\"shape\":[9223372036854775807],\"data_offsets\":[0,9223372036854775807]",
       a + ".shape = [9223372036854775807] (FILE): expected a whole number of bytes below 2^60; of "
           "U8"},
  };
  for (const auto& [members, error] : cases) EXPECT_EQ(tensor_error(members), error);
}

TEST(Safetensors, OverlapsAndHolesNameTheSecondTensor) {
  const auto two = [](const std::string& begin_of_b, const std::string& end_of_b) {
    return open_error(
        safetensors_bytes("{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
                          "\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[" +
                              begin_of_b + "," + end_of_b + "]}}",
                          8));
  };
  EXPECT_EQ(two("4", "8"), "no error");
  EXPECT_EQ(two("3", "7"),
            "invalid_argument: tensor \"b\".data_offsets = [3,7] (FILE): expected a begin of 4; it "
            "overlaps the tensor before it");
  EXPECT_EQ(two("0", "4"),
            "invalid_argument: tensor \"b\".data_offsets = [0,4] (FILE): expected a begin of 4; it "
            "overlaps the tensor before it");
  EXPECT_EQ(
      two("5", "9"),
      "invalid_argument: tensor \"b\".data_offsets = [5,9] (FILE): expected a begin of 4; there "
      "is a hole before it");
}

TEST(Safetensors, TooManyTensorsAreRefused) {
  std::string header = "{";
  for (int i = 0; i <= 100000; ++i) {
    header.append(i == 0 ? "\"" : ",\"").append(std::to_string(i));
    header += "\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}";
  }
  EXPECT_EQ(open_error(safetensors_bytes(header + "}", 0)),
            "invalid_argument: number of tensors = 100001 (FILE): expected at most 100000");
}

TEST(Safetensors, AFileThatShrinksWhileOpenIsAnErrorNotASignal) {
  const TemporaryFolder folder;
  const std::string header = "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}";
  const std::string path = folder.write("x.safetensors", safetensors_bytes(header, 8));
  const SafetensorsFile file(path);
  std::filesystem::resize_file(path, 8 + header.size() + 3);
  std::vector<std::byte> buffer(4);
  EXPECT_EQ(
      with_replaced(error_text([&] { file.read(0, 2, buffer); }), path, "FILE"),
      "data_loss: tensor \"a\" = 3 bytes (FILE): expected 8 bytes; the file became shorter after "
      "it was opened");
}

TEST(Safetensors, NamesAreNamesAndNeverPaths) {
  const TemporaryFolder folder;
  const std::string path =
      folder.write("x.safetensors",
                   safetensors_bytes(
                       "{\"../../a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1));
  EXPECT_EQ(SafetensorsFile(path).tensors().at(0).name, "../../a");
}

// Two tensors, the second of 2,000 bytes.
std::string two_tensors() {
  return safetensors_bytes(
      "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
      "\"b\":{\"dtype\":\"BF16\",\"shape\":[10,100],\"data_offsets\":[8,2008]}}",
      2008);
}

TEST(Safetensors, AFileCutAtAnyByteIsRefused) {
  const TemporaryFolder folder;
  const std::string whole = two_tensors();
  const std::string path = folder.write("x.safetensors", whole);
  const auto open = [&] { SafetensorsFile file(path); };
  ASSERT_EQ(error_text(open), "no error");
  for (size_t bytes = whole.size(); bytes-- > 0;) {
    std::filesystem::resize_file(path, bytes);
    const std::string error = error_text(open);
    ASSERT_EQ(error.substr(0, 11), "data_loss: ") << bytes << " bytes: " << error;
  }
}

// A flipped bit may turn one header into another that holds (a name, say); what is opened then has
// tensors inside its file all the same.
TEST(Safetensors, AnyBitOfSizeOrHeaderFlippedIsRefusedOrStillHolds) {
  const std::string whole = two_tensors();
  const size_t header_end = whole.size() - 2008;
  const TemporaryFolder folder;
  int num_refused = 0;
  for (size_t bit = 0; bit < 8 * header_end; ++bit) {
    std::string bytes = whole;
    bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ 1 << bit % 8);
    const std::string path = folder.write("x.safetensors", bytes);
    const std::string error = error_text([&] {
      const SafetensorsFile file(path);
      int64_t total = 0;
      for (const TensorInfo& tensor : file.tensors()) total += tensor.bytes;
      ASSERT_EQ(total, 2008) << "bit " << bit;
    });
    num_refused += error != "no error";
    ASSERT_EQ(error.find("internal"), std::string::npos) << "bit " << bit << ": " << error;
  }
  EXPECT_GT(num_refused, static_cast<int>(header_end) * 6);
}

TEST(Safetensors, WhatIsNoRegularFileIsRefusedAtOnce) {
  const TemporaryFolder folder;
  const std::string fifo = folder.file("fifo");
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_EQ(error_text([&] { SafetensorsFile file(fifo); }),
            "invalid_argument: weights = " + fifo + ": expected a regular file; this is a FIFO");
  EXPECT_EQ(error_text([] { SafetensorsFile file("/dev/zero"); }),
            "invalid_argument: weights = /dev/zero: expected a regular file; this is a device");
  std::filesystem::create_symlink("nowhere", folder.file("dangling"));
  EXPECT_EQ(error_text([&] { SafetensorsFile file(folder.file("dangling")); }),
            "not_found: weights = " + folder.file("dangling") +
                ": cannot be opened: No such file or directory");
}

}  // namespace
}  // namespace rollpack::rollout
