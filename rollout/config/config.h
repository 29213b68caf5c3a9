// The configuration: one struct a YAML section, each field listed once in its fields() function
// with its rule (field_rules.h), help and accepted aliases. Parsing, checking, printing and help
// are visitors over that list.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "rollout/config/field_rules.h"

namespace rollpack::rollout {

// Other libraries' names of a field.
using Aliases = std::initializer_list<std::string_view>;

struct ModelSection {
  std::string path;
  std::string dtype = "bfloat16";
  std::string load_format = "auto";

  bool operator==(const ModelSection&) const = default;

  template <class Self, class Field>
  static void fields(Self& self, Field&& field) {
    field("path", self.path, Text{}, "a Hugging Face folder: config.json and *.safetensors");
    field("dtype", self.dtype, ComputeDType{},
          "of weights, matrix products and KV cache; float32 keeps everything in 32 bits");
    field("load_format", self.load_format, OneOf{{"auto", "dummy"}},
          "auto reads the folder's weights; dummy makes random ones, for benchmarks");
  }
};

struct RolloutSection {
  int32_t n = 8;
  double temperature = 1.0;
  int32_t top_k = -1;
  double top_p = 1.0;
  double min_p = 0.0;
  uint64_t seed = 0;
  int32_t prompt_length = 512;
  int32_t response_length = 256;
  int32_t min_tokens = 0;
  bool ignore_eos = false;
  std::vector<int32_t> stop_token_ids;
  std::string prompt_overflow = "error";
  std::string logprobs_mode = "processed_logprobs";

  bool operator==(const RolloutSection&) const = default;

  template <class Self, class Field>
  static void fields(Self& self, Field&& field) {
    field("n", self.n, Between{1, 65536}, "samples a prompt",
          Aliases{"num_generations", "n_samples_per_prompt"});
    field("temperature", self.temperature, Temperature{}, "divides the logits; 0 is greedy");
    field("top_k", self.top_k, TopK{}, "keep the k likeliest tokens; -1 is off");
    field("top_p", self.top_p, Real{.min = 0, .max = 1, .is_min_allowed = false},
          "keep the likeliest tokens up to this mass, the crossing one included; 1 is off");
    field("min_p", self.min_p, Real{.min = 0, .max = 1},
          "drop tokens less likely than this share of the likeliest; 0 is off");
    field("seed", self.seed, Seed{}, "of the sampler; change it where prompts repeat");
    field("prompt_length", self.prompt_length, Between{1, 1 << 24}, "longest prompt, tokens");
    field("response_length", self.response_length, Between{1, 1 << 24}, "longest response, tokens",
          Aliases{"max_new_tokens", "max_completion_length"});
    field("min_tokens", self.min_tokens, Between{0, 1 << 24},
          "no stop token before this many response tokens");
    field("ignore_eos", self.ignore_eos, Flag{}, "do not stop at the model's EOS tokens");
    field("stop_token_ids", self.stop_token_ids, TokenIds{},
          "tokens that end a response, besides the model's EOS tokens");
    field("prompt_overflow", self.prompt_overflow, OneOf{{"error", "skip", "truncate_left"}},
          "what becomes of a prompt longer than prompt_length");
    field("logprobs_mode", self.logprobs_mode, OneOf{{"processed_logprobs", "raw_logprobs"}},
          "what rollout_log_probs holds: the policy as sampled from, or temperature 1 untruncated");
  }
};

struct EngineSection {
  std::string backend = "auto";
  std::string batching = "continuous";
  int32_t max_num_seqs = 256;
  int32_t max_num_batched_tokens = 2048;
  bool enable_chunked_prefill = true;
  bool enable_prefix_caching = true;
  bool enforce_eager = false;
  bool cpu_amx = false;
  int64_t kv_cache_memory = int64_t{2} << 30;
  int32_t num_threads = 0;
  std::string speculation = "auto";
  int32_t num_speculative_tokens = 5;
  std::string share_weights = "auto";
  int32_t tensor_model_parallel_size = 1;

  bool operator==(const EngineSection&) const = default;

  template <class Self, class Field>
  static void fields(Self& self, Field&& field) {
    field("backend", self.backend, OneOf{{"auto", "cuda", "cpu", "reference"}},
          "what computes; auto takes the best this machine runs");
    field("batching", self.batching,
          OneOf{{"continuous", "prepacked", "left_padded", "length_sorted"}},
          "how sequences form steps; the results are the same bits");
    field("max_num_seqs", self.max_num_seqs, Between{1, 65536}, "sequences running at once");
    field("max_num_batched_tokens", self.max_num_batched_tokens, Between{1, 1 << 20},
          "rows of one step, prefill and decode together");
    field("enable_chunked_prefill", self.enable_chunked_prefill, Flag{},
          "let one prompt span several steps");
    field("enable_prefix_caching", self.enable_prefix_caching, Flag{},
          "compute a prompt once for its group, a common beginning once for all; false: once a "
          "sample");
    field("enforce_eager", self.enforce_eager, Flag{},
          "cuda: launch each kernel of a decoding step, instead of graphs captured at start; same "
          "bits");
    field("cpu_amx", self.cpu_amx, Flag{},
          "cpu: bfloat16 products by Intel AMX: faster, bits of their own, the same in any batch");
    field("kv_cache_memory", self.kv_cache_memory, Bytes{int64_t{4} << 10, int64_t{64} << 40},
          "of the KV cache of a rank");
    field("num_threads", self.num_threads, Between{0, 1024},
          "compute threads of a rank; 0: the cores that affinity and cgroups leave it, shared by "
          "ranks");
    field("speculation", self.speculation, OneOf{{"auto", "on", "off"}},
          "verify guessed tokens beside decoding rows, same bits; auto: where it has paid");
    field("num_speculative_tokens", self.num_speculative_tokens, Between{1, 64},
          "most tokens guessed at once for a sequence");
    field("share_weights", self.share_weights, OneOf{{"auto", "on", "off"}},
          "one packed copy of the weights for all ranks of a node");
    field("tensor_model_parallel_size", self.tensor_model_parallel_size, Between{1, 1024},
          "ranks of one host that hold a model together, each a part of it; same bits");
  }
};

struct ReferenceModelSection {
  std::string path;
  int64_t kv_cache_memory = int64_t{512} << 20;

  bool operator==(const ReferenceModelSection&) const = default;

  template <class Self, class Field>
  static void fields(Self& self, Field&& field) {
    field("path", self.path, Text{.min_bytes = 0},
          "a Hugging Face folder of model.path's vocabulary; its logprobs become the column "
          "ref_log_prob");
    field("kv_cache_memory", self.kv_cache_memory, Bytes{int64_t{4} << 10, int64_t{64} << 40},
          "of its KV cache, a rank");
  }
};

struct BridgeSection {
  std::string socket = "run/rollpack.sock";
  std::string endpoints = "rank0";
  int32_t slots = 4;
  int64_t slot_bytes = int64_t{64} << 20;
  std::string layout = "packed";
  int32_t max_tokens_per_row = 16384;
  int32_t prompt_width = 0;
  int32_t response_width = 0;
  int32_t pad_to_multiple_of = 1;
  int32_t max_version_lag = -1;
  std::vector<std::string> columns;

  bool operator==(const BridgeSection&) const = default;

  template <class Self, class Field>
  static void fields(Self& self, Field&& field) {
    // sockaddr_un holds 108 bytes, the final NUL included.
    field("socket", self.socket, Text{.max_bytes = 107},
          "Unix socket for trainers, relative to the working directory; {host} in it: the host's "
          "name");
    field(
        "endpoints", self.endpoints, OneOf{{"rank0", "per_node"}},
        "where there is such a socket: on rank 0's node, or on every node for the trainers there");
    // hello hands all slots over in one message, and Linux passes at most 253 descriptors in one.
    field("slots", self.slots, Between{1, 253}, "batches in shared memory at once");
    field("slot_bytes", self.slot_bytes, Bytes{int64_t{4} << 10, int64_t{1} << 40},
          "largest batch; memory taken is slots times this");
    field("layout", self.layout, OneOf{{"packed", "padded"}}, "of a batch");
    field("max_tokens_per_row", self.max_tokens_per_row, Between{1, 1 << 24},
          "packed layout: most tokens of one row (micro-batch)");
    field("prompt_width", self.prompt_width, Between{0, 1 << 24},
          "padded layout: columns of prompts; 0: the batch's longest");
    field("response_width", self.response_width, Between{0, 1 << 24},
          "padded layout: columns of responses; 0: the batch's longest");
    field("pad_to_multiple_of", self.pad_to_multiple_of, Between{1, 1 << 16},
          "padded layout: widths are a multiple of this");
    field("max_version_lag", self.max_version_lag, Between{-1, 1 << 30},
          "samples with a token drawn more weight versions ago end as errors; -1: none do");
    field("columns", self.columns,
          SubsetOf{{"logprobs", "scaled_logprobs", "support_logmass", "entropy"}},
          "further columns of a batch, besides rollout_log_probs");
  }
};

struct ClusterSection {
  double lease_s = 30.0;
  bool replace_lost = true;
  std::string journal;
  std::string interface;
  int32_t port = 0;
  int32_t num_ports = 64;

  bool operator==(const ClusterSection&) const = default;

  template <class Self, class Field>
  static void fields(Self& self, Field&& field) {
    field(
        "lease_s", self.lease_s, Real{.min = 0.5, .max = 86400},
        "seconds; a rank that has work and shows no progress for so long is killed, others go on");
    field("replace_lost", self.replace_lost, Flag{}, "start another worker in a lost rank's place");
    field("journal", self.journal, Text{.min_bytes = 0},
          "serve: a local file by which what was accepted and not released outlives a restart");
    field(
        "interface", self.interface, Text{.max_bytes = 64, .min_bytes = 0},
        "network interface or address where rank 0 listens for ranks of other nodes; \"\": all of "
        "its host");
    field("port", self.port, Between{0, 65535}, "first TCP port it tries there; 0: any free one");
    field("num_ports", self.num_ports, Between{1, 65535}, "ports it tries, one after the other");
  }
};

struct MetricsSection {
  int32_t port = -1;

  bool operator==(const MetricsSection&) const = default;

  template <class Self, class Field>
  static void fields(Self& self, Field&& field) {
    field("port", self.port, Between{-1, 65535},
          "of 127.0.0.1, where serve answers /metrics and /health; 0: any free one; -1: none");
  }
};

struct LogSection {
  std::string level = "info";
  std::string format = "text";

  bool operator==(const LogSection&) const = default;

  template <class Self, class Field>
  static void fields(Self& self, Field&& field) {
    field("level", self.level, OneOf{{"debug", "info", "warn", "error", "off"}},
          "least grave event to say; ROLLPACK_LOG_LEVEL wins");
    field("format", self.format, OneOf{{"text", "json"}},
          "one line or one JSON object an event; ROLLPACK_LOG_FORMAT wins");
  }
};

struct Config {
  ModelSection model;
  RolloutSection rollout;
  EngineSection engine;
  ReferenceModelSection reference_model;
  BridgeSection bridge;
  ClusterSection cluster;
  MetricsSection metrics;
  LogSection log;

  // "engine.backend" -> "configs/quickstart.yaml:12" or "--set"; defaults are not in it.
  std::map<std::string, std::string> origins;

  std::string origin_of(const std::string& field) const {
    const auto found = origins.find(field);
    return found == origins.end() ? "default" : found->second;
  }

  template <class Self, class Section>
  static void sections(Self& self, Section&& section) {
    section("model", self.model, "what computes the logits");
    section("rollout", self.rollout, "what is sampled; names follow verl, vLLM and TRL");
    section("engine", self.engine, "how it is computed");
    section("reference_model", self.reference_model,
            "a frozen policy that scores every sample; each rank holds its weights");
    section("bridge", self.bridge, "how the trainer gets it");
    section("cluster", self.cluster, "ranks, and what becomes of lost ones");
    section("metrics", self.metrics, "what it says of itself while it runs");
    section("log", self.log, "events, on stderr");
  }
};

// Reads the YAML file at `path`, then `overrides` ("section.key=value", origin "--set", the last of
// a key wins), and checks every value and what must hold between them.
// Errors: not_found; invalid_argument or unsupported naming key, value, "file:line" and what is
// allowed, for unknown keys the nearest known one.
Config load_config(const std::string& path, const std::vector<std::string>& overrides = {});

// The same from text; `origin` stands for the file's name.
Config parse_config(std::string_view text, const std::string& origin,
                    const std::vector<std::string>& overrides = {});

// Every field spelled out, as YAML that load_config() reads back as the same values;
// with_comments puts help, range and default above each.
std::string config_yaml(const Config& config, bool with_comments = false);
// {"model": {"path": ...}, ...}
std::string config_json(const Config& config);
// All fields with help, what is allowed, default and aliases, for a terminal.
std::string config_help();

}  // namespace rollpack::rollout
