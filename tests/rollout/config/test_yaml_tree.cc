#include "rollout/config/yaml_tree.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/error_text.h"

namespace rollpack::rollout {
namespace {

using testing::error_text;

TEST(YamlTree, KeepsOrderLinesAndQuotes) {
  const YamlNode root = parse_yaml("b: 1\na:\n  - x\n  - \"2\"\n  - ~\n", "f");
  ASSERT_EQ(root.entries.size(), 2u);
  EXPECT_EQ(root.entries[0].key, "b");
  EXPECT_EQ(root.entries[1].line, 2);
  const YamlNode& list = root.entries[1].value;
  ASSERT_EQ(list.items.size(), 3u);
  EXPECT_TRUE(list.items[0].is_plain());
  EXPECT_TRUE(list.items[1].is_quoted);
  EXPECT_EQ(list.items[2].kind, YamlNode::Kind::kNull);
}

TEST(YamlTree, BadDocumentsNameLineAndReason) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "f:1: expected a YAML map; there is nothing in it"},
      {"# nothing\n", "f:1: expected a YAML map; there is nothing in it"},
      {"42", "f: expected a YAML map of sections; the file holds 42"},
      {"[a]", "f: expected a YAML map of sections; the file holds a list"},
      {"a: 1\nb: 2\na: 3", "a (f:3): expected each key once; it stands in line 1 already"},
      {"a: &x 1\nb: *x", "f:1: expected YAML without anchors and aliases; write the value out"},
      {"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]",
       "f:1: expected YAML without anchors and aliases; write the value out"},
      {"a: &x [*x]", "f:1: expected YAML without anchors and aliases; write the value out"},
      {"a: 1\nb: !!int 3", "f:2: expected YAML without tags; remove tag:yaml.org,2002:int"},
      {"a: 1\nb: !mine {c: 1}", "f:2: expected YAML without tags; remove !mine"},
      {"a: 1\n---\nb: 2\n", "f: expected one YAML document; a second one follows"},
      {"a:\n\tb: 1\n", "f:2: expected valid YAML; "},
      {"a: [1, 2", "f:1: expected valid YAML; "},
      {"a: {b: 1", "f:1: expected valid YAML; "},
      {"a: \"open\nb: 1", "f:"},
      {"? [1]\n: 2\n", "f:1: expected keys that are words; this one is a list: is a bracket open?"},
      {"~: 2\n", "f:1: expected keys that are words; this one is null"},
      {"a: [[[[1]]]]", "f:1: expected at most 4 levels of nesting"},
      {"a: 1\nb: \xC3\x28", "f:2: expected UTF-8 text; byte 0xc3 is not"},
      {std::string("a: 1\nb: \0x", 9), "f:2: expected UTF-8 text; byte 0x00 is not"},
      {std::string("\xFF\xFE"
                   "a\0:\0",
                   6),
       "f:1: expected UTF-8 text; byte 0xff is not"},
  };
  for (const auto& [text, error] : cases) {
    const std::string got = error_text([&, &yaml = text] { parse_yaml(yaml, "f"); });
    EXPECT_EQ(got.substr(0, error.size() + 18), "invalid_argument: " + error) << got;
  }
}

// yaml-cpp recurses: without its own guard and ours this would overflow the stack.
TEST(YamlTree, DeepNestingIsAnErrorNotACrash) {
  for (const int depth : {10, 3000, 200000}) {
    const auto count = static_cast<size_t>(depth);
    const std::string text = "a: " + std::string(count, '[') + std::string(count, ']');
    const std::string got = error_text([&] { parse_yaml(text, "f"); });
    EXPECT_EQ(got, "invalid_argument: f:1: expected at most 4 levels of nesting") << depth;
  }
}

TEST(YamlTree, OverridesArePlainTextUnlessTheyBeginLikeACollection) {
  EXPECT_EQ(parse_override("a: b # c", "--set").text, "a: b # c");
  EXPECT_TRUE(parse_override("8", "--set").is_plain());
  EXPECT_TRUE(parse_override("\"8\"", "--set").is_quoted);
  EXPECT_EQ(parse_override("[1, 2]", "--set").items.size(), 2u);
  EXPECT_EQ(parse_override("null", "--set").kind, YamlNode::Kind::kNull);
  EXPECT_EQ(parse_override("", "--set").kind, YamlNode::Kind::kNull);
}

}  // namespace
}  // namespace rollpack::rollout
