#include "rollout/model/model_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <iterator>
#include <limits>
#include <optional>
#include <string_view>

#include "kernels/base/error.h"
#include "rollout/jsonl/strict_json.h"
#include "rollout/model/checkpoint.h"

namespace rollpack::rollout {
namespace {

constexpr JsonLimits kLimits = {.max_bytes = size_t{4} << 20, .max_depth = 16};
constexpr int64_t kMaxDim = int64_t{1} << 24;  // keeps every product of two sizes far below 2^63
constexpr int64_t kMaxLayers = 4096;

// What tells the four families apart. Defaults are those of their classes in transformers 5.
struct Family {
  std::string_view architecture, model_type;
  bool is_bias_fixed = false;  // no attention_bias key: has_qkv_bias says what there is
  bool has_qkv_bias = false;
  bool has_o_bias_key = false;  // attention_bias covers o_proj
  bool has_mlp_bias_key = false;
  bool has_qk_norm = false;
  bool has_layer_types = false;  // use_sliding_window, max_window_layers, layer_types
  bool has_global_window = false;
  std::optional<int64_t> default_head_dim = {};  // otherwise D / H
};

constexpr std::array<Family, 4> kFamilies = {{
    {.architecture = "LlamaForCausalLM",
     .model_type = "llama",
     .has_o_bias_key = true,
     .has_mlp_bias_key = true},
    {.architecture = "Qwen2ForCausalLM",
     .model_type = "qwen2",
     .is_bias_fixed = true,
     .has_qkv_bias = true,
     .has_layer_types = true},
    {.architecture = "Qwen3ForCausalLM",
     .model_type = "qwen3",
     .has_o_bias_key = true,
     .has_qk_norm = true,
     .has_layer_types = true,
     .default_head_dim = 128},
    {.architecture = "MistralForCausalLM",
     .model_type = "mistral",
     .is_bias_fixed = true,
     .has_global_window = true},
}};

// Keys that say nothing about logits: how the model was trained, stored or is to be sampled from.
constexpr std::string_view kHarmlessKeys[] = {"_attn_implementation",
                                              "_name_or_path",
                                              "architectures",
                                              "attention_dropout",
                                              "bos_token_id",
                                              "chunk_size_feed_forward",
                                              "cls_token_id",
                                              "decoder_start_token_id",
                                              "do_sample",
                                              "dtype",
                                              "gradient_checkpointing",
                                              "id2label",
                                              "initializer_range",
                                              "is_llama_config",
                                              "label2id",
                                              "max_length",
                                              "mask_token_id",
                                              "model_type",
                                              "num_labels",
                                              "output_attentions",
                                              "output_hidden_states",
                                              "output_scores",
                                              "prefix",
                                              "problem_type",
                                              "return_dict",
                                              "return_dict_in_generate",
                                              "sep_token_id",
                                              "task_specific_params",
                                              "temperature",
                                              "tokenizer_class",
                                              "top_k",
                                              "top_p",
                                              "torch_dtype",
                                              "transformers.js_config",
                                              "transformers_version",
                                              "unk_token_id",
                                              "unsloth_fixed",
                                              "unsloth_version",
                                              "use_cache",
                                              "use_return_dict"};

// Keys that would change the logits unless they hold this one value.
struct FixedKey {
  std::string_view key, value;  // as JSON
};
constexpr FixedKey kFixedKeys[] = {
    {"hidden_act", "\"silu\""},       {"partial_rotary_factor", "1.0"},
    {"pretraining_tp", "1"},          {"rope_interleaved", "false"},
    {"use_mrope", "false"},           {"is_encoder_decoder", "false"},
    {"tie_encoder_decoder", "false"}, {"add_cross_attention", "false"},
    {"is_decoder", "false"},          {"use_bfloat16", "false"},
    {"torchscript", "false"},         {"pruned_heads", "{}"}};

// An object of config.json. Whatever was not looked up is refused at the end, so a key that this
// file does not know is never ignored.
class Keys {
 public:
  Keys(const Json& object, std::string origin, std::string prefix = {})
      : object_(object), origin_(std::move(origin)), prefix_(std::move(prefix)) {}

  // The value of `key`, or nullptr where it is absent or null.
  const Json* find(std::string_view key) {
    read_.emplace_back(key);
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }
  bool contains(std::string_view key) const { return object_.contains(key); }
  JsonPlace place(std::string_view key) const { return {prefix_ + std::string(key), origin_}; }

  // The integer at `key`; without a default the key must be there.
  int64_t integer(std::string_view key, int64_t min, int64_t max,
                  std::optional<int64_t> if_absent = {}) {
    if (const Json* value = find(key)) return json_integer(*value, place(key), min, max);
    if (!if_absent) fail_missing(key, fmt::format("an integer from {} to {}", min, max));
    return *if_absent;
  }
  double positive(std::string_view key, std::optional<double> if_absent = {}) {
    const Json* value = find(key);
    if (value == nullptr && if_absent) return *if_absent;
    if (value == nullptr) fail_missing(key, "a positive number");
    const double number = json_number(*value, place(key));
    if (!(number > 0)) fail_json(*value, place(key), "a positive number");
    return number;
  }
  bool flag(std::string_view key, bool if_absent) {
    const Json* value = find(key);
    return value == nullptr ? if_absent : json_bool(*value, place(key));
  }

  // Throws for the first key that is neither read nor harmless; null states nothing.
  void refuse_unread(bool is_top_level) const {
    for (const auto& [key, value] : object_.items()) {
      if (value.is_null() || std::find(read_.begin(), read_.end(), key) != read_.end()) continue;
      if (is_top_level && std::find(std::begin(kHarmlessKeys), std::end(kHarmlessKeys), key) !=
                              std::end(kHarmlessKeys)) {
        continue;
      }
      fail_unsupported(value, key, "no such key", "what it changes is not built");
    }
  }

  [[noreturn]] void fail_unsupported(const Json& value, std::string_view key, std::string allowed,
                                     std::string message = {}) const {
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = place(key).field,
                 .value = brief_json(value),
                 .origin = origin_,
                 .allowed = std::move(allowed),
                 .message = std::move(message)});
  }

 private:
  [[noreturn]] void fail_missing(std::string_view key, std::string allowed) const {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = place(key).field,
                 .origin = origin_,
                 .allowed = std::move(allowed),
                 .message = "this key is missing"});
  }

  const Json& object_;
  std::string origin_;
  std::string prefix_;
  std::vector<std::string> read_;
};

std::string known_architectures() {
  std::string names;
  for (const Family& family : kFamilies) {
    names += (names.empty() ? "one of " : ", ") + std::string(family.architecture);
  }
  return names;
}

const Family& read_family(Keys& keys) {
  const Json* type = keys.find("model_type");
  const Json* list = keys.find("architectures");
  const Json* name = type;
  if (list != nullptr) {
    json_array(*list, keys.place("architectures"));
    if (list->size() != 1) keys.fail_unsupported(*list, "architectures", "a list of one name");
    name = &list->front();
  }
  const std::string_view key = list != nullptr ? "architectures" : "model_type";
  if (name == nullptr) keys.fail_unsupported(nullptr, "architectures", known_architectures());
  const std::string text = json_string(*name, keys.place(key));
  for (const Family& family : kFamilies) {
    if (text != (list != nullptr ? family.architecture : family.model_type)) continue;
    if (type != nullptr && json_string(*type, keys.place("model_type")) != family.model_type) {
      keys.fail_unsupported(*type, "model_type", std::string(family.model_type),
                            fmt::format("architectures says {}", family.architecture));
    }
    return family;
  }
  keys.fail_unsupported(*name, key, known_architectures());
}

void check_fixed_keys(Keys& keys) {
  // compression_config is what compressed-tensors wrote before transformers had a place for it.
  for (const std::string key : {"quantization_config", "compression_config"}) {
    const Json* quantization = keys.find(key);
    if (quantization == nullptr) continue;
    const auto method =
        quantization->is_object() ? quantization->find("quant_method") : quantization->end();
    if (method == quantization->end()) {
      keys.fail_unsupported(*quantization, key, "none", kNoQuantizedWeights);
    }
    keys.fail_unsupported(*method, key + ".quant_method", "none", kNoQuantizedWeights);
  }
  for (const FixedKey& fixed : kFixedKeys) {
    const Json* value = keys.find(fixed.key);
    if (value != nullptr && *value != Json::parse(fixed.value)) {
      keys.fail_unsupported(*value, fixed.key, std::string(fixed.value));
    }
  }
}

void read_sizes(Keys& keys, const Family& family, ModelConfig& config) {
  config.hidden_size = keys.integer("hidden_size", 1, kMaxDim);
  config.num_attention_heads = keys.integer("num_attention_heads", 1, kMaxDim);
  config.intermediate_size = keys.integer("intermediate_size", 1, kMaxDim);
  config.vocab_size = keys.integer("vocab_size", 1, kMaxDim);
  config.num_hidden_layers = keys.integer("num_hidden_layers", 1, kMaxLayers);
  config.max_position_embeddings = keys.integer("max_position_embeddings", 1, kMaxDim);
  // Llama 1 has no such key; in the others an absent one would mean a number fixed in a class.
  const bool may_lack_groups = family.model_type == "llama" || keys.contains("num_key_value_heads");
  config.num_key_value_heads =
      keys.integer("num_key_value_heads", 1, config.num_attention_heads,
                   may_lack_groups ? std::optional(config.num_attention_heads) : std::nullopt);
  if (config.num_attention_heads % config.num_key_value_heads != 0) {
    fail_json(config.num_key_value_heads, keys.place("num_key_value_heads"),
              fmt::format("a divisor of num_attention_heads = {}", config.num_attention_heads));
  }

  const bool is_null = keys.contains("head_dim");  // read below: null asks for D / H
  int64_t fallback = config.hidden_size / config.num_attention_heads;
  if (family.default_head_dim && !is_null) fallback = *family.default_head_dim;
  config.head_dim = keys.integer("head_dim", 1, 4096, fallback);
  if (config.head_dim % 2 != 0 || config.head_dim == 0) {
    fail_json(config.head_dim, keys.place("head_dim"), "an even number of at least 2",
              "rotary embeddings turn pairs");
  }
  if (keys.find("head_dim") == nullptr && fallback != family.default_head_dim &&
      config.hidden_size % config.num_attention_heads != 0) {
    fail_json(config.hidden_size, keys.place("hidden_size"),
              fmt::format("a multiple of num_attention_heads = {}", config.num_attention_heads),
              "or a head_dim");
  }
  config.rms_norm_eps = keys.positive("rms_norm_eps", 1e-6);
}

void read_biases(Keys& keys, const Family& family, ModelConfig& config) {
  config.has_qkv_bias = family.has_qkv_bias;
  if (!family.is_bias_fixed) {
    config.has_qkv_bias = keys.flag("attention_bias", false);
    config.has_o_bias = config.has_qkv_bias && family.has_o_bias_key;
  } else if (const Json* bias = keys.find("attention_bias");
             bias != nullptr && *bias != Json(family.has_qkv_bias)) {
    keys.fail_unsupported(*bias, "attention_bias", family.has_qkv_bias ? "true" : "false",
                          fmt::format("{} fixes it", family.architecture));
  }
  config.has_mlp_bias = keys.flag("mlp_bias", false);
  if (config.has_mlp_bias && !family.has_mlp_bias_key) {
    keys.fail_unsupported(true, "mlp_bias", "false",
                          fmt::format("{} has none", family.architecture));
  }
  config.has_qk_norm = family.has_qk_norm;
  config.tie_word_embeddings = keys.flag("tie_word_embeddings", false);
}

// Fills layer_windows. A window of w lets row i see keys j with i - j < w.
void read_windows(Keys& keys, const Family& family, ModelConfig& config) {
  const int64_t num_layers = config.num_hidden_layers;
  config.layer_windows.assign(static_cast<size_t>(num_layers), 0);
  const auto window_or = [&](int64_t if_absent) {
    const bool is_null = keys.contains("sliding_window");
    return static_cast<int32_t>(
        keys.integer("sliding_window", 1, kMaxDim, is_null ? int64_t{0} : if_absent));
  };
  if (family.has_global_window) {
    const int32_t window = window_or(4096);
    std::fill(config.layer_windows.begin(), config.layer_windows.end(), window);
  }
  if (!family.has_layer_types) return;

  const bool is_used = keys.flag("use_sliding_window", false);
  const int32_t window = is_used ? window_or(4096) : (window_or(0), 0);
  const int64_t first_layer = keys.integer("max_window_layers", 0, kMaxDim, 28);
  const Json* types = keys.find("layer_types");
  if (types != nullptr && (!types->is_array() || std::ssize(*types) != num_layers)) {
    fail_json(*types, keys.place("layer_types"),
              fmt::format("a list of num_hidden_layers = {} names", num_layers));
  }
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    bool is_sliding = window > 0 && layer >= first_layer;
    if (types != nullptr) {
      const Json& type = (*types)[static_cast<size_t>(layer)];
      is_sliding = type == "sliding_attention";
      if (!is_sliding && type != "full_attention") {
        keys.fail_unsupported(type, fmt::format("layer_types[{}]", layer),
                              "full_attention or sliding_attention");
      }
      if (is_sliding && window == 0) {
        keys.fail_unsupported(type, fmt::format("layer_types[{}]", layer), "full_attention",
                              "use_sliding_window is false or sliding_window is not given");
      }
    }
    if (is_sliding) config.layer_windows[static_cast<size_t>(layer)] = window;
  }
}

void read_rope_scaling(Keys& rope, int64_t max_position_embeddings, RopeConfig& config) {
  // transformers 4 wrote "type" until "rope_type" came; both may stand in one file.
  const Json* new_type = rope.find("rope_type");
  const Json* old_type = rope.find("type");
  const Json* type = new_type != nullptr ? new_type : old_type;
  if (new_type != nullptr && old_type != nullptr && *new_type != *old_type) {
    fail_json(*old_type, rope.place("type"), "the same as rope_type");
  }
  const std::string name =
      type == nullptr ? "default"
                      : json_string(*type, rope.place(new_type != nullptr ? "rope_type" : "type"));
  if (name == "linear") {
    config.scaling = RopeScaling::kLinear;
    config.factor = rope.positive("factor");
  } else if (name == "llama3") {
    config.scaling = RopeScaling::kLlama3;
    config.factor = rope.positive("factor");
    config.low_freq_factor = rope.positive("low_freq_factor");
    config.high_freq_factor = rope.positive("high_freq_factor");
    config.original_max_position_embeddings =
        rope.integer("original_max_position_embeddings", 1, kMaxDim, max_position_embeddings);
    if (config.high_freq_factor <= config.low_freq_factor) {
      fail_json(config.high_freq_factor, rope.place("high_freq_factor"),
                fmt::format("more than low_freq_factor = {}", config.low_freq_factor));
    }
  } else if (name != "default") {
    rope.fail_unsupported(*type, new_type != nullptr ? "rope_type" : "type",
                          "one of default, linear, llama3");
  }
}

// transformers 5 writes rope_parameters {rope_type, rope_theta, ..}; transformers 4 wrote
// rope_theta beside rope_scaling {rope_type or type, ..}.
RopeConfig read_rope(Keys& keys, const std::string& origin, int64_t max_position_embeddings) {
  RopeConfig config;
  const Json* parameters = keys.find("rope_parameters");
  const Json* scaling = keys.find("rope_scaling");
  if (parameters != nullptr && scaling != nullptr) {
    fail_json(*scaling, keys.place("rope_scaling"), "only one of rope_scaling and rope_parameters");
  }
  const double outer_theta = keys.positive("rope_theta", config.theta);
  config.theta = outer_theta;
  const Json* object = parameters != nullptr ? parameters : scaling;
  if (object == nullptr) return config;

  const std::string name = parameters != nullptr ? "rope_parameters" : "rope_scaling";
  json_object(*object, keys.place(name));
  Keys rope(*object, origin, name + ".");
  config.theta = rope.positive("rope_theta", outer_theta);
  if (keys.find("rope_theta") != nullptr && config.theta != outer_theta) {
    fail_json(outer_theta, keys.place("rope_theta"),
              fmt::format("the same as {}.rope_theta = {}", name, config.theta));
  }
  if (const Json* partial = rope.find("partial_rotary_factor");
      partial != nullptr && *partial != 1.0) {
    rope.fail_unsupported(*partial, "partial_rotary_factor", "1.0");
  }
  read_rope_scaling(rope, max_position_embeddings, config);
  rope.refuse_unread(/*is_top_level=*/false);
  return config;
}

// Adds eos_token_id, an integer or a list of them, to `ids`.
void join_eos(Keys& keys, int64_t vocab_size, std::vector<int32_t>& ids) {
  const Json* value = keys.find("eos_token_id");
  if (value == nullptr) return;
  const JsonPlace place = keys.place("eos_token_id");
  const auto last = static_cast<int32_t>(vocab_size - 1);
  if (value->is_array()) {
    const std::vector<int32_t> list = json_int32_list(*value, place, 0, last);
    ids.insert(ids.end(), list.begin(), list.end());
  } else {
    ids.push_back(static_cast<int32_t>(json_integer(*value, place, 0, last)));
  }
}

Json read_object(const std::string& path) {
  Json object = read_json_file(path, kLimits);
  json_object(object, {"file", path});
  return object;
}

}  // namespace

ModelConfig read_model_config(const std::string& folder) {
  const std::string path = (std::filesystem::path(folder) / "config.json").string();
  const Json object = read_object(path);
  Keys keys(object, path);

  ModelConfig config;
  const Family& family = read_family(keys);
  config.architecture = family.architecture;
  check_fixed_keys(keys);
  read_sizes(keys, family, config);
  read_biases(keys, family, config);
  read_windows(keys, family, config);
  config.rope = read_rope(keys, path, config.max_position_embeddings);
  join_eos(keys, config.vocab_size, config.eos_token_ids);
  // -1 is how Llama 1 and 2 spelled "none".
  config.pad_token_id =
      static_cast<int32_t>(keys.integer("pad_token_id", -1, config.vocab_size - 1, -1));
  keys.refuse_unread(/*is_top_level=*/true);

  const std::string generation =
      (std::filesystem::path(folder) / "generation_config.json").string();
  if (std::filesystem::exists(generation)) {
    const Json generation_object = read_object(generation);
    Keys generation_keys(generation_object, generation);
    join_eos(generation_keys, config.vocab_size, config.eos_token_ids);
  }
  std::sort(config.eos_token_ids.begin(), config.eos_token_ids.end());
  config.eos_token_ids.erase(std::unique(config.eos_token_ids.begin(), config.eos_token_ids.end()),
                             config.eos_token_ids.end());
  return config;
}

}  // namespace rollpack::rollout
