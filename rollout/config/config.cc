#include "rollout/config/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <utility>

#include "kernels/base/error.h"
#include "rollout/config/yaml_tree.h"
#include "rollout/jsonl/text_file.h"

namespace rollpack::rollout {
namespace {

constexpr int64_t kMaxFileBytes = 1 << 20;

// ---- which keys there are
// ------------------------------------------------------------------------

struct KnownKey {
  std::string section, name;
  std::vector<std::string> aliases;

  bool answers_to(std::string_view key) const {
    return key == name || std::find(aliases.begin(), aliases.end(), key) != aliases.end();
  }
};

struct KnownKeys {
  std::vector<std::string> sections;
  std::vector<KnownKey> keys;
};

struct CollectKeys {
  KnownKeys& known;
  std::string section;

  template <class T, class Rule>
  void operator()(const char* name, const T&, const Rule&, const char*, Aliases aliases = {}) {
    known.keys.push_back({section, name, {aliases.begin(), aliases.end()}});
  }
};

const KnownKeys& known_keys() {
  static const KnownKeys all = [] {
    KnownKeys known;
    const Config defaults;
    Config::sections(defaults, [&known](const char* name, const auto& section, const char*) {
      known.sections.emplace_back(name);
      section.fields(section, CollectKeys{known, name});
    });
    return known;
  }();
  return all;
}

// Single-character edits between two words (Levenshtein 1966), one row at a time.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, diagonal + 1, row[j] + 1});
    }
  }
  return row[b.size()];
}

// "did you mean X?" for the nearest of `names`, or nothing where none is near.
std::string nearest(std::string_view word, const std::vector<std::string>& names) {
  const std::string* best = nullptr;
  size_t best_distance = std::max<size_t>(2, word.size() / 3) + 1;
  for (const std::string& name : names) {
    const size_t distance = edit_distance(word.substr(0, 64), name);
    if (distance < best_distance) {
      best = &name;
      best_distance = distance;
    }
  }
  return best == nullptr ? "" : fmt::format("did you mean {}?", *best);
}

[[noreturn]] void fail_section(const std::string& section, const std::string& origin) {
  const std::vector<std::string>& sections = known_keys().sections;
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = section,
               .origin = origin,
               .allowed = fmt::format("one of the sections {}", fmt::join(sections, ", ")),
               .message = nearest(section, sections)});
}

// Keys by which other stacks choose quantized weights or keys and values, and why there are none.
struct QuantizationKey {
  std::string_view name, reason;
};
constexpr std::string_view kNoQuantizedWeights =
    "quantized weights are another policy than the one that is trained, with other "
    "log-probabilities; remove the key";
constexpr std::string_view kNoQuantizedCache =
    "keys and values are held in model.dtype: quantized ones would give other log-probabilities "
    "than "
    "the trainer's; remove the key";
constexpr QuantizationKey kQuantizationKeys[] = {
    {"kv_cache_dtype", kNoQuantizedCache},     {"kv_cache_quant_algo", kNoQuantizedCache},
    {"cache_type_k", kNoQuantizedCache},       {"cache_type_v", kNoQuantizedCache},
    {"kv_cache_precision", kNoQuantizedCache}, {"calculate_kv_scales", kNoQuantizedCache},
    {"quantization", kNoQuantizedWeights},     {"quantization_config", kNoQuantizedWeights},
    {"quantize", kNoQuantizedWeights},         {"load_in_8bit", kNoQuantizedWeights},
    {"load_in_4bit", kNoQuantizedWeights}};

void refuse_quantization(const std::string& section, const std::string& key, const YamlNode& value,
                         const std::string& origin) {
  const auto* known = std::ranges::find(kQuantizationKeys, key, &QuantizationKey::name);
  if (known == std::end(kQuantizationKeys)) return;
  throw Error({.code = ErrorCode::kUnsupported,
               .field = fmt::format("{}.{}", section, key),
               .value = value.shown(),
               .origin = origin,
               .allowed = "no quantization",
               .message = std::string(known->reason)});
}

[[noreturn]] void fail_key(const std::string& section, const std::string& key,
                           const YamlNode& value, const std::string& origin) {
  refuse_quantization(section, key, value, origin);
  std::vector<std::string> names;
  std::string elsewhere;
  for (const KnownKey& known : known_keys().keys) {
    if (known.section == section) names.push_back(known.name);
    if (known.answers_to(key)) elsewhere = fmt::format("{} is a key of {}", key, known.section);
  }
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = fmt::format("{}.{}", section, key),
               .value = value.shown(),
               .origin = origin,
               .allowed = names.empty() ? fmt::format("no key: {} has none", section)
                                        : fmt::format("one of the keys {}", fmt::join(names, ", ")),
               .message = elsewhere.empty() ? nearest(key, names) : elsewhere});
}

// ---- what the user wrote
// -------------------------------------------------------------------------

struct Assignment {
  YamlNode value;
  std::string origin;
  std::string written_key;  // the alias, where one was used
};

using Assignments = std::map<std::string, Assignment>;  // by "section.key", aliases resolved

// The field that `key` of `section` means.
std::string resolve_key(const std::string& section, const std::string& key, const YamlNode& value,
                        const std::string& origin) {
  for (const KnownKey& known : known_keys().keys) {
    if (known.section == section && known.answers_to(key)) return section + "." + known.name;
  }
  fail_key(section, key, value, origin);
}

void add_section(Assignments& assignments, YamlEntry& section, const std::string& file) {
  const std::string section_origin = fmt::format("{}:{}", file, section.line);
  const std::vector<std::string>& names = known_keys().sections;
  if (std::find(names.begin(), names.end(), section.key) == names.end()) {
    fail_section(section.key, section_origin);
  }
  if (section.value.kind == YamlNode::Kind::kNull) return;
  if (section.value.kind != YamlNode::Kind::kMap) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = section.key,
                 .value = section.value.shown(),
                 .origin = section_origin,
                 .allowed = "a map of keys"});
  }
  for (YamlEntry& entry : section.value.entries) {
    const std::string origin = fmt::format("{}:{}", file, entry.line);
    const std::string field = resolve_key(section.key, entry.key, entry.value, origin);
    const auto [first, is_new] =
        assignments.emplace(field, Assignment{std::move(entry.value), origin, entry.key});
    if (!is_new) {
      throw Error({.code = ErrorCode::kInvalidArgument,
                   .field = fmt::format("{}.{}", section.key, entry.key),
                   .origin = origin,
                   .allowed = "one name of a field",
                   .message = fmt::format("{} at {} means the same", first->second.written_key,
                                          first->second.origin)});
    }
  }
}

void add_override(Assignments& assignments, const std::string& text) {
  const std::string origin = "--set";
  const size_t equals = text.find('=');
  const size_t point = text.find('.');
  if (equals == std::string::npos || point == std::string::npos || point > equals) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "--set",
                 .value = text,
                 .allowed = "section.key=value, as rollout.n=4"});
  }
  const std::string section = text.substr(0, point);
  const std::string key = text.substr(point + 1, equals - point - 1);
  YamlNode value = parse_override(std::string_view(text).substr(equals + 1), origin);
  const std::vector<std::string>& names = known_keys().sections;
  if (std::find(names.begin(), names.end(), section) == names.end()) fail_section(section, origin);
  const std::string field = resolve_key(section, key, value, origin);
  assignments[field] = {std::move(value), origin, key};
}

// ---- into the structs
// ----------------------------------------------------------------------------

struct ReadFields {
  std::string section;
  Assignments& assignments;
  std::map<std::string, std::string>& origins;

  template <class T, class Rule>
  void operator()(const char* name, T& member, const Rule& rule, const char*, Aliases = {}) {
    const auto found = assignments.find(fmt::format("{}.{}", section, name));
    if (found == assignments.end()) return;
    const Assignment& given = found->second;
    if (const std::optional<Refusal> refusal = rule.read(given.value, member)) {
      throw Error({.code = refusal->code,
                   .field = fmt::format("{}.{}", section, given.written_key),
                   .value = given.value.shown(),
                   .origin = given.origin,
                   .allowed = rule.allowed(),
                   .message = refusal->advice});
    }
    origins[found->first] = given.origin;
  }
};

// What a model held by several ranks cannot have beside it.
template <class Refuse>
void check_tensor_parallel(const Config& config, const Refuse& refuse) {
  if (config.engine.backend == "reference") {
    refuse(ErrorCode::kUnsupported, "engine.backend", config.engine.backend, "another one",
           "it holds whole models only: engine.tensor_model_parallel_size is not 1");
  }
  if (config.engine.share_weights == "on") {
    refuse(ErrorCode::kUnsupported, "engine.share_weights", config.engine.share_weights,
           "auto or off",
           "ranks that hold different parts of the weights cannot share a copy: "
           "engine.tensor_model_parallel_size is not 1");
  }
  if (!config.reference_model.path.empty()) {
    refuse(ErrorCode::kUnsupported, "reference_model.path", config.reference_model.path, "none",
           "it is held whole by every rank; engine.tensor_model_parallel_size is not 1");
  }
}

// What must hold between fields.
void check_together(const Config& config) {
  const auto refuse = [&](ErrorCode code, const char* field, std::string value, std::string allowed,
                          std::string message) {
    throw Error({code, field, std::move(value), config.origin_of(field), std::move(allowed),
                 std::move(message)});
  };
  const RolloutSection& rollout = config.rollout;
  const EngineSection& engine = config.engine;
  if (config.model.path.empty()) {
    refuse(ErrorCode::kInvalidArgument, "model.path", {}, "a Hugging Face folder",
           "it has no default");
  }
  if (rollout.min_tokens > rollout.response_length) {
    refuse(ErrorCode::kInvalidArgument, "rollout.min_tokens", std::to_string(rollout.min_tokens),
           fmt::format("at most rollout.response_length = {}", rollout.response_length), {});
  }
  if (!engine.enable_chunked_prefill && engine.batching == "continuous" &&
      engine.max_num_batched_tokens < rollout.prompt_length) {
    refuse(ErrorCode::kInvalidArgument, "engine.max_num_batched_tokens",
           std::to_string(engine.max_num_batched_tokens),
           fmt::format("at least rollout.prompt_length = {}", rollout.prompt_length),
           "without chunked prefill a prompt must fit one step");
  }
  if (engine.tensor_model_parallel_size != 1) check_tensor_parallel(config, refuse);
}

}  // namespace

Config parse_config(std::string_view text, const std::string& origin,
                    const std::vector<std::string>& overrides) {
  YamlNode root = parse_yaml(text, origin);
  Assignments assignments;
  for (YamlEntry& section : root.entries) add_section(assignments, section, origin);
  for (const std::string& text_of_one : overrides) add_override(assignments, text_of_one);

  Config config;
  Config::sections(config, [&](const char* name, auto& section, const char*) {
    section.fields(section, ReadFields{name, assignments, config.origins});
  });
  check_together(config);
  return config;
}

Config load_config(const std::string& path, const std::vector<std::string>& overrides) {
  return parse_config(read_text_file(path, "--config", kMaxFileBytes), path, overrides);
}

}  // namespace rollpack::rollout
