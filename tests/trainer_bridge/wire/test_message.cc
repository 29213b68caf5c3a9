// MessagePack from outside: what is refused, by which words, and what comes through unchanged.
#include "trainer_bridge/wire/message.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

#include "tests/sanitized.h"
#include "tests/trainer_bridge/wire/sockets.h"
#include "trainer_bridge/wire/frame.h"
#include "trainer_bridge/wire/message_scan.h"
#include "trainer_bridge/wire/utf8.h"

namespace rollpack::bridge {
namespace {

using Bytes = std::vector<uint8_t>;

// A map of one key "k" and the value's bytes.
Bytes map_of(const Bytes& value) {
  Bytes bytes(3 + value.size());
  const uint8_t head[] = {0x81, 0xa1, 'k'};
  std::copy(value.begin(), value.end(), std::copy(head, head + 3, bytes.begin()));
  return bytes;
}

Bytes repeated(uint8_t byte, size_t count) {
  return Bytes(count, byte);
}

struct BadMessage {
  const char* what;
  Bytes bytes;
  const char* value;    // a part of what the error quotes
  const char* allowed;  // a part of what it says is right
};

std::vector<BadMessage> bad_messages() {
  Bytes deep_map;
  for (int i = 0; i < 17; ++i) deep_map.insert(deep_map.end(), {0x81, 0xa1, 'k'});
  deep_map.push_back(0xc0);
  Bytes many = {0x81, 0xa1, 'k', 0xdd, 0x00, 0x10, 0x00, 0x01};
  many.insert(many.end(), (size_t{1} << 20) + 1, 0xc0);
  return {
      {"no bytes", {}, "a length of 1 bytes", "at most the 0 bytes left"},
      {"nil", {0xc0}, "no map", "one map"},
      {"an array", {0x90}, "no map", "one map"},
      {"a million nested arrays", repeated(0x91, 1000000), "no map", "one map"},
      {"nested arrays in a map", map_of(repeated(0x91, 1000000)), "nesting deeper than 16",
       "at most 16"},
      {"seventeen maps", deep_map, "nesting deeper than 16", "at most 16"},
      {"array32 of 2^32-1", map_of({0xdd, 0xff, 0xff, 0xff, 0xff}), "4294967295 entries",
       "0 bytes can hold"},
      {"map32 of 2^32-1", map_of({0xdf, 0xff, 0xff, 0xff, 0xff}), "4294967295 entries",
       "0 bytes can hold"},
      {"str32 of 2^32-1", map_of({0xdb, 0xff, 0xff, 0xff, 0xff}), "a length of 4294967295",
       "0 bytes left"},
      {"bin32 of 2^32-1", map_of({0xc6, 0xff, 0xff, 0xff, 0xff}), "a length of 4294967295",
       "0 bytes left"},
      {"ext32", map_of({0xc9, 0xff, 0xff, 0xff, 0xff, 1}), "tag 0xc9", "no extension"},
      {"fixext1", map_of({0xd4, 1, 2}), "tag 0xd4", "no extension"},
      {"a timestamp", map_of({0xd6, 0xff, 0, 0, 0, 0}), "tag 0xd6", "no extension"},
      {"the tag that is never used", map_of({0xc1}), "tag 0xc1", "no extension"},
      {"half an integer", map_of({0xcd, 1}), "a length of 2", "1 bytes left"},
      {"half a double", map_of({0xcb, 0, 0, 0}), "a length of 8", "3 bytes left"},
      {"no value", {0x81, 0xa1, 'k'}, "a length of 1 bytes", "0 bytes left"},
      {"a length cut off", map_of({0xc5, 1}), "a length of 2", "1 bytes left"},
      {"an integer as key", {0x81, 0x01, 0x02}, "no text", "text as keys"},
      {"a map as key", {0x81, 0x80, 0x02}, "no text", "text as keys"},
      {"a repeated key", {0x82, 0xa1, 'k', 1, 0xa1, 'k', 2}, "key \"k\" twice", "each key once"},
      {"a repeated key inside", map_of({0x82, 0xa1, 'k', 1, 0xa1, 'k', 2}), "key \"k\" twice",
       "each key once"},
      {"trailing bytes", {0x80, 0x00}, "1 trailing bytes", "nothing behind"},
      {"two maps", {0x80, 0x80}, "1 trailing bytes", "nothing behind"},
      {"text that is Latin-1", map_of({0xa1, 0xe9}), "not UTF-8", "bin for raw bytes"},
      {"an overlong slash", map_of({0xa2, 0xc0, 0xaf}), "not UTF-8", "UTF-8"},
      {"a surrogate", map_of({0xa3, 0xed, 0xa0, 0x80}), "not UTF-8", "UTF-8"},
      {"a key that is not UTF-8", {0x81, 0xa1, 0xff, 0x01}, "not UTF-8", "UTF-8"},
      {"more than a million values", many, "more than 1048576 values", "travel as bin"},
  };
}

TEST(Message, BadOnesAreRefusedInTheirOwnWords) {
  for (const BadMessage& bad : bad_messages()) {
    const ErrorInfo error = error_of([&] { decode_message(bad.bytes); });
    EXPECT_EQ(error.code, ErrorCode::kInvalidArgument) << bad.what;
    EXPECT_EQ(error.field, "message") << bad.what;
    EXPECT_NE(error.value.find(bad.value), std::string::npos) << bad.what << ": " << error.value;
    EXPECT_NE(error.allowed.find(bad.allowed), std::string::npos)
        << bad.what << ": " << error.allowed;
    EXPECT_EQ(error.origin.substr(0, 5), "byte ") << bad.what;
  }
}

TEST(Message, EveryKindOfValueComesThroughUnchanged) {
  const std::vector<int32_t> ids = {0, -1, 2147483647};
  const Json map = {
      {"nil", nullptr},
      {"booleans", {true, false}},
      {"integers",
       {0, 127, 128, 255, 256, 65535, 65536, 4294967296, 18446744073709551615ull, -1, -32, -33,
        -129, -32769, -2147483649}},
      {"floats", {0.5f, 1.0 / 3.0}},
      {"text", {"", "short", std::string(40, 'x'), std::string(300, 'y'), std::string(70000, 'z')}},
      {"unicode", "\xc3\xa9\xe2\x82\xac\xf0\x9d\x84\x9e"},
      {"bin", to_bin(std::span(ids))},
      {"maps", {{"a", Json::object()}, {"b", {{"c", Json::array()}}}}},
  };
  EXPECT_EQ(decode_message(encode_message(map)), map);
}

TEST(Message, SixteenLevelsAreAccepted) {
  Json value = 1;
  for (int i = 0; i < kMaxMessageDepth; ++i) value = Json{{"k", value}};
  EXPECT_NO_THROW(decode_message(encode_message(value)));
  EXPECT_EQ(error_of([&] {
              decode_message(encode_message({{"k", value}}));
            }).value,
            "nesting deeper than 16");
}

constexpr int kNumMutations = kIsSanitized ? 20000 : 200000;

// What passes the scan must not make the decoder throw or read on: mutate and cut a good message.
TEST(Message, WhatPassesTheScanDecodes) {
  const Json map = {{"verb", "submit"}, {"id", 7}, {"prompts", {{{"n", 3}}, {{"n", -4}}}}};
  const Bytes good = encode_message(map);
  std::mt19937 random(11);
  int num_passed = 0;
  for (int i = 0; i < kNumMutations; ++i) {
    Bytes bytes = good;
    for (int change = 0; change < 1 + i % 3; ++change) {
      bytes[random() % bytes.size()] = static_cast<uint8_t>(random());
    }
    if (i % 4 == 0) bytes.resize(random() % bytes.size());
    try {
      scan_message(bytes);
    } catch (const Error&) {
      continue;
    }
    ++num_passed;
    ASSERT_NO_THROW(Json::from_msgpack(bytes)) << "mutation " << i;
  }
  EXPECT_GT(num_passed, kNumMutations / 200);  // else this test would test nothing
}

TEST(Message, TooBigForAFrameIsAnErrorNamingBothSizes) {
  const Json map = {{"k", std::string(kMaxFrameBytes, 'x')}};
  const ErrorInfo error = error_of([&] { encode_message(map); });
  EXPECT_EQ(error.code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(error.allowed, "at most 16777216 bytes a frame");
}

TEST(Message, AnErrorComesBackAsItWent) {
  const ErrorInfo error = {.code = ErrorCode::kWouldBlock,
                           .field = "a",
                           .value = "b",
                           .origin = "c",
                           .allowed = "d",
                           .message = "e"};
  const ErrorInfo back = error_from_map(decode_message(encode_message(error_to_map(error))));
  EXPECT_EQ(back.code, error.code);
  EXPECT_EQ(format_error(back), format_error(error));
}

TEST(Message, AnErrorThatQuotesRawBytesStillArrives) {
  const ErrorInfo error = {.value = "caf\xe9"};
  EXPECT_EQ(error_from_map(decode_message(encode_message(error_to_map(error)))).value, "caf?");
}

TEST(Utf8, ShortenedCutsBetweenCharacters) {
  EXPECT_EQ(shortened("abcdef", 6), "abcdef");
  EXPECT_EQ(shortened("abcdefg", 6), "abcdef...");
  EXPECT_EQ(shortened("\xe2\x82\xac\xe2\x82\xac", 4), "\xe2\x82\xac...");
}

}  // namespace
}  // namespace rollpack::bridge
