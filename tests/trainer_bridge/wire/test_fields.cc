// Reading a map: right values come as they are, wrong ones name field, value, origin and range.
#include "trainer_bridge/wire/fields.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>

#include "tests/trainer_bridge/wire/sockets.h"

namespace rollpack::bridge {
namespace {

TEST(Fields, RightValuesComeAsTheyAre) {
  const std::vector<int32_t> ids = {5, -6};
  const std::vector<float> floats = {0.5f};
  const Json map = {{"i", -3},
                    {"u", 18446744073709551615ull},
                    {"f", 2},
                    {"b", true},
                    {"t", "text"},
                    {"m", Json::object()},
                    {"nil", nullptr},
                    {"ids", to_bin(std::span(ids))},
                    {"floats", to_bin(std::span(floats))},
                    {"mode", "wait"},
                    {"a", {1, 2}}};
  Fields fields(map, "", "test");
  EXPECT_EQ(fields.integer("i", -3, 3), -3);
  EXPECT_EQ(fields.u64("u"), 18446744073709551615ull);
  EXPECT_EQ(fields.optional_number("f"), 2.0);
  EXPECT_EQ(fields.optional_boolean("b"), true);
  EXPECT_EQ(fields.text("t"), "text");
  EXPECT_NE(fields.optional_map("m"), nullptr);
  EXPECT_EQ(fields.optional_i32("nil"), std::nullopt);
  EXPECT_EQ(fields.optional_i32("absent"), std::nullopt);
  EXPECT_EQ(fields.i32s("ids"), ids);
  EXPECT_EQ(fields.f32s("floats"), floats);
  EXPECT_EQ(fields.one_of("mode", {"keep", "wait"}), 1u);
  EXPECT_EQ(fields.array("a").size(), 2u);
  EXPECT_NO_THROW(fields.finish());
}

struct BadField {
  Json value;
  std::function<void(Fields&)> read;
  const char* quoted;
  const char* allowed;
};

std::vector<BadField> bad_fields() {
  const auto i32 = [](Fields& f) { f.optional_i32("k"); };
  const auto count = [](Fields& f) { f.integer("k", 1, std::numeric_limits<int64_t>::max()); };
  const auto u64 = [](Fields& f) { f.u64("k"); };
  const auto number = [](Fields& f) { f.optional_number("k"); };
  const auto ids = [](Fields& f) { f.i32s("k"); };
  return {
      {2147483648, i32, "2147483648", "an integer from -2147483648 to 2147483647"},
      {18446744073709551615ull, count, "18446744073709551615", "an integer of at least 1"},
      {0, count, "0", "an integer of at least 1"},
      {1.0, count, "1.0", "an integer of at least 1"},
      {"7", count, "\"7\"", "an integer of at least 1"},
      {true, count, "true", "an integer of at least 1"},
      {-1, u64, "-1", "an integer from 0 to 18446744073709551615"},
      {1.5, u64, "1.5", "an integer from 0 to"},
      {"x", number, "\"x\"", "a finite number"},
      {std::numeric_limits<double>::quiet_NaN(), number, "null", "a finite number"},
      {std::numeric_limits<double>::infinity(), number, "null", "a finite number"},
      {1, [](Fields& f) { f.optional_boolean("k"); }, "1", "true or false"},
      {1, [](Fields& f) { f.text("k"); }, "1", "text"},
      {Json::array({1}), [](Fields& f) { f.optional_map("k"); }, "an array of 1", "a map"},
      {Json::object(), [](Fields& f) { f.array("k"); }, "a map of 0", "an array"},
      {"Keep",
       [](Fields& f) {
         f.one_of("k", {"keep", "wait"});
       },
       "\"Keep\"", "one of keep, wait"},
      {Json::array({1, 2}), ids, "an array of 2", "bin of little-endian i32, a multiple of 4"},
      {Json::binary({1, 2, 3}), ids, "3 bytes of bin", "a multiple of 4 bytes"},
      {Json::binary({1}), [](Fields& f) { f.f32s("k"); }, "1 bytes of bin", "little-endian f32"},
  };
}

TEST(Fields, WrongValuesNameFieldValueOriginAndWhatIsAllowed) {
  for (const BadField& bad : bad_fields()) {
    const Json map = {{"k", bad.value}};
    Fields fields(map, "prompts[3]", "submit");
    const ErrorInfo error = error_of([&] { bad.read(fields); });
    EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(error.field, "prompts[3].k");
    EXPECT_EQ(error.value, bad.quoted);
    EXPECT_EQ(error.origin, "submit");
    EXPECT_NE(error.allowed.find(bad.allowed), std::string::npos) << error.allowed;
  }
}

TEST(Fields, AMissingOneIsNamed) {
  const Json map = {{"nil", nullptr}};
  Fields fields(map, "", "release");
  for (const char* key : {"slot", "nil"}) {
    const ErrorInfo error = error_of([&] { fields.integer(key, 0, 9); });
    EXPECT_EQ(error.field, key);
    EXPECT_EQ(error.message, "missing");
  }
}

TEST(Fields, AnUnknownKeyNamesTheNearestKnownOne) {
  const Json map = {{"temperatur", 1}};
  Fields fields(map, "sampling", "submit");
  fields.optional_number("top_p");
  fields.optional_number("temperature");
  const ErrorInfo error = error_of([&] { fields.finish(); });
  EXPECT_EQ(error.field, "sampling.temperatur");
  EXPECT_EQ(error.allowed, "one of top_p, temperature");
  EXPECT_EQ(error.message, "unknown key; did you mean temperature?");
}

TEST(Fields, OfSomethingElseThanAMapSayWhatItIs) {
  const Json value = Json::array({1});
  EXPECT_EQ(error_of([&] { Fields(value, "prompts[0]", "submit"); }).value, "an array of 1");
}

}  // namespace
}  // namespace rollpack::bridge
