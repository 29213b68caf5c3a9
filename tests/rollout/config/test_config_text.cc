#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "rollout/config/config.h"
#include "tests/error_text.h"
#include "tests/rollout/temporary_folder.h"

namespace rollpack::rollout {
namespace {

// Every field off its default, with values that are hard to print.
Config unusual() {
  Config config;
  config.model = {.path = "models/with space: #1", .dtype = "float32"};
  config.rollout.n = 3;
  config.rollout.temperature = 1e-5;
  config.rollout.top_k = 20;
  config.rollout.top_p = 0.1 + 0.2;
  config.rollout.min_p = 1.0 / 3;
  config.rollout.seed = 18446744073709551615u;
  config.rollout.prompt_length = 100;
  config.rollout.response_length = 50;
  config.rollout.min_tokens = 7;
  config.rollout.ignore_eos = true;
  config.rollout.stop_token_ids = {0, 2147483647};
  config.rollout.prompt_overflow = "truncate_left";
  config.rollout.logprobs_mode = "raw_logprobs";
  config.engine = {.backend = "reference",
                   .batching = "left_padded",
                   .max_num_seqs = 1,
                   .max_num_batched_tokens = 1,
                   .enable_chunked_prefill = false,
                   .enable_prefix_caching = false,
                   .enforce_eager = true,
                   .cpu_amx = true,
                   .kv_cache_memory = 123457,
                   .num_threads = 2,
                   .speculation = "on",
                   .num_speculative_tokens = 64,
                   .share_weights = "off"};
  config.bridge = {.socket = "on",
                   .endpoints = "per_node",
                   .slots = 253,
                   .slot_bytes = 1536 << 10,
                   .layout = "padded",
                   .max_tokens_per_row = 4096,
                   .prompt_width = 64,
                   .response_width = 128,
                   .pad_to_multiple_of = 32,
                   .max_version_lag = 2,
                   .columns = {"entropy", "logprobs"}};
  return config;
}

void expect_equal(const Config& got, const Config& want) {
  EXPECT_EQ(got.model, want.model);
  EXPECT_EQ(got.rollout, want.rollout);
  EXPECT_EQ(got.engine, want.engine);
  EXPECT_EQ(got.bridge, want.bridge);
}

TEST(ConfigText, PrintedYamlReadsBackAsTheSameValues) {
  for (const bool with_comments : {false, true}) {
    const std::string text = config_yaml(unusual(), with_comments);
    expect_equal(parse_config(text, "printed"), unusual());
    EXPECT_EQ(config_yaml(parse_config(text, "printed"), with_comments), text);
  }
}

// What other YAML readers would take for a boolean or a text is printed so that they do not.
TEST(ConfigText, PrintedYamlMeansTheSameInYaml11) {
  const std::string text = config_yaml(unusual());
  EXPECT_NE(text.find("share_weights: \"off\"\n"), std::string::npos) << text;
  EXPECT_NE(text.find("socket: \"on\"\n"), std::string::npos);
  EXPECT_NE(text.find("temperature: 1.0e-05\n"), std::string::npos);
  EXPECT_NE(text.find("path: \"models/with space: #1\"\n"), std::string::npos);
  EXPECT_NE(text.find("slot_bytes: 1536KiB\n"), std::string::npos);
  EXPECT_NE(text.find("kv_cache_memory: 123457\n"), std::string::npos);
}

TEST(ConfigText, JsonHoldsEveryFieldWithItsType) {
  Config config;
  config.model.path = "m";
  config.rollout.stop_token_ids = {1, 2};
  config.bridge.columns = {"entropy"};
  EXPECT_EQ(config_json(config),
            R"({"model":{"path":"m","dtype":"bfloat16","load_format":"auto"},)"
            R"("rollout":{"n":8,"temperature":1.0,)"
            R"("top_k":-1,"top_p":1.0,"min_p":0.0,"seed":0,"prompt_length":512,)"
            R"("response_length":256,"min_tokens":0,"ignore_eos":false,"stop_token_ids":[1, 2],)"
            R"("prompt_overflow":"error","logprobs_mode":"processed_logprobs"},)"
            R"("engine":{"backend":"auto","batching":"continuous","max_num_seqs":256,)"
            R"("max_num_batched_tokens":2048,"enable_chunked_prefill":true,)"
            R"("enable_prefix_caching":true,"enforce_eager":false,"cpu_amx":false,)"
            R"("kv_cache_memory":2147483648,"num_threads":0,)"
            R"("speculation":"auto","num_speculative_tokens":5,)"
            R"("share_weights":"auto","tensor_model_parallel_size":1},)"
            R"("reference_model":{"path":"","kv_cache_memory":536870912},)"
            R"("bridge":{"socket":"run/rollpack.sock","endpoints":"rank0","slots":4,)"
            R"("slot_bytes":67108864,"layout":"packed","max_tokens_per_row":16384,)"
            R"("prompt_width":0,"response_width":0,"pad_to_multiple_of":1,)"
            R"("max_version_lag":-1,"columns":["entropy"]},)"
            R"("cluster":{"lease_s":30.0,"replace_lost":true,"journal":"","interface":"",)"
            R"("port":0,"num_ports":64},)"
            R"("metrics":{"port":-1},"log":{"level":"info","format":"text"}})");
}

TEST(ConfigText, HelpListsEveryFieldWithRangeDefaultAndAliases) {
  const std::string help = config_help();
  EXPECT_NE(help.find("  rollout.n: samples a prompt\n"
                      "      an integer from 1 to 65536; default 8\n"
                      "      also num_generations, n_samples_per_prompt\n"),
            std::string::npos)
      << help;
  const Config defaults;
  Config::sections(defaults, [&](const std::string& name, const auto& section, const char*) {
    section.fields(
        section, [&](const std::string& key, const auto&, const auto&, const char*, Aliases = {}) {
          EXPECT_NE(help.find("  " + name + "." + key + ": "), std::string::npos) << key;
        });
  });
}

TEST(ConfigText, DefaultYamlIsWhatTheProgramHas) {
  const std::string path = ROLLPACK_CONFIGS_DIR "/default.yaml";
  const Config config = load_config(path);
  Config defaults;
  defaults.model.path = "models/smollm2-135m";
  expect_equal(config, defaults);
  std::ifstream in(path);
  const std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  const std::string printed = config_yaml(defaults, /*with_comments=*/true);
  ASSERT_GE(text.size(), printed.size());
  EXPECT_EQ(text.substr(text.size() - printed.size()), printed);
}

TEST(ConfigText, QuickstartYamlIsRead) {
  const Config config = load_config(ROLLPACK_CONFIGS_DIR "/quickstart.yaml");
  EXPECT_EQ(config.rollout.n, 8);
  EXPECT_EQ(config.rollout.response_length, 20);
  EXPECT_EQ(config.engine.kv_cache_memory, 256 << 20);
}

TEST(ConfigText, EveryYamlOfConfigsIsRead) {
  int num_files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(ROLLPACK_CONFIGS_DIR)) {
    if (entry.path().extension() != ".yaml") continue;
    ++num_files;
    const std::string name = entry.path().stem().string();
    const Config config = load_config(entry.path().string());
    const bool is_cuda = name.rfind("cuda_", 0) == 0;
    EXPECT_EQ(config.engine.backend, is_cuda ? "cuda" : "auto") << name;
    const int32_t ranks = name == "cuda_tp8"                                ? 8
                          : name == "cuda_tp2" || name == "tensor_parallel" ? 2
                                                                            : 1;
    EXPECT_EQ(config.engine.tensor_model_parallel_size, ranks) << name;
  }
  EXPECT_GE(num_files, 9);
}

TEST(ConfigText, AFileAboveOneMegabyteIsRefused) {
  const testing::TemporaryFolder folder;
  const std::string path = folder.write("big.yaml", std::string((1 << 20) + 1, '#'));
  EXPECT_EQ(testing::error_text([&] { load_config(path); }),
            "invalid_argument: --config = " + path +
                ": expected a file of at most 1048576 bytes; this one has 1048577");
}

}  // namespace
}  // namespace rollpack::rollout
