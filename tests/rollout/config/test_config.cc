#include "rollout/config/config.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "tests/error_text.h"

namespace rollpack::rollout {
namespace {

using testing::error_text;

// A file that is right but for its rollout section.
Config with_rollout(const std::string& line) {
  return parse_config("model: {path: m}\nrollout:\n  " + line + "\n", "f.yaml");
}

TEST(Config, DefaultsAreThoseOfTheDesign) {
  const Config config = parse_config("model: {path: m}", "f.yaml");
  EXPECT_EQ(config.rollout, RolloutSection{});
  EXPECT_EQ(config.engine, EngineSection{});
  EXPECT_EQ(config.bridge, BridgeSection{});
  EXPECT_EQ(config.model.dtype, "bfloat16");
  EXPECT_EQ(config.rollout.temperature, 1.0);
  EXPECT_EQ(config.engine.kv_cache_memory, 2147483648);
  EXPECT_EQ(config.origin_of("model.path"), "f.yaml:1");
  EXPECT_EQ(config.origin_of("rollout.n"), "default");
}

TEST(Config, EveryKindOfValueIsRead) {
  const Config config = parse_config(
      "model:\n  path: models/x\n  dtype: float32\n"
      "rollout: {n: 4, temperature: 0.7, top_k: 50, seed: 18446744073709551615,\n"
      "          ignore_eos: true, stop_token_ids: [2, 7]}\n"
      "engine: {kv_cache_memory: 1.5GiB, batching: left_padded, share_weights: on}\n"
      "bridge: {columns: [entropy, logprobs], slot_bytes: 1000000}\ncluster:\n",
      "f.yaml");
  EXPECT_EQ(config.model.path, "models/x");
  EXPECT_EQ(config.model.dtype, "float32");
  EXPECT_EQ(config.rollout.n, 4);
  EXPECT_EQ(config.rollout.temperature, 0.7);
  EXPECT_EQ(config.rollout.top_k, 50);
  EXPECT_EQ(config.rollout.seed, 18446744073709551615u);
  EXPECT_TRUE(config.rollout.ignore_eos);
  EXPECT_EQ(config.rollout.stop_token_ids, (std::vector<int32_t>{2, 7}));
  EXPECT_EQ(config.engine.kv_cache_memory, 1610612736);
  EXPECT_EQ(config.engine.batching, "left_padded");
  EXPECT_EQ(config.engine.share_weights, "on");
  EXPECT_EQ(config.bridge.columns, (std::vector<std::string>{"entropy", "logprobs"}));
  EXPECT_EQ(config.bridge.slot_bytes, 1000000);
}

TEST(Config, QuantizationIsRefusedWithTheReason) {
  const std::string weights =
      " (f.yaml:2): expected no quantization; quantized weights are another policy than the one "
      "that is trained, with other log-probabilities; remove the key";
  const std::string cache =
      " (f.yaml:2): expected no quantization; keys and values are held in model.dtype: quantized "
      "ones would give other log-probabilities than the trainer's; remove the key";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"engine.kv_cache_dtype = fp8", cache},  {"engine.kv_cache_dtype = fp8_e4m3", cache},
      {"engine.kv_cache_dtype = int8", cache}, {"engine.cache_type_k = q8_0", cache},
      {"rollout.kv_cache_dtype = fp8", cache}, {"engine.quantization = fp8", weights},
      {"engine.quantization = awq", weights},  {"rollout.quantization = gptq", weights},
      {"model.quantization = fp8", weights},   {"model.load_in_8bit = true", weights},
      {"model.load_in_4bit = true", weights}};
  for (const auto& [assignment, reason] : cases) {
    const size_t point = assignment.find('.'), equals = assignment.find(" = ");
    const std::string yaml = "model: {path: m}\n" + assignment.substr(0, point) + ": {" +
                             assignment.substr(point + 1, equals - point - 1) + ": " +
                             assignment.substr(equals + 3) + "}\n";
    if (assignment.starts_with("model.")) {
      const std::string set = assignment.substr(0, equals) + "=" + assignment.substr(equals + 3);
      EXPECT_EQ(error_text([&] { parse_config("model: {path: m}\n", "f.yaml", {set}); }),
                "unsupported: " + assignment + " (--set)" + reason.substr(11));
    } else {
      EXPECT_EQ(error_text([&] { parse_config(yaml, "f.yaml"); }),
                "unsupported: " + assignment + reason);
    }
  }
  for (const std::string dtype : {"int8", "int4", "fp8", "float8_e4m3fn", "nvfp4"}) {
    EXPECT_EQ(error_text([&] { parse_config("model: {path: m, dtype: " + dtype + "}", "f.yaml"); }),
              "unsupported: model.dtype = " + dtype +
                  " (f.yaml:1): expected one of bfloat16, float32; a quantized policy has other "
                  "log-probabilities than the trained one");
  }
}

TEST(Config, TopKOffIsMinusOneZeroOrNull) {
  for (const char* value : {"-1", "0", "null", "~", ""}) {
    EXPECT_EQ(with_rollout(std::string("top_k: ") + value).rollout.top_k, -1) << value;
  }
}

TEST(Config, NamesOfOtherLibrariesMeanTheSameField) {
  for (const char* name : {"num_generations", "n_samples_per_prompt", "n"}) {
    EXPECT_EQ(with_rollout(std::string(name) + ": 3").rollout.n, 3) << name;
  }
  for (const char* name : {"max_new_tokens", "max_completion_length", "response_length"}) {
    EXPECT_EQ(with_rollout(std::string(name) + ": 33").rollout.response_length, 33) << name;
  }
}

TEST(Config, SizesTakeUnits) {
  const std::vector<std::pair<std::string, int64_t>> cases = {
      {"4096", 4096},        {"64KiB", 65536},       {"64 MiB", 67108864},
      {"2GiB", 2147483648},  {"1.5GB", 1500000000},  {"1TiB", int64_t{1} << 40},
      {"5000B", 5000},       {"8kB", 8000},          {"8KB", 8000},
      {"0.5GiB", 536870912}, {"1.000001MB", 1000001}};
  for (const auto& [text, bytes] : cases) {
    const std::string yaml = "model: {path: m}\nengine: {kv_cache_memory: " + text + "}\n";
    EXPECT_EQ(parse_config(yaml, "f").engine.kv_cache_memory, bytes) << text;
  }
}

TEST(Config, ByteOrderMarkAndWindowsLinesAreRead) {
  const Config config =
      parse_config("\xEF\xBB\xBFmodel:\r\n  path: m\r\nrollout:\r\n  n: 2\r\n", "f");
  EXPECT_EQ(config.model.path, "m");
  EXPECT_EQ(config.rollout.n, 2);
}

TEST(Config, OverridesWinOverTheFileAndItsAliases) {
  const Config config = parse_config(
      "model: {path: m}\nrollout: {num_generations: 4}\n", "f.yaml",
      {"rollout.n=2", "rollout.n=16", "model.path=a b #1", "rollout.stop_token_ids=[1, 2]",
       "rollout.top_k=", "rollout.max_new_tokens=8", "model.dtype='float32'"});
  EXPECT_EQ(config.rollout.n, 16);
  EXPECT_EQ(config.model.path, "a b #1");
  EXPECT_EQ(config.rollout.stop_token_ids, (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(config.rollout.top_k, -1);
  EXPECT_EQ(config.rollout.response_length, 8);
  EXPECT_EQ(config.model.dtype, "float32");
  EXPECT_EQ(config.origin_of("rollout.n"), "--set");
}

struct BadLine {
  std::string line, error;
};

// Each stands as the only key of section rollout, in line 3.
TEST(Config, BadRolloutValuesNameFieldValueLineAndWhatIsAllowed) {
  const std::string real = "expected 0 (greedy) or a number from 1e-5 to 1e5";
  const std::vector<BadLine> cases = {
      {"n: 0", "rollout.n = 0 (f.yaml:3): expected an integer from 1 to 65536"},
      {"n: -1", "rollout.n = -1 (f.yaml:3): expected an integer from 1 to 65536"},
      {"n: 1000000000", "rollout.n = 1000000000 (f.yaml:3): expected an integer from 1 to 65536"},
      {"n: 99999999999999999999",
       "rollout.n = 99999999999999999999 (f.yaml:3): expected an integer from 1 to 65536; it is "
       "out "
       "of range"},
      {"n: 1.5", "rollout.n = 1.5 (f.yaml:3): expected an integer from 1 to 65536"},
      {"n: 1e3", "rollout.n = 1e3 (f.yaml:3): expected an integer from 1 to 65536"},
      {"n: 0x10", "rollout.n = 0x10 (f.yaml:3): expected an integer from 1 to 65536"},
      {"n: 1_000", "rollout.n = 1_000 (f.yaml:3): expected an integer from 1 to 65536"},
      {"n: 010",
       "rollout.n = 010 (f.yaml:3): expected an integer from 1 to 65536; a leading zero is octal "
       "in "
       "YAML 1.1 and decimal in 1.2: write 10"},
      {"n: yes",
       "rollout.n = yes (f.yaml:3): expected an integer from 1 to 65536; YAML 1.1 reads this word "
       "as "
       "a boolean"},
      {"n: \"8\"",
       "rollout.n = \"8\" (f.yaml:3): expected an integer from 1 to 65536; remove the quotes"},
      {"n: ",
       "rollout.n = null (f.yaml:3): expected an integer from 1 to 65536; leave the key out to "
       "keep "
       "its default"},
      {"n: [8]", "rollout.n = a list (f.yaml:3): expected an integer from 1 to 65536"},
      {"num_generations: 0",
       "rollout.num_generations = 0 (f.yaml:3): expected an integer from 1 to 65536"},
      {"temperature: -1", "rollout.temperature = -1 (f.yaml:3): " + real},
      {"temperature: 1e-6", "rollout.temperature = 1e-6 (f.yaml:3): " + real},
      {"temperature: .nan",
       "rollout.temperature = .nan (f.yaml:3): " + real + "; it must be finite"},
      {"temperature: .inf",
       "rollout.temperature = .inf (f.yaml:3): " + real + "; it must be finite"},
      {"temperature: 1e400",
       "rollout.temperature = 1e400 (f.yaml:3): " + real + "; it does not fit a 64-bit float"},
      {"temperature: hot", "rollout.temperature = hot (f.yaml:3): " + real},
      {"temperature: 07", "rollout.temperature = 07 (f.yaml:3): " + real +
                              "; a leading zero is octal in YAML 1.1: remove it"},
      {"top_p: 0", "rollout.top_p = 0 (f.yaml:3): expected a number above 0, at most 1"},
      {"top_p: 1.01", "rollout.top_p = 1.01 (f.yaml:3): expected a number above 0, at most 1"},
      {"min_p: -0.1", "rollout.min_p = -0.1 (f.yaml:3): expected a number from 0 to 1"},
      {"top_k: -2",
       "rollout.top_k = -2 (f.yaml:3): expected a positive integer, or -1, 0 or null for off"},
      {"seed: -1",
       "rollout.seed = -1 (f.yaml:3): expected an integer from 0 to 18446744073709551615"},
      {"seed: 18446744073709551616",
       "rollout.seed = 18446744073709551616 (f.yaml:3): expected an integer from 0 to "
       "18446744073709551615; it is out of range"},
      {"ignore_eos: yes",
       "rollout.ignore_eos = yes (f.yaml:3): expected true or false; write true"},
      {"ignore_eos: Off",
       "rollout.ignore_eos = Off (f.yaml:3): expected true or false; write false"},
      {"ignore_eos: 1", "rollout.ignore_eos = 1 (f.yaml:3): expected true or false"},
      {"stop_token_ids: 2",
       "rollout.stop_token_ids = 2 (f.yaml:3): expected a list of at most 1024 token ids, integers "
       "from 0 to 2147483647; write [1, 2], or [] for none"},
      {"stop_token_ids: [1, -2]",
       "rollout.stop_token_ids = a list (f.yaml:3): expected a list of at most 1024 token ids, "
       "integers from 0 to 2147483647; entry 1 is -2"},
      {"prompt_overflow: truncate",
       "rollout.prompt_overflow = truncate (f.yaml:3): expected one of error, skip, truncate_left"},
      {"min_tokens: 300",
       "rollout.min_tokens = 300 (f.yaml:3): expected at most rollout.response_length = 256"},
      {"tempratur: 1",
       "rollout.tempratur = 1 (f.yaml:3): expected one of the keys n, temperature, top_k, top_p, "
       "min_p, seed, prompt_length, response_length, min_tokens, ignore_eos, stop_token_ids, "
       "prompt_overflow, logprobs_mode; did you mean temperature?"},
      {"max_num_seqs: 8",
       "rollout.max_num_seqs = 8 (f.yaml:3): expected one of the keys n, temperature, top_k, "
       "top_p, "
       "min_p, seed, prompt_length, response_length, min_tokens, ignore_eos, stop_token_ids, "
       "prompt_overflow, logprobs_mode; max_num_seqs is a key of engine"},
      {"n: 2\n  n: 3", "n (f.yaml:4): expected each key once; it stands in line 3 already"},
      {"n: 2\n  num_generations: 3",
       "rollout.num_generations (f.yaml:4): expected one name of a field; n at f.yaml:3 means the "
       "same"},
      {"response_length: 2\n  max_new_tokens: 3",
       "rollout.max_new_tokens (f.yaml:4): expected one name of a field; response_length at "
       "f.yaml:3 "
       "means the same"},
  };
  for (const BadLine& bad : cases) {
    EXPECT_EQ(error_text([&] { with_rollout(bad.line); }), "invalid_argument: " + bad.error);
  }
}

TEST(Config, BadFilesNameLineAndReason) {
  const std::vector<BadLine> cases = {
      {"model: {path: m, dtype: float16}",
       "invalid_argument: model.dtype = float16 (f.yaml:1): expected one of bfloat16, float32"},
      {"rollout: {n: 1}",
       "invalid_argument: model.path (default): expected a Hugging Face folder; it has no default"},
      {"model: {path: \"\"}",
       "invalid_argument: model.path = \"\" (f.yaml:1): expected text of 1 to 4096 bytes"},
      {"model: {path: \"a\\Nb\"}",
       "invalid_argument: model.path = \"a\x85"
       "b\" (f.yaml:1): expected text of 1 to 4096 bytes; an escape in it makes no UTF-8; write "
       "the "
       "character itself"},
      {"model: {path: }",
       "invalid_argument: model.path = null (f.yaml:1): expected text of 1 to 4096 bytes"},
      {"model: m", "invalid_argument: model = m (f.yaml:1): expected a map of keys"},
      {"model: {path: m}\nrolout: {n: 1}",
       "invalid_argument: rolout (f.yaml:2): expected one of the sections model, rollout, engine, "
       "reference_model, bridge, cluster, metrics, log; did you mean rollout?"},
      {"model: {path: m}\ncluster: {size: 2}",
       "invalid_argument: cluster.size = 2 (f.yaml:2): expected one of the keys lease_s, "
       "replace_lost, journal, interface, port, num_ports"},
      {"model: {path: m}\nengine: {kv_cache_memory: 2G}",
       "invalid_argument: engine.kv_cache_memory = 2G (f.yaml:2): expected bytes from 4KiB to "
       "64TiB, "
       "as 64MiB, 2GiB or a plain number; units are KiB, MiB, GiB, TiB (powers of 1024) and kB, "
       "MB, "
       "GB, TB (of 1000)"},
      {"model: {path: m}\nengine: {kv_cache_memory: 0.3B}",
       "invalid_argument: engine.kv_cache_memory = 0.3B (f.yaml:2): expected bytes from 4KiB to "
       "64TiB, as 64MiB, 2GiB or a plain number; it is no whole number of bytes below 2^63"},
      {"model: {path: m}\nengine: {kv_cache_memory: 9999999TiB}",
       "invalid_argument: engine.kv_cache_memory = 9999999TiB (f.yaml:2): expected bytes from 4KiB "
       "to 64TiB, as 64MiB, 2GiB or a plain number; it is no whole number of bytes below 2^63"},
      {"model: {path: m}\nengine: {kv_cache_memory: 100}",
       "invalid_argument: engine.kv_cache_memory = 100 (f.yaml:2): expected bytes from 4KiB to "
       "64TiB, as 64MiB, 2GiB or a plain number"},
      {"model: {path: m}\nengine: {batching: packed}",
       "invalid_argument: engine.batching = packed (f.yaml:2): expected one of continuous, "
       "prepacked, left_padded, length_sorted"},
      {"model: {path: m}\nengine: {tensor_model_parallel_size: 2, share_weights: on}",
       "unsupported: engine.share_weights = on (f.yaml:2): expected auto or off; ranks that hold "
       "different parts of the weights cannot share a copy: engine.tensor_model_parallel_size is "
       "not 1"},
      {"model: {path: m}\nengine: {tensor_model_parallel_size: 2, backend: reference}",
       "unsupported: engine.backend = reference (f.yaml:2): expected another one; it holds whole "
       "models only: engine.tensor_model_parallel_size is not 1"},
      {"model: {path: m}\nreference_model: {path: r}\nengine: {tensor_model_parallel_size: 2}",
       "unsupported: reference_model.path = r (f.yaml:2): expected none; it is held whole by every "
       "rank; engine.tensor_model_parallel_size is not 1"},
      {"model: {path: m}\nengine: {enable_chunked_prefill: false, max_num_batched_tokens: 100}",
       "invalid_argument: engine.max_num_batched_tokens = 100 (f.yaml:2): expected at least "
       "rollout.prompt_length = 512; without chunked prefill a prompt must fit one step"},
      {"model: {path: m}\nbridge: {columns: [logprob]}",
       "invalid_argument: bridge.columns = a list (f.yaml:2): expected a list of some of logprobs, "
       "scaled_logprobs, support_logmass, entropy; logprob is none of them"},
      {"model: {path: m}\nbridge: {columns: [entropy, entropy]}",
       "invalid_argument: bridge.columns = a list (f.yaml:2): expected a list of some of logprobs, "
       "scaled_logprobs, support_logmass, entropy; entropy is listed twice"},
      {"model: {path: m}\nbridge: {socket: " + std::string(108, 's') + "}",
       "invalid_argument: bridge.socket = " + std::string(108, 's') +
           " (f.yaml:2): expected text of 1 to 107 bytes"},
  };
  for (const BadLine& bad : cases) {
    EXPECT_EQ(error_text([&] { parse_config(bad.line, "f.yaml"); }), bad.error);
  }
}

// "section.field" of every number that the configuration has.
std::vector<std::string> number_fields() {
  std::vector<std::string> names;
  const Config config;
  Config::sections(config, [&](std::string_view section, const auto& values, auto&&...) {
    using Section = std::decay_t<decltype(values)>;
    Section::fields(values, [&](std::string_view field, const auto& value, auto&&...) {
      using Value = std::decay_t<decltype(value)>;
      if constexpr (std::is_arithmetic_v<Value> && !std::is_same_v<Value, bool>) {
        names.push_back(std::string(section) + "." + std::string(field));
      }
    });
  });
  return names;
}

TEST(Config, EveryNumberRefusesWhatIsNoneOrFarOutOfRange) {
  const std::vector<std::string> fields = number_fields();
  EXPECT_GT(fields.size(), 20u);
  for (const std::string& field : fields) {
    for (const char* text : {".nan", ".inf", "-.inf", "nan", "1e400", "-1e400", "0x7", "1_0", "010",
                             "yes", "one", "\"1\"", "[1]", "--1", "1 2", "1e", "",
                             "999999999999999999999999999", "-999999999999999999999999999"}) {
      if (field == "rollout.top_k" && std::string_view(text).empty()) continue;  // null is off
      const std::string error =
          error_text([&] { parse_config("model: {path: m}", "f", {field + "=" + text}); });
      EXPECT_EQ(error.rfind("invalid_argument: " + field + " = ", 0), 0u) << text << ": " << error;
    }
  }
}

TEST(Config, TooManyStopTokensAreRefusedWithTheirNumber) {
  std::string list = "stop_token_ids: [0";
  for (int i = 1; i < 1025; ++i) list.append(",").append(std::to_string(i));
  EXPECT_EQ(error_text([&] { with_rollout(list + "]"); }),
            "invalid_argument: rollout.stop_token_ids = a list (f.yaml:3): expected a list of at "
            "most 1024 token ids, integers from 0 to 2147483647; it lists 1025");
}

TEST(Config, BadOverridesNameTheFlag) {
  const auto with = [](const std::string& text) {
    return error_text([&] { parse_config("model: {path: m}", "f", {text}); });
  };
  EXPECT_EQ(with("rollout.n"),
            "invalid_argument: --set = rollout.n: expected section.key=value, as rollout.n=4");
  EXPECT_EQ(with("n=4"),
            "invalid_argument: --set = n=4: expected section.key=value, as rollout.n=4");
  EXPECT_EQ(with("rollout.n=yes"),
            "invalid_argument: rollout.n = yes (--set): expected an integer from 1 to 65536; YAML "
            "1.1 reads this word as a boolean");
  EXPECT_EQ(with("engin.batching=x"),
            "invalid_argument: engin (--set): expected one of the sections model, rollout, engine, "
            "reference_model, bridge, cluster, metrics, log; did you mean engine?");
  EXPECT_EQ(with("rollout.stop_token_ids=[1"),
            "invalid_argument: --set:1: expected keys that are words; this one is a list: is a "
            "bracket open?");
}

TEST(Config, AMissingFileAndAFolderAreNamed) {
  EXPECT_EQ(
      error_text([] { load_config("/nonexistent/f.yaml"); }),
      "not_found: --config = /nonexistent/f.yaml: cannot be opened: No such file or directory");
  EXPECT_EQ(error_text([] { load_config("/"); }),
            "invalid_argument: --config = /: expected a regular file; this is a folder");
  EXPECT_EQ(error_text([] { load_config("/dev/zero"); }),
            "invalid_argument: --config = /dev/zero: expected a regular file; this is a device");
}

}  // namespace
}  // namespace rollpack::rollout
