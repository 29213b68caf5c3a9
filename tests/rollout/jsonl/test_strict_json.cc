#include "rollout/jsonl/strict_json.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/error_text.h"
#include "tests/rollout/temporary_folder.h"

namespace rollpack::rollout {
namespace {

using testing::error_text;

constexpr JsonLimits kLimits = {.max_bytes = 1000, .max_depth = 3};

TEST(StrictJson, ReadsWhatNlohmannReads) {
  const std::string text = R"({"a":[1,-2,3.5,true,null,"x\u00e9"],"b":{"c":18446744073709551615}})";
  EXPECT_EQ(parse_json(text, "f", kLimits), Json::parse(text));
}

TEST(StrictJson, BadTextNamesPlaceAndReason) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"{\"a\": 1, \"a\": 2}",
       "a (f:3): expected each key once; this key is repeated in its object"},
      {"{\"x\": {\"a\": 1, \"b\": 2, \"a\": 1}}",
       "a (f:3): expected each key once; this key is repeated in its object"},
      {"[[[[1]]]]", "f:3: expected JSON of at most 3 nested objects and arrays"},
      {"{\"a\": 18446744073709551616}",
       "a = 18446744073709551616 (f:3): expected an integer of at most 64 bits"},
      {"{\"a\": -9223372036854775809}",
       "a = -9223372036854775809 (f:3): expected an integer of at most 64 bits"},
      {"[1e400]", "f:3: expected valid JSON; number overflow parsing '1e400'"},
      {"\xEF\xBB\xBF{}", "f:3: expected JSON without a byte-order mark; save it as plain UTF-8"},
      {std::string("{}\0", 3), "f:3: expected valid JSON; byte 2 is NUL"},
      {"{} {}",
       "f:3: expected valid JSON; syntax error while parsing value - unexpected '{'; expected end "
       "of "
       "input"},
      {"{\"a\": NaN}",
       "f:3: expected valid JSON; syntax error while parsing value - invalid literal; last read: "
       "'\"a\": N'"},
      {"[1,]",
       "f:3: expected valid JSON; syntax error while parsing value - unexpected ']'; expected '[', "
       "'{', or a literal"},
      {"// no\n{}",
       "f:3: expected valid JSON; syntax error while parsing value - invalid literal; last read: "
       "'/'"},
      {"[\"\xC3\x28\"]",
       "f:3: expected valid JSON; syntax error while parsing value - invalid string: ill-formed "
       "UTF-8 byte; last read: '\"\xC3\x28'"},
      {std::string(1001, ' '), "f:3: expected JSON of at most 1000 bytes; this has 1001"},
  };
  for (const auto& [text, error] : cases) {
    EXPECT_EQ(error_text([&, &json = text] { parse_json(json, "f:3", kLimits); }),
              "invalid_argument: " + error);
  }
}

TEST(StrictJson, AMillionOpenBracketsAreAnErrorNotACrash) {
  const JsonLimits limits = {.max_bytes = 2000000, .max_depth = 16};
  EXPECT_EQ(error_text([&] { parse_json(std::string(1000000, '['), "f", limits); }),
            "invalid_argument: f: expected JSON of at most 16 nested objects and arrays");
}

TEST(StrictJson, FilesNameTheLineOfASyntaxError) {
  const testing::TemporaryFolder folder;
  const std::string path = folder.write("x.json", "{\n  \"a\": 1,\n  \"b\" 2\n}\n");
  EXPECT_EQ(error_text([&] { read_json_file(path, kLimits); }),
            "invalid_argument: " + path +
                ":3: expected valid JSON; syntax error while parsing object separator - unexpected "
                "number literal; expected ':'");
}

// nlohmann's own get<>() would turn these into 18446744073709551615, 1, 0 and 44.
TEST(StrictJson, IntegersThatDoNotFitAreErrorsNotOtherIntegers) {
  const JsonPlace place = {"key", "f:1"};
  const auto integer = [&](const char* text) {
    return error_text([&] { json_integer(Json::parse(text), place, 0, 255); });
  };
  EXPECT_EQ(json_integer(Json::parse("255"), place, 0, 255), 255);
  for (const char* text : {"-1", "1.5", "300", "1.0", "\"8\"", "true", "18446744073709551615"}) {
    EXPECT_EQ(integer(text), std::string("invalid_argument: key = ") + text +
                                 " (f:1): expected an integer from 0 to 255");
  }
  EXPECT_EQ(error_text([&] { json_unsigned(Json::parse("-1"), place); }),
            "invalid_argument: key = -1 (f:1): expected an integer from 0 to 2^64 - 1");
  EXPECT_EQ(
      error_text([&] { json_int32_list(Json::parse("[1, 2147483648]"), place, 0, 2147483647); }),
      "invalid_argument: key[1] = 2147483648 (f:1): expected an integer from 0 to 2147483647");
}

TEST(StrictJson, ShownValuesAreCutAtACharacter) {
  const Json text = std::string(58, 'a') + "\xC3\xA9\xC3\xA9";
  EXPECT_EQ(brief_json(text), "\"" + std::string(58, 'a') + "...");
}

}  // namespace
}  // namespace rollpack::rollout
