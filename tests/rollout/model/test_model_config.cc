#include "rollout/model/model_config.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "rollout/jsonl/strict_json.h"
#include "tests/error_text.h"
#include "tests/rollout/temporary_folder.h"

namespace rollpack::rollout {
namespace {

using testing::error_text;
using testing::TemporaryFolder;
using testing::with_replaced;

// What save_pretrained() of transformers 5.23 writes for small models of the four families.
constexpr char kLlama[] = R"({
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 1, "dtype": "bfloat16", "eos_token_id": 2, "head_dim": 16,
  "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 128,
  "max_position_embeddings": 256, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2,
  "pad_token_id": null, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
  "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
  "tie_word_embeddings": false, "transformers_version": "5.23.0", "use_cache": true,
  "vocab_size": 300})";
constexpr char kQwen2[] = R"({
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": null,
  "dtype": "bfloat16", "eos_token_id": null, "hidden_act": "silu", "hidden_size": 64,
  "initializer_range": 0.02, "intermediate_size": 128,
  "layer_types": ["full_attention", "full_attention", "full_attention"],
  "max_position_embeddings": 256, "max_window_layers": 28, "model_type": "qwen2",
  "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2,
  "pad_token_id": null, "rms_norm_eps": 1e-06,
  "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "sliding_window": null,
  "tie_word_embeddings": false, "transformers_version": "5.23.0", "use_cache": true,
  "use_sliding_window": false, "vocab_size": 300})";
constexpr char kQwen3[] = R"({
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": null, "dtype": "bfloat16", "eos_token_id": null, "head_dim": 128,
  "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 128,
  "layer_types": ["full_attention", "full_attention", "full_attention"],
  "max_position_embeddings": 256, "max_window_layers": 28, "model_type": "qwen3",
  "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2,
  "pad_token_id": null, "rms_norm_eps": 1e-06,
  "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "sliding_window": null,
  "tie_word_embeddings": false, "transformers_version": "5.23.0", "use_cache": true,
  "use_sliding_window": false, "vocab_size": 300})";
constexpr char kMistral[] = R"({
  "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
  "dtype": "bfloat16", "eos_token_id": 2, "head_dim": 16, "hidden_act": "silu",
  "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 128,
  "max_position_embeddings": 256, "model_type": "mistral", "num_attention_heads": 4,
  "num_hidden_layers": 3, "num_key_value_heads": 2, "pad_token_id": null, "rms_norm_eps": 1e-06,
  "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "sliding_window": 4096,
  "tie_word_embeddings": false, "transformers_version": "5.23.0", "use_cache": true,
  "vocab_size": 300})";
// SmolLM2-135M-Instruct as published, by transformers 4.
constexpr char kSmolLm2[] = R"({
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
  "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
  "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
  "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
  "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152})";

ModelConfig read(const std::string& config, const std::string& generation_config = {}) {
  const TemporaryFolder folder;
  folder.write("config.json", config);
  if (!generation_config.empty()) folder.write("generation_config.json", generation_config);
  return read_model_config(folder.path());
}

// `base` with the members of `patch` set; a member whose patch is the text "absent" is removed.
std::string patched(const char* base, const std::string& patch) {
  Json config = Json::parse(base);
  const Json changes = Json::parse(patch);
  for (const auto& [key, value] : changes.items()) {
    if (value == "absent") {
      config.erase(key);
    } else {
      config[key] = value;
    }
  }
  return config.dump();
}

// The error of reading this config, the folder's path replaced by "DIR".
std::string error_of(const std::string& config, const std::string& generation_config = {}) {
  const TemporaryFolder folder;
  folder.write("config.json", config);
  if (!generation_config.empty()) folder.write("generation_config.json", generation_config);
  return with_replaced(error_text([&] { read_model_config(folder.path()); }), folder.path(), "DIR");
}

TEST(ModelConfig, AttentionCostsAsMuchAsLinearLayersWhereTheirFlopsAreEqual) {
  // A token is multiplied with 30 x 576 x (2 x 576 + 2 x 192 + 3 x 1536) + 576 x 49152 weights;
  // causal attention takes 30 x 576 multiplications for each token of the sequence: twice that
  // many a pair, and half the pairs.
  EXPECT_EQ(read(kSmolLm2).attention_parity_tokens(), 134479872 / (30 * 576));
}

TEST(ModelConfig, SmolLm2AsPublished) {
  const ModelConfig config = read(kSmolLm2);
  EXPECT_EQ(config.architecture, "LlamaForCausalLM");
  EXPECT_EQ(config.hidden_size, 576);
  EXPECT_EQ(config.num_attention_heads, 9);
  EXPECT_EQ(config.num_key_value_heads, 3);
  EXPECT_EQ(config.head_dim, 64);
  EXPECT_EQ(config.intermediate_size, 1536);
  EXPECT_EQ(config.vocab_size, 49152);
  EXPECT_EQ(config.num_hidden_layers, 30);
  EXPECT_EQ(config.max_position_embeddings, 8192);
  EXPECT_EQ(config.rms_norm_eps, 1e-5);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_FALSE(config.has_qkv_bias || config.has_o_bias || config.has_mlp_bias);
  EXPECT_FALSE(config.has_qk_norm);
  EXPECT_EQ(config.layer_windows, std::vector<int32_t>(30, 0));
  EXPECT_EQ(config.rope.theta, 100000.0);
  EXPECT_EQ(config.rope.scaling, RopeScaling::kNone);
  EXPECT_EQ(config.eos_token_ids, (std::vector<int32_t>{2}));
  EXPECT_EQ(config.pad_token_id, 2);
}

TEST(ModelConfig, TheFourFamiliesAsTransformers5WritesThem) {
  const ModelConfig llama = read(kLlama);
  EXPECT_EQ(llama.head_dim, 16);
  EXPECT_EQ(llama.pad_token_id, -1);
  EXPECT_EQ(llama.layer_windows, (std::vector<int32_t>{0, 0, 0}));

  const ModelConfig qwen2 = read(kQwen2);
  EXPECT_EQ(qwen2.architecture, "Qwen2ForCausalLM");
  EXPECT_TRUE(qwen2.has_qkv_bias);
  EXPECT_FALSE(qwen2.has_o_bias);
  EXPECT_EQ(qwen2.head_dim, 16);
  EXPECT_TRUE(qwen2.eos_token_ids.empty());
  EXPECT_EQ(qwen2.layer_windows, (std::vector<int32_t>{0, 0, 0}));

  const ModelConfig qwen3 = read(kQwen3);
  EXPECT_TRUE(qwen3.has_qk_norm);
  EXPECT_FALSE(qwen3.has_qkv_bias);
  EXPECT_EQ(qwen3.head_dim, 128);

  const ModelConfig mistral = read(kMistral);
  EXPECT_EQ(mistral.layer_windows, (std::vector<int32_t>{4096, 4096, 4096}));
  EXPECT_FALSE(mistral.has_qkv_bias);
}

TEST(ModelConfig, BiasesFollowTheirKeys) {
  const ModelConfig llama = read(patched(kLlama, R"({"attention_bias": true, "mlp_bias": true})"));
  EXPECT_TRUE(llama.has_qkv_bias && llama.has_o_bias && llama.has_mlp_bias);
  const ModelConfig qwen3 = read(patched(kQwen3, R"({"attention_bias": true})"));
  EXPECT_TRUE(qwen3.has_qkv_bias && qwen3.has_o_bias);
}

TEST(ModelConfig, WindowsFollowTheFamily) {
  using Windows = std::vector<int32_t>;
  const auto windows = [](const char* base, const std::string& patch) {
    return read(patched(base, patch)).layer_windows;
  };
  EXPECT_EQ(windows(kMistral, R"({"sliding_window": null})"), (Windows{0, 0, 0}));
  EXPECT_EQ(windows(kMistral, R"({"sliding_window": "absent"})"), (Windows{4096, 4096, 4096}));
  // transformers 4 stated the window even where it was not used.
  EXPECT_EQ(windows(kQwen2, R"({"sliding_window": 32, "layer_types": "absent"})"),
            (Windows{0, 0, 0}));
  EXPECT_EQ(windows(kQwen2, R"({"use_sliding_window": true, "sliding_window": 32,
                                "max_window_layers": 1, "layer_types": "absent"})"),
            (Windows{0, 32, 32}));
  EXPECT_EQ(windows(kQwen3, R"({"use_sliding_window": true, "sliding_window": 32,
      "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]})"),
            (Windows{32, 0, 32}));
}

TEST(ModelConfig, RopeIsReadInTheOldAndTheNewForm) {
  const std::string members = R"("factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 128)";
  const std::vector<std::string> forms = {
      R"({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, )" + members + "}}",
      R"({"rope_parameters": "absent", "rope_theta": 500000, "rope_scaling": {"type": "llama3", )" +
          members + "}}",
      R"({"rope_parameters": "absent", "rope_theta": 500000, "rope_scaling":
          {"type": "llama3", "rope_type": "llama3", )" +
          members + "}}"};
  for (const std::string& form : forms) {
    const RopeConfig rope = read(patched(kLlama, form)).rope;
    EXPECT_EQ(rope.theta, 500000.0);
    EXPECT_EQ(rope.scaling, RopeScaling::kLlama3);
    EXPECT_EQ(rope.factor, 8.0);
    EXPECT_EQ(rope.low_freq_factor, 1.0);
    EXPECT_EQ(rope.high_freq_factor, 4.0);
    EXPECT_EQ(rope.original_max_position_embeddings, 128);
  }
  const RopeConfig linear =
      read(patched(kLlama, R"({"rope_parameters": {"rope_type": "linear", "factor": 2,
                               "partial_rotary_factor": 1}})"))
          .rope;
  EXPECT_EQ(linear.scaling, RopeScaling::kLinear);
  EXPECT_EQ(linear.factor, 2.0);
  EXPECT_EQ(linear.theta, 10000.0);
  EXPECT_EQ(read(patched(kLlama, R"({"rope_parameters": "absent"})")).rope.theta, 10000.0);
}

TEST(ModelConfig, AbsentSizesTakeTheDefaultsOfTheirClass) {
  EXPECT_EQ(read(patched(kLlama, R"({"num_key_value_heads": "absent"})")).num_key_value_heads, 4);
  EXPECT_EQ(read(patched(kQwen2, R"({"num_key_value_heads": null})")).num_key_value_heads, 4);
  EXPECT_EQ(read(patched(kLlama, R"({"head_dim": "absent"})")).head_dim, 16);
  EXPECT_EQ(read(patched(kQwen3, R"({"head_dim": "absent"})")).head_dim, 128);
  EXPECT_EQ(read(patched(kQwen3, R"({"head_dim": null})")).head_dim, 16);
  EXPECT_EQ(read(patched(kLlama, R"({"rms_norm_eps": "absent"})")).rms_norm_eps, 1e-6);
}

TEST(ModelConfig, TheArchitectureMayBeSaidByModelTypeAlone) {
  EXPECT_EQ(read(patched(kQwen2, R"({"architectures": "absent"})")).architecture,
            "Qwen2ForCausalLM");
  EXPECT_EQ(read(patched(kQwen2, R"({"model_type": "absent"})")).architecture, "Qwen2ForCausalLM");
}

TEST(ModelConfig, EosTokensOfBothFilesJoin) {
  EXPECT_EQ(read(patched(kLlama, R"({"eos_token_id": [7, 2, 7]})"),
                 R"({"eos_token_id": [128, 2], "temperature": 0.6, "anything": {}})")
                .eos_token_ids,
            (std::vector<int32_t>{2, 7, 128}));
  EXPECT_EQ(read(kLlama, R"({"eos_token_id": 5})").eos_token_ids, (std::vector<int32_t>{2, 5}));
  EXPECT_EQ(read(kLlama, "{}").eos_token_ids, (std::vector<int32_t>{2}));
}

TEST(ModelConfig, KeysThatSayNothingAboutLogitsAreAccepted) {
  EXPECT_EQ(
      error_of(patched(kLlama, R"({"_name_or_path": "", "id2label": {"0": "A"}, "return_dict": true,
      "unk_token_id": 0, "chunk_size_feed_forward": 0, "quantization_config": null,
      "some_new_key": null, "hidden_act": "silu", "use_cache": false})")),
      "no error");
}

// What the writers of each format put into config.json (fields that say nothing more left out).
TEST(ModelConfig, QuantizedWeightsAreRefusedWithTheReason) {
  const std::string reason =
      " (DIR/config.json): expected none; quantized weights are another policy than the one that "
      "is trained, with other log-probabilities; dequantize them to bfloat16 first";
  for (const std::string key : {"quantization_config", "compression_config"}) {
    for (const std::string method : {"gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"}) {
      EXPECT_EQ(error_of(patched(
                    kLlama, "{\"" + key + R"(": {"bits": 4, "quant_method": ")" + method + "\"}}")),
                "unsupported: " + key + ".quant_method = \"" + method + "\"" + reason);
    }
    EXPECT_EQ(error_of(patched(kLlama, "{\"" + key + R"(": {"load_in_8bit": true}})")),
              "unsupported: " + key + R"( = {"load_in_8bit":true})" + reason);
  }
}

struct BadConfig {
  const char* base;
  std::string patch, error;
};

TEST(ModelConfig, WhatIsNotImplementedNamesKeyAndValue) {
  const std::string config = " (DIR/config.json): expected ";
  const std::string families =
      "one of LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, MistralForCausalLM";
  const std::vector<BadConfig> cases = {
      {kLlama, R"({"architectures": ["GemmaForCausalLM"]})",
       "architectures = \"GemmaForCausalLM\"" + config + families},
      {kLlama, R"({"architectures": ["LlamaForSequenceClassification"]})",
       "architectures = \"LlamaForSequenceClassification\"" + config + families},
      {kLlama, R"({"architectures": ["LlamaForCausalLM", "X"]})",
       "architectures = [\"LlamaForCausalLM\",\"X\"]" + config + "a list of one name"},
      {kLlama, R"({"architectures": "absent", "model_type": "gpt2"})",
       "model_type = \"gpt2\"" + config + families},
      {kLlama, R"({"architectures": "absent", "model_type": "absent"})",
       "architectures = null" + config + families},
      {kLlama, R"({"model_type": "qwen2"})",
       "model_type = \"qwen2\"" + config + "llama; architectures says LlamaForCausalLM"},
      {kLlama, R"({"hidden_act": "gelu"})", "hidden_act = \"gelu\"" + config + "\"silu\""},
      {kLlama, R"({"pretraining_tp": 2})", "pretraining_tp = 2" + config + "1"},
      {kLlama, R"({"partial_rotary_factor": 0.5})", "partial_rotary_factor = 0.5" + config + "1.0"},
      {kLlama, R"({"rope_interleaved": true})", "rope_interleaved = true" + config + "false"},
      {kLlama, R"({"logit_scale": 0.5})",
       "logit_scale = 0.5" + config + "no such key; what it changes is not built"},
      {kLlama, R"({"sliding_window": 16})",
       "sliding_window = 16" + config + "no such key; what it changes is not built"},
      {kMistral, R"({"mlp_bias": true})",
       "mlp_bias = true" + config + "false; MistralForCausalLM has none"},
      {kMistral, R"({"attention_bias": true})",
       "attention_bias = true" + config + "false; MistralForCausalLM fixes it"},
      {kQwen2, R"({"attention_bias": false})",
       "attention_bias = false" + config + "true; Qwen2ForCausalLM fixes it"},
      {kQwen2, R"({"layer_types": ["full_attention", "linear_attention", "full_attention"]})",
       "layer_types[1] = \"linear_attention\"" + config + "full_attention or sliding_attention"},
      {kQwen2, R"({"layer_types": ["full_attention", "full_attention", "sliding_attention"]})",
       "layer_types[2] = \"sliding_attention\"" + config +
           "full_attention; use_sliding_window is false or sliding_window is not given"},
      {kLlama, R"({"rope_parameters": {"rope_type": "yarn", "factor": 4}})",
       "rope_parameters.rope_type = \"yarn\"" + config + "one of default, linear, llama3"},
      {kLlama, R"({"rope_parameters": "absent", "rope_scaling": {"type": "dynamic", "factor": 4}})",
       "rope_scaling.type = \"dynamic\"" + config + "one of default, linear, llama3"},
      {kLlama, R"({"rope_parameters": {"rope_type": "linear", "factor": 4, "mscale": 2}})",
       "rope_parameters.mscale = 2" + config + "no such key; what it changes is not built"},
      {kLlama, R"({"rope_parameters": {"partial_rotary_factor": 0.25}})",
       "rope_parameters.partial_rotary_factor = 0.25" + config + "1.0"},
  };
  for (const BadConfig& bad : cases) {
    EXPECT_EQ(error_of(patched(bad.base, bad.patch)), "unsupported: " + bad.error);
  }
}

TEST(ModelConfig, WhatIsWrongNamesKeyValueAndRange) {
  const std::string config = " (DIR/config.json): expected ";
  const std::string size = config + "an integer from 1 to 16777216";
  const std::string missing = "; this key is missing";
  const std::vector<BadConfig> cases = {
      {kLlama, R"({"hidden_size": "absent"})", "hidden_size" + size + missing},
      {kLlama, R"({"hidden_size": 0})", "hidden_size = 0" + size},
      {kLlama, R"({"hidden_size": -64})", "hidden_size = -64" + size},
      {kLlama, R"({"hidden_size": 64.0})", "hidden_size = 64.0" + size},
      {kLlama, R"({"hidden_size": "64"})", "hidden_size = \"64\"" + size},
      {kLlama, R"({"vocab_size": 4294967296})", "vocab_size = 4294967296" + size},
      {kLlama, R"({"num_hidden_layers": 100000})",
       "num_hidden_layers = 100000" + config + "an integer from 1 to 4096"},
      {kLlama, R"({"num_key_value_heads": 3})",
       "num_key_value_heads = 3" + config + "a divisor of num_attention_heads = 4"},
      {kLlama, R"({"num_key_value_heads": 8})",
       "num_key_value_heads = 8" + config + "an integer from 1 to 4"},
      {kQwen2, R"({"num_key_value_heads": "absent"})",
       "num_key_value_heads" + config + "an integer from 1 to 4" + missing},
      {kLlama, R"({"head_dim": 15})",
       "head_dim = 15" + config + "an even number of at least 2; rotary embeddings turn pairs"},
      {kLlama, R"({"head_dim": "absent", "hidden_size": 66})",
       "hidden_size = 66" + config + "a multiple of num_attention_heads = 4; or a head_dim"},
      {kLlama, R"({"rms_norm_eps": 0})", "rms_norm_eps = 0" + config + "a positive number"},
      {kLlama, R"({"tie_word_embeddings": 1})",
       "tie_word_embeddings = 1" + config + "true or false"},
      {kLlama, R"({"pad_token_id": 300})",
       "pad_token_id = 300" + config + "an integer from -1 to 299"},
      {kLlama, R"({"eos_token_id": 300})",
       "eos_token_id = 300" + config + "an integer from 0 to 299"},
      {kLlama, R"({"eos_token_id": [2, -1]})",
       "eos_token_id[1] = -1" + config + "an integer from 0 to 299"},
      {kLlama, R"({"eos_token_id": "</s>"})",
       "eos_token_id = \"</s>\"" + config + "an integer from 0 to 299"},
      {kQwen2, R"({"layer_types": ["full_attention"]})",
       "layer_types = [\"full_attention\"]" + config + "a list of num_hidden_layers = 3 names"},
      {kLlama, R"({"rope_parameters": 3})", "rope_parameters = 3" + config + "a JSON object"},
      {kLlama, R"({"rope_scaling": {"type": "linear", "factor": 2}})",
       "rope_scaling = {\"factor\":2,\"type\":\"linear\"}" + config +
           "only one of rope_scaling and rope_parameters"},
      {kLlama, R"({"rope_theta": 500})",
       "rope_theta = 500.0" + config + "the same as rope_parameters.rope_theta = 10000"},
      {kLlama, R"({"rope_parameters": {"rope_type": "linear", "type": "llama3"}})",
       "rope_parameters.type = \"llama3\"" + config + "the same as rope_type"},
      {kLlama, R"({"rope_parameters": {"rope_type": "linear"}})",
       "rope_parameters.factor" + config + "a positive number" + missing},
      {kLlama, R"({"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                                       "high_freq_factor": 4}})",
       "rope_parameters.high_freq_factor = 4.0" + config + "more than low_freq_factor = 4"},
  };
  for (const BadConfig& bad : cases) {
    EXPECT_EQ(error_of(patched(bad.base, bad.patch)), "invalid_argument: " + bad.error);
  }
}

TEST(ModelConfig, FilesThatAreNoConfigAreNamed) {
  EXPECT_EQ(error_of("[]"),
            "invalid_argument: file = [] (DIR/config.json): expected a JSON object");
  EXPECT_EQ(
      error_of("{\"a\": 1,\n\"a\": 2}"),
      "invalid_argument: a (DIR/config.json): expected each key once; this key is repeated in its "
      "object");
  EXPECT_EQ(
      error_of("{\n\"a\": 01}"),
      "invalid_argument: DIR/config.json:2: expected valid JSON; syntax error while parsing object "
      "- unexpected number literal; expected '}'");
  EXPECT_EQ(
      error_of(kLlama, "{\"eos_token_id\": 1e9}"),
      "invalid_argument: eos_token_id = 1000000000.0 (DIR/generation_config.json): expected an "
      "integer from 0 to 299");
  const TemporaryFolder folder;
  EXPECT_EQ(error_text([&] { read_model_config(folder.path()); }),
            "not_found: file = " + folder.path() +
                "/config.json: cannot be opened: No such file or directory");
}

}  // namespace
}  // namespace rollpack::rollout
