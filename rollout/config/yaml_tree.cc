#include "rollout/config/yaml_tree.h"

#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <utility>

#include "kernels/base/error.h"
#include "rollout/jsonl/text_file.h"

namespace rollpack::rollout {
namespace {

constexpr size_t kMaxDepth = 4;  // file, section, list, entry

[[noreturn]] void fail(const std::string& origin, int line, std::string allowed,
                       std::string message) {
  throw Error({.code = ErrorCode::kInvalidArgument,
               .origin = fmt::format("{}:{}", origin, line),
               .allowed = std::move(allowed),
               .message = std::move(message)});
}

class TreeBuilder : public YAML::EventHandler {
 public:
  explicit TreeBuilder(std::string origin) : origin_(std::move(origin)) {}

  YamlNode take() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override { refuse_anchor(mark); }
  void OnAnchor(const YAML::Mark& mark, const std::string&) override { refuse_anchor(mark); }
  void OnNull(const YAML::Mark& mark, YAML::anchor_t) override { add(mark, {}); }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                const std::string& text) override {
    refuse_tag(mark, tag);
    add(mark, {.kind = YamlNode::Kind::kScalar, .text = text, .is_quoted = tag == "!"});
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {
    refuse_tag(mark, tag);
    open(mark, YamlNode::Kind::kSequence);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                  YAML::EmitterStyle::value) override {
    refuse_tag(mark, tag);
    open(mark, YamlNode::Kind::kMap);
  }
  void OnMapEnd() override { close(); }

 private:
  [[noreturn]] void refuse_anchor(const YAML::Mark& mark) const {
    fail(origin_, mark.line + 1, "YAML without anchors and aliases", "write the value out");
  }
  // "?" is what a plain scalar has, "!" a quoted one.
  void refuse_tag(const YAML::Mark& mark, const std::string& tag) const {
    if (tag.empty() || tag == "?" || tag == "!") return;
    fail(origin_, mark.line + 1, "YAML without tags", fmt::format("remove {}", tag));
  }

  // A scalar where a map waits for a key becomes that key; then there is nothing to point to.
  YamlNode* add(const YAML::Mark& mark, YamlNode node) {
    if (open_.empty()) {
      root_ = std::move(node);
      return &root_;
    }
    YamlNode& parent = *open_.back();
    if (parent.kind == YamlNode::Kind::kSequence) {
      parent.items.push_back(std::move(node));
      return &parent.items.back();
    }
    if (is_key_next_.back()) {
      add_key(mark, node, parent);
      is_key_next_.back() = false;
      return nullptr;
    }
    is_key_next_.back() = true;
    parent.entries.back().value = std::move(node);
    return &parent.entries.back().value;
  }

  void add_key(const YAML::Mark& mark, const YamlNode& key, YamlNode& map) const {
    const int line = mark.line + 1;
    if (key.kind != YamlNode::Kind::kScalar) {
      fail(origin_, line, "keys that are words",
           fmt::format("this one is {}{}", key.shown(),
                       key.kind == YamlNode::Kind::kNull ? "" : ": is a bracket open?"));
    }
    for (const YamlEntry& entry : map.entries) {
      if (entry.key != key.text) continue;
      throw Error({.code = ErrorCode::kInvalidArgument,
                   .field = key.text,
                   .origin = fmt::format("{}:{}", origin_, line),
                   .allowed = "each key once",
                   .message = fmt::format("it stands in line {} already", entry.line)});
    }
    map.entries.push_back({.key = key.text, .line = line});
  }

  void open(const YAML::Mark& mark, YamlNode::Kind kind) {
    if (open_.size() >= kMaxDepth) {
      fail(origin_, mark.line + 1, fmt::format("at most {} levels of nesting", kMaxDepth), {});
    }
    open_.push_back(add(mark, {.kind = kind}));
    is_key_next_.push_back(kind == YamlNode::Kind::kMap);
  }
  void close() {
    open_.pop_back();
    is_key_next_.pop_back();
  }

  std::string origin_;
  YamlNode root_;
  std::vector<YamlNode*> open_;    // only the innermost grows, so the pointers stay good
  std::vector<bool> is_key_next_;  // beside open_
};

// yaml-cpp would decode UTF-16 and take stray bytes as they are.
void refuse_other_encodings(std::string_view text, const std::string& origin) {
  const std::optional<size_t> invalid = find_invalid_utf8(text);
  const auto is_control = [](char c) {
    return (static_cast<uint8_t>(c) < 0x20 && c != '\n' && c != '\r' && c != '\t') || c == 0x7F;
  };
  const auto control = std::find_if(text.begin(), text.end(), is_control);
  const size_t position =
      std::min(invalid.value_or(text.size()), static_cast<size_t>(control - text.begin()));
  if (position == text.size()) return;
  const auto lines_before = std::count(text.begin(), text.begin() + position, '\n');
  fail(origin, static_cast<int>(lines_before) + 1, "UTF-8 text",
       fmt::format("byte 0x{:02x} is not", static_cast<uint8_t>(text[position])));
}

YamlNode parse_document(std::string_view text, const std::string& origin) {
  refuse_other_encodings(text, origin);
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  std::istringstream stream{std::string(text)};
  try {
    YAML::Parser parser(stream);
    TreeBuilder builder(origin);
    if (!parser.HandleNextDocument(builder))
      fail(origin, 1, "a YAML map", "there is nothing in it");
    YamlNode root = builder.take();
    TreeBuilder rest(origin);
    if (parser.HandleNextDocument(rest)) {
      throw Error({.code = ErrorCode::kInvalidArgument,
                   .origin = origin,
                   .allowed = "one YAML document",
                   .message = "a second one follows"});
    }
    return root;
  } catch (const YAML::Exception& error) {
    fail(origin, std::max(error.mark.line, 0) + 1, "valid YAML", error.msg);
  }
}

}  // namespace

std::string YamlNode::shown() const {
  switch (kind) {
    case Kind::kNull:
      return "null";
    case Kind::kScalar:
      return is_quoted ? fmt::format("\"{}\"", text) : text;
    case Kind::kSequence:
      return "a list";
    case Kind::kMap:
      return "a map";
  }
  return {};
}

YamlNode parse_yaml(std::string_view text, const std::string& origin) {
  YamlNode root = parse_document(text, origin);
  if (root.kind != YamlNode::Kind::kMap) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .origin = origin,
                 .allowed = "a YAML map of sections",
                 .message = fmt::format("the file holds {}", root.shown())});
  }
  return root;
}

YamlNode parse_override(std::string_view text, const std::string& origin) {
  if (!text.empty() && std::string_view("[{\"'").find(text.front()) != std::string_view::npos) {
    return parse_document(text, origin);
  }
  if (text.empty() || text == "~" || text == "null") return {};
  return {.kind = YamlNode::Kind::kScalar, .text = std::string(text)};
}

}  // namespace rollpack::rollout
