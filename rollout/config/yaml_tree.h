// A YAML file as a small tree of our own: built from yaml-cpp's events, because its nodes hide what
// must be refused (repeated keys keep the first, aliases load as cycles) and forget quotes.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace rollpack::rollout {

struct YamlEntry;

struct YamlNode {
  enum class Kind { kNull, kScalar, kSequence, kMap };

  Kind kind = Kind::kNull;
  std::string text;                // of a scalar
  bool is_quoted = false;          // "8" is text, 8 is a number
  std::vector<YamlNode> items;     // of a sequence
  std::vector<YamlEntry> entries;  // of a map, in file order, keys unique

  bool is_plain() const { return kind == Kind::kScalar && !is_quoted; }
  // The value as an error shows it: text, or the kind of a collection.
  std::string shown() const;
};

struct YamlEntry {
  std::string key;
  int line = 0;  // of the key, from 1
  YamlNode value;
};

// Parses one document that is a map of at most four levels. `origin` is the file's name.
// Errors: invalid_argument naming "origin:line": not UTF-8, syntax, repeated keys, anchors and
// aliases, tags, keys that are not text, several documents, nothing at all.
YamlNode parse_yaml(std::string_view text, const std::string& origin);

// The value of a `--set section.key=value`: a list or quoted text as in YAML, otherwise the text
// between "=" and the end as one plain scalar.
YamlNode parse_override(std::string_view text, const std::string& origin);

}  // namespace rollpack::rollout
