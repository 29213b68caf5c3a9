// The number of ranks that hold a model changes no bit of what its steps say: the same random steps
// (prompts, chunks, decoding, drafts, scores, every way to sample) on 1, 2, 3 and 4 ranks, on the
// CPU and on emulated devices.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "sharded_replica.h"

namespace rollpack::rollout {
namespace {

using kernels::HeadResult;
using kernels::SamplingParams;
using kernels::StepPlan;
using kernels::StepResult;

constexpr int32_t kPagesOfASlot = 4;
constexpr int32_t kNumSlots = 12;

std::vector<uint32_t> bits_of(const HeadResult& r) {
  if (r.is_rejected) return {1};
  const auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
  if (!r.is_finite) return {2, static_cast<uint32_t>(r.position)};
  return {static_cast<uint32_t>(r.slot),
          static_cast<uint32_t>(r.position),
          static_cast<uint32_t>(r.token),
          bits(r.logprob),
          bits(r.scaled_logprob),
          bits(r.support_logmass),
          std::isnan(r.entropy) ? 0 : bits(r.entropy),
          static_cast<uint32_t>(r.finish)};
}

std::vector<uint32_t> bits_of(const StepResult& result) {
  std::vector<uint32_t> all;
  for (const auto* list : {&result.samples, &result.scores}) {
    for (const HeadResult& each : *list) {
      for (const uint32_t word : bits_of(each)) all.push_back(word);
    }
  }
  for (const int32_t sequence : result.failed_sequences) {
    all.push_back(static_cast<uint32_t>(sequence));
  }
  return all;
}

// Every kind of support: whole, listed, by mass, relative, more than can be listed.
const std::vector<SamplingParams> kWays = {
    {.temperature = 1.0f},
    {.temperature = 0.0f},
    {.temperature = 0.7f},
    {.temperature = 1.3f, .top_k = 5},
    {.temperature = 0.9f, .top_p = 0.8f},
    {.temperature = 1.0f, .min_p = 0.05f},
    {.temperature = 1.1f, .top_k = 1100, .top_p = 0.9f},
    {.temperature = 0.8f, .top_k = 40, .top_p = 0.7f, .min_p = 0.01f}};

struct Model {
  std::string name;
  ModelConfig config;
  std::string dtype;
};

std::vector<Model> models() {
  ModelConfig uneven = tiny_model_config();  // 9 heads for 2 and 4 ranks; blocks of a vocabulary
  uneven.hidden_size = 50;
  uneven.num_attention_heads = 9;
  uneven.num_key_value_heads = 3;
  uneven.head_dim = 6;
  uneven.intermediate_size = 71;
  uneven.vocab_size = 3100;
  ModelConfig untied = uneven;  // Qwen2 0.5B's heads: 2 KV heads for up to 4 ranks
  untied.num_attention_heads = 14;
  untied.num_key_value_heads = 2;
  untied.head_dim = 4;
  untied.hidden_size = 56;
  untied.vocab_size = 4096;
  untied.tie_word_embeddings = false;
  untied.has_qkv_bias = true;
  untied.layer_windows = {0, 9};
  ModelConfig wide = untied;  // whole panels a rank; all of the vocabulary on one
  wide.num_attention_heads = 4;
  wide.num_key_value_heads = 4;
  wide.head_dim = 16;
  wide.hidden_size = 256;
  wide.intermediate_size = 300;
  wide.vocab_size = 900;
  wide.has_qkv_bias = false;
  wide.has_qk_norm = true;
  wide.tie_word_embeddings = true;
  return {{"uneven", uneven, "bfloat16"},
          {"uneven", uneven, "float32"},
          {"untied", untied, "bfloat16"},
          {"untied", untied, "float32"},
          {"wide", wide, "bfloat16"}};
}

Config config_for(const Model& model, const std::string& backend) {
  Config config = tiny_config();
  config.model.dtype = model.dtype;
  config.engine.backend = backend;
  config.engine.max_num_seqs = kNumSlots;
  config.engine.kv_cache_memory = 4 << 20;
  config.engine.max_num_batched_tokens = 256;
  return config;
}

// Writes plans as an engine would: prompts in chunks, then decoding, some of it with drafts.
class Steps {
 public:
  explicit Steps(const ModelConfig& model) : V_(static_cast<int32_t>(model.vocab_size)) {}

  StepPlan next() {
    StepPlan plan;
    plan.wants_entropy = step_ % 2 == 1;
    drafts_.clear();
    for (int32_t slot = 0; slot < kNumSlots; ++slot) {
      Slot& at = slots_[slot];
      if (at.is_over || (step_ == 0 && slot % 4 == 3)) continue;
      at.prompt_left > 0 ? add_prompt(plan, slot) : add_decoding(plan, slot);
    }
    ++step_;
    return plan;
  }

  void take(const StepPlan& plan, const StepResult& result) {
    for (size_t i = 0; i < result.samples.size(); ++i) {
      const HeadResult& sample = result.samples[i];
      if (sample.is_rejected) continue;
      Slot& at = slots_[plan.samples[i].slot];
      at.last = sample.token;
      at.num_keys = sample.position;
      at.is_over = !sample.is_finite || sample.finish != kernels::SlotFinish::kRunning ||
                   sample.position > 16 * kPagesOfASlot - 5;
    }
  }

 private:
  struct Slot {
    int32_t num_keys = 0;
    int32_t prompt_left = 20;
    int32_t last = -1;
    bool is_over = false;
  };

  int32_t below(int32_t end) {
    return static_cast<int32_t>(random_() % static_cast<uint32_t>(end));
  }

  void add_rows(StepPlan& plan, int32_t slot, const std::vector<int32_t>& ids) {
    plan.sequences.push_back({.slot = slot,
                              .row_begin = static_cast<int32_t>(plan.input_ids.size()),
                              .num_rows = static_cast<int32_t>(ids.size()),
                              .page_table_begin = static_cast<int32_t>(plan.page_tables.size()),
                              .num_pages = kPagesOfASlot});
    for (int32_t page = 0; page < kPagesOfASlot; ++page) {
      plan.page_tables.push_back(slot * kPagesOfASlot + page);
    }
    for (size_t i = 0; i < ids.size(); ++i) {
      plan.input_ids.push_back(ids[i]);
      plan.positions.push_back(slots_[slot].num_keys + static_cast<int32_t>(i));
    }
  }

  void add_prompt(StepPlan& plan, int32_t slot) {
    Slot& at = slots_[slot];
    const int32_t chunk = std::min(at.prompt_left, 7 + slot);
    std::vector<int32_t> ids;
    for (int32_t i = 0; i < chunk; ++i) ids.push_back(below(V_));
    add_rows(plan, slot, ids);
    at.num_keys += chunk;
    at.prompt_left -= chunk;
    const auto last_row = static_cast<int32_t>(plan.input_ids.size()) - 1;
    for (const int32_t row : {last_row - 1, last_row}) {
      plan.scores.push_back(
          {.row = row, .token = below(V_), .temperature = slot % 2 == 0 ? 1.0f : 0.6f});
    }
    if (at.prompt_left > 0) return;
    // Stop ids all over the vocabulary, kept out for a while.
    std::vector<int32_t> stops;
    if (slot % 3 == 1) stops = {3, V_ / 3, V_ / 2, V_ - 1};
    plan.slot_inits.push_back({.slot = slot,
                               .sampling = kWays[static_cast<size_t>(slot) % kWays.size()],
                               .seed = 17,
                               .prompt_hash = static_cast<uint64_t>(slot) * 77,
                               .sample_index = static_cast<uint32_t>(slot),
                               .next_position = at.num_keys,
                               .min_position = at.num_keys + 5,
                               .end_position = 1000,
                               .stop_token_ids = stops});
    plan.samples.push_back({.row = last_row, .slot = slot});
  }

  // Every third step guesses two tokens more: one that is often right where a slot is greedy.
  void add_decoding(StepPlan& plan, int32_t slot) {
    Slot& at = slots_[slot];
    std::vector<int32_t> ids = {step_ % 2 == 0 ? kernels::kPendingToken : at.last};
    if (step_ % 3 == 0) ids.insert(ids.end(), {at.last, below(V_)});
    const auto row = static_cast<int32_t>(plan.input_ids.size());
    add_rows(plan, slot, ids);
    for (size_t i = 0; i < ids.size(); ++i) {
      plan.samples.push_back({.row = row + static_cast<int32_t>(i), .slot = slot});
    }
  }

  const int32_t V_;
  std::mt19937 random_{5};
  int32_t step_ = 0;
  std::vector<int32_t> drafts_;
  Slot slots_[kNumSlots];
};

std::vector<std::vector<uint32_t>> run_steps(ShardedReplica& replica, const Model& model) {
  Steps steps(model.config);
  std::vector<std::vector<uint32_t>> bits;
  for (int step = 0; step < 8; ++step) {
    const StepPlan plan = steps.next();
    const std::vector<StepResult> results = replica.run(plan);
    bits.push_back(bits_of(results[0]));
    for (size_t r = 1; r < results.size(); ++r) {
      EXPECT_EQ(bits_of(results[r]), bits.back()) << "rank " << r << " in step " << step;
    }
    steps.take(plan, results[0]);
  }
  return bits;
}

// Those that hold a model on several ranks.
std::vector<std::string> sharing_backends() {
  std::vector<std::string> names = {"cpu"};
  for (const std::string& name : kernels::testing::tested_backends()) {
    if (name != kernels::testing::kEmulatedCuda) continue;
    names.push_back(name);
    names.emplace_back(kEmulatedNccl);
  }
  return names;
}

class NumberOfRanks : public ::testing::TestWithParam<std::tuple<std::string, size_t>> {};

TEST_P(NumberOfRanks, ChangesNoBit) {
  const auto& [backend, index] = GetParam();
  const Model model = models()[index];
  const Config config = config_for(model, backend);
  const std::vector<NamedTensor> tensors = tiny_tensors(3, model.config);
  ShardedReplica alone(config, model.config, 1);
  alone.load(tensors);
  const auto wanted = run_steps(alone, model);
  for (const int32_t num_ranks : {2, 3, 4}) {
    ShardedReplica replica(config, model.config, num_ranks);
    replica.load(tensors);
    EXPECT_EQ(replica.rank(0).backend_info().fingerprint, alone.rank(0).backend_info().fingerprint);
    const auto bits = run_steps(replica, model);
    for (size_t step = 0; step < wanted.size(); ++step) {
      ASSERT_EQ(bits[step], wanted[step]) << num_ranks << " ranks, step " << step;
    }
  }
}

// Every model on every backend; where NCCL's part is the same, two of them.
std::vector<std::tuple<std::string, size_t>> backends_and_models() {
  std::vector<std::tuple<std::string, size_t>> pairs;
  for (const std::string& backend : sharing_backends()) {
    for (size_t index = 0; index < models().size(); ++index) {
      if (backend != kEmulatedNccl || index % 3 == 0) pairs.emplace_back(backend, index);
    }
  }
  return pairs;
}

INSTANTIATE_TEST_SUITE_P(Models, NumberOfRanks, ::testing::ValuesIn(backends_and_models()),
                         [](const auto& info) {
                           const Model model = models()[std::get<1>(info.param)];
                           return std::get<0>(info.param) + "_" + model.name + "_" + model.dtype;
                         });

class ShardedModel : public ::testing::TestWithParam<std::string> {};

INSTANTIATE_TEST_SUITE_P(Backends, ShardedModel, ::testing::ValuesIn(sharing_backends()),
                         [](const auto& info) { return info.param; });

TEST_P(ShardedModel, NeedsAShareOfTheMemory) {
  Model model = models()[2];
  model.config.hidden_size = 256;
  model.config.num_attention_heads = 8;
  model.config.num_key_value_heads = 4;
  model.config.head_dim = 32;
  model.config.intermediate_size = 1024;
  model.config.vocab_size = 8192;
  const auto memory = [&](int32_t num_ranks) {
    ShardedReplica replica(config_for(model, GetParam()), model.config, num_ranks);
    std::vector<std::pair<int64_t, int64_t>> bytes;
    for (size_t r = 0; r < replica.num_ranks(); ++r) {
      const kernels::BackendInfo& info = replica.rank(r).backend_info();
      bytes.emplace_back(info.memory.weight_bytes, info.kv.page_bytes);
    }
    return bytes;
  };
  const auto [weights, page] = memory(1)[0];
  for (const int32_t num_ranks : {2, 4}) {
    for (const auto& [part, part_of_page] : memory(num_ranks)) {
      EXPECT_LT(static_cast<double>(part), 1.03 * static_cast<double>(weights) / num_ranks);
      EXPECT_EQ(part_of_page, page / num_ranks);
    }
  }
}

// Infinite keys in one head, which one rank holds.
TEST_P(ShardedModel, FailsASequenceWhereOneRanksKeysAreNotFinite) {
  const Model model = models()[0];
  std::vector<NamedTensor> tensors = tiny_tensors(3, model.config);
  for (NamedTensor& tensor : tensors) {
    if (tensor.name != "model.layers.1.self_attn.k_proj.weight") continue;
    std::fill(tensor.values.end() - 6 * model.config.hidden_size, tensor.values.end(), 3e38f);
  }
  for (const int32_t num_ranks : {1, 3}) {
    ShardedReplica replica(config_for(model, GetParam()), model.config, num_ranks);
    replica.load(tensors);
    Steps steps(model.config);
    for (const StepResult& result : replica.run(steps.next())) {
      EXPECT_EQ(result.failed_sequences.size(), 9u) << num_ranks << " ranks";
    }
  }
}

TEST_P(ShardedModel, RefusesMoreRanksThanHeads) {
  const Model model = models()[4];
  try {
    const ShardedReplica replica(config_for(model, GetParam()), model.config, 5);
    FAIL() << "5 ranks for 4 heads";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "engine.tensor_model_parallel_size = 5: expected at most 4, the "
                 "model's query heads; every rank of a replica computes some heads");
  }
}

// A rank whose step fails takes the others with it, at once.
TEST_P(ShardedModel, EndsOnAllRanksWhereOneFails) {
  class FailingProgram final : public kernels::StepProgram {
    void run(kernels::Backend&, int64_t, int64_t) override { throw std::runtime_error("a test"); }
  };
  const Model model = models()[0];
  ShardedReplica replica(config_for(model, GetParam()), model.config, 3);
  replica.load(tiny_tensors(3, model.config));
  replica.rank(1).backend().set_program(std::make_shared<FailingProgram>());
  const StepPlan plan = Steps(model.config).next();
  std::vector<kernels::StepHandle> handles;
  for (size_t r = 0; r < 3; ++r) handles.push_back(replica.rank(r).backend().submit(plan));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  for (size_t r = 0; r < 3; ++r) {
    EXPECT_ANY_THROW(replica.rank(r).backend().wait(handles[r], deadline)) << "rank " << r;
  }
  EXPECT_LT(std::chrono::steady_clock::now(), deadline);
}

// NCCL does not compare the calls of ranks.
class ComparedCalls : public ::testing::TestWithParam<std::string> {};

INSTANTIATE_TEST_SUITE_P(Backends, ComparedCalls, ::testing::ValuesIn([] {
                           std::vector<std::string> names = sharing_backends();
                           std::erase(names, kEmulatedNccl);
                           return names;
                         }()),
                         [](const auto& info) { return info.param; });

// Likewise where they are not given the same plan.
TEST_P(ComparedCalls, EndStepsThatDiffer) {
  const Model model = models()[0];
  ShardedReplica replica(config_for(model, GetParam()), model.config, 3);
  const std::vector<NamedTensor> tensors = tiny_tensors(3, model.config);
  replica.load(tensors);
  Steps steps(model.config);
  StepPlan plan = steps.next();
  std::vector<kernels::StepHandle> handles;
  for (size_t r = 0; r < 2; ++r) handles.push_back(replica.rank(r).backend().submit(plan));
  plan.scores.pop_back();  // the last rank has another step in mind
  handles.push_back(replica.rank(2).backend().submit(plan));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  for (size_t r = 0; r < 3; ++r) {
    EXPECT_THROW(replica.rank(r).backend().wait(handles[r], deadline), Error) << "rank " << r;
  }
  EXPECT_LT(std::chrono::steady_clock::now(), deadline);
}

}  // namespace
}  // namespace rollpack::rollout
