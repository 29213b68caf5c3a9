// The head on logits that are set by hand: the input row is a unit vector, so that row r of the
// vocabulary matrix's transpose are the logits of head row r.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/error.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/philox.h"
#include "toy_model.h"

namespace rollpack::kernels::testing {
namespace {

// Runs lm_head on `rows[r]` as the logits of head row r; all f32.
class Head {
 public:
  explicit Head(std::vector<std::vector<float>> rows, int32_t num_threads = 2)
      : rows_(std::move(rows)), V_(static_cast<int64_t>(rows_[0].size())) {
    const auto D = static_cast<int64_t>(rows_.size());
    shape_ = {.D = D, .H = 1, .G = 1, .K = 2, .F = 1, .V = V_, .L = 1, .dtype = DType::kF32};
    backend_ = make_cpu_backend(shape_, {.num_threads = num_threads,
                                         .kv_cache_bytes = 1 << 20,
                                         .max_num_seqs = 64,
                                         .max_num_batched_tokens = 256});
    const WeightId weight = backend_->declare_weight({"head", WeightKind::kLmHead, {V_}, D});
    std::vector<float> matrix(static_cast<size_t>(V_ * D));
    for (size_t r = 0; r < rows_.size(); ++r) {
      for (size_t v = 0; v < rows_[r].size(); ++v) matrix[v * rows_.size() + r] = rows_[r][v];
    }
    backend_->begin_staging();
    backend_->load_weight(weight, 0, {matrix.data(), DType::kF32, {V_, D}}, {0, V_});
    backend_->commit_weights();
    in_ = backend_->alloc(D * D * 4);
    for (int64_t r = 0; r < D; ++r) static_cast<float*>(in_.data)[r * D + r] = 1.0f;
    backend_->set_program(std::make_shared<Program>(weight, in_, D));
  }
  ~Head() { backend_->free(in_); }

  StepResult run(StepPlan plan) {
    for (int32_t r = 0; r < static_cast<int32_t>(rows_.size()); ++r) {
      add_rows(plan, {0}, 0, {r % 8});
      if (!is_used(plan, r)) plan.scores.push_back({.row = r, .token = 0});
    }
    return backend_->wait(backend_->submit(std::move(plan)), soon());
  }

 private:
  class Program final : public StepProgram {
   public:
    Program(WeightId weight, Buffer in, int64_t D) : weight_(weight), in_(in), D_(D) {}
    void run(Backend& backend, int64_t, int64_t head_rows) override {
      backend.lm_head({.weight = weight_, .in = {in_.data, DType::kF32, {head_rows, D_}}});
    }

   private:
    WeightId weight_;
    Buffer in_;
    int64_t D_;
  };

  static bool is_used(const StepPlan& plan, int32_t row) {
    const auto names_row = [row](const auto& entry) { return entry.row == row; };
    return std::any_of(plan.samples.begin(), plan.samples.end(), names_row) ||
           std::any_of(plan.scores.begin(), plan.scores.end(), names_row);
  }

  std::vector<std::vector<float>> rows_;
  int64_t V_;
  ModelShape shape_;
  std::unique_ptr<Backend> backend_;
  Buffer in_;
};

SlotInit slot_of(int32_t slot, SamplingParams sampling, uint32_t sample_index = 0) {
  return {.slot = slot,
          .sampling = sampling,
          .seed = 5,
          .prompt_hash = 77,
          .sample_index = sample_index,
          .next_position = 9,
          .end_position = 1000};
}

HeadResult sample_one(const std::vector<float>& logits, const SlotInit& init) {
  Head head({logits});
  StepPlan plan;
  plan.slot_inits = {init};
  plan.samples = {{.row = 0, .slot = init.slot}};
  plan.wants_entropy = true;
  return head.run(std::move(plan)).samples[0];
}

// Probabilities of logits x scale, in f64.
std::vector<double> softmax(const std::vector<float>& logits, float scale) {
  const float max = *std::max_element(logits.begin(), logits.end());
  std::vector<double> p;
  double total = 0;
  for (const float logit : logits) {
    p.push_back(std::exp(static_cast<double>(logit * scale) - static_cast<double>(max * scale)));
    total += p.back();
  }
  for (double& value : p) value /= total;
  return p;
}

TEST(VocabHead, LogprobsAndEntropyMatchF64ForEveryVocabularySize) {
  for (const int64_t V : {1, 2, 63, 64, 65, 1000, 1023, 1024, 1025, 1088, 2500}) {
    const auto logits = Numbers(static_cast<uint64_t>(V)).vector(V, 6.0f);
    Head head({logits});
    StepPlan plan;
    for (int32_t token = 0; token < V;
         token += std::max<int32_t>(1, static_cast<int32_t>(V) / 50)) {
      plan.scores.push_back({.row = 0, .token = token, .temperature = 0.7f});
    }
    const auto scores = head.run(plan).scores;
    const auto p = softmax(logits, 1.0f), scaled = softmax(logits, 1.0f / 0.7f);
    double entropy = 0;
    for (const double value : scaled) entropy -= value * std::log(value);
    for (const HeadResult& score : scores) {
      const auto token = static_cast<size_t>(score.token);
      // A sum of exps good to 2^-22, and one rounding of a result up to 30.
      EXPECT_NEAR(score.logprob, std::log(p[token]), 3e-6) << "V " << V;
      EXPECT_NEAR(score.scaled_logprob, std::log(scaled[token]), 3e-6) << "V " << V;
      EXPECT_NEAR(score.entropy, entropy, 1e-5) << "V " << V;
      EXPECT_EQ(score.position, 1);
      EXPECT_EQ(score.support_logmass, 0.0f);
      EXPECT_TRUE(score.is_finite);
    }
  }
}

TEST(VocabHead, LogitsFarFromZeroLoseNothing) {
  std::vector<float> logits(1500, -1000.0f);
  logits[1400] = -997.0f;
  const HeadResult greedy = sample_one(logits, slot_of(0, {.temperature = 0}));
  EXPECT_EQ(greedy.token, 1400);
  EXPECT_NEAR(greedy.logprob, -std::log(1 + 1499 * std::exp(-3.0)), 1e-6);
  EXPECT_EQ(greedy.scaled_logprob, greedy.logprob);
}

TEST(VocabHead, DrawsAreTheInverseCdfOfTheirUniform) {
  for (const int64_t V : {70, 1100, 3000}) {
    const auto logits = Numbers(8).vector(V, 3.0f);
    const auto p = softmax(logits, 1.0f / 0.9f);
    Head head(std::vector<std::vector<float>>(1, logits));
    int64_t checked = 0;
    for (uint32_t index = 0; index < 400; ++index) {
      StepPlan plan;
      plan.slot_inits = {slot_of(3, {.temperature = 0.9f}, index)};
      plan.samples = {{.row = 0, .slot = 3}};
      const int32_t token = head.run(std::move(plan)).samples[0].token;
      const double u = sampling_uniform(5, 77, index, 9);
      double running = 0;
      int32_t want = 0;
      double margin = 1;
      for (int32_t v = 0; v < V; ++v) {
        margin = std::min(margin, std::abs(running - u));
        running += p[static_cast<size_t>(v)];
        if (running > u) {
          want = v;
          break;
        }
      }
      margin = std::min(margin, std::abs(running - u));
      if (margin < 1e-6) continue;  // f32 exps move a boundary by up to that
      EXPECT_EQ(token, want) << "V " << V << ", u " << u;
      ++checked;
    }
    EXPECT_GT(checked, 350);
  }
}

TEST(VocabHead, GreedyTakesTheLowestIdOfTheLargestLogits) {
  std::vector<float> logits(3000, 1.0f);
  logits[2999] = 2.0f;
  EXPECT_EQ(sample_one(logits, slot_of(0, {.temperature = 0})).token, 2999);
  logits[1999] = 2.0f;
  EXPECT_EQ(sample_one(logits, slot_of(0, {.temperature = 0})).token, 1999);
  logits[1990] = 2.0f;
  logits[130] = 2.0f;
  const HeadResult result =
      sample_one(logits, slot_of(0, {.temperature = 0, .top_k = 2, .top_p = 0.1f}));
  EXPECT_EQ(result.token, 130);
  EXPECT_EQ(result.support_logmass, 0.0f);
  EXPECT_EQ(result.scaled_logprob, result.logprob);
}

// Tokens that 300 draws reach, and their support_logmass, which must be one number.
struct Support {
  std::set<int32_t> tokens;
  float logmass = 0;
};

Support support_of(const std::vector<float>& logits, SamplingParams sampling,
                   int32_t min_position = 0, std::vector<int32_t> stops = {}) {
  Head head({logits});
  Support support;
  for (uint32_t index = 0; index < 300; ++index) {
    StepPlan plan;
    plan.slot_inits = {slot_of(0, sampling, index)};
    plan.slot_inits[0].min_position = min_position;
    plan.slot_inits[0].stop_token_ids = stops;
    plan.samples = {{.row = 0, .slot = 0}};
    const HeadResult result = head.run(std::move(plan)).samples[0];
    support.tokens.insert(result.token);
    if (index > 0) {
      EXPECT_EQ(result.support_logmass, support.logmass);
    }
    support.logmass = result.support_logmass;
  }
  return support;
}

std::vector<float> logs(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (const double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
  return logits;
}

TEST(VocabHead, TruncationIsExactOnFiveTokens) {
  const auto logits = logs({0.1, 0.4, 0.2, 0.2, 0.1});
  struct Case {
    SamplingParams sampling;
    std::set<int32_t> tokens;
    double mass;
  };
  const std::vector<Case> cases = {
      {{.top_k = 1}, {1}, 0.4},
      {{.top_k = 2}, {1, 2}, 0.6},        // of the tied 2 and 3 the lower id
      {{.top_k = 4}, {0, 1, 2, 3}, 0.9},  // of the tied 0 and 4 the lower id
      {{.top_k = 5}, {0, 1, 2, 3, 4}, 1.0},
      {{.top_p = 0.3f}, {1}, 0.4},
      {{.top_p = 0.45f}, {1, 2}, 0.6},  // the crossing token is kept
      {{.top_p = 0.85f}, {0, 1, 2, 3}, 0.9},
      {{.top_k = 2, .top_p = 0.6f}, {1}, 0.4},     // 0.4 / 0.6 reaches 0.6 after top-k
      {{.top_k = 3, .top_p = 0.6f}, {1, 2}, 0.6},  // 0.4 / 0.8 does not
      {{.min_p = 0.4f}, {1, 2, 3}, 0.8},           // at least 0.16
      {{.min_p = 0.6f}, {1}, 0.4},
      {{.top_p = 0.85f, .min_p = 0.4f}, {1, 2, 3}, 0.8},
      {{.min_p = 1.0f}, {1}, 0.4},
  };
  for (const Case& c : cases) {
    const Support support = support_of(logits, c.sampling);
    EXPECT_EQ(support.tokens, c.tokens) << "top_k " << c.sampling.top_k << " top_p "
                                        << c.sampling.top_p << " min_p " << c.sampling.min_p;
    EXPECT_NEAR(support.logmass, std::log(c.mass), 1e-6);
  }
}

TEST(VocabHead, MinTokensTakesStopIdsOutOfTheSupport) {
  const auto logits = logs({0.1, 0.4, 0.2, 0.2, 0.1});
  const Support banned = support_of(logits, {}, 10, {1, 3});
  EXPECT_EQ(banned.tokens, (std::set<int32_t>{0, 2, 4}));
  EXPECT_NEAR(banned.logmass, std::log(0.4), 1e-6);
  const Support top = support_of(logits, {.top_k = 2}, 10, {1});
  EXPECT_EQ(top.tokens, (std::set<int32_t>{2, 3}));
  const Support later = support_of(logits, {}, 9, {1, 3});  // position 9 may stop
  EXPECT_EQ(later.tokens.size(), 5u);
  EXPECT_EQ(later.logmass, 0.0f);
  SlotInit greedy = slot_of(0, {.temperature = 0});
  greedy.min_position = 10;
  greedy.stop_token_ids = {1};
  EXPECT_EQ(sample_one(logits, greedy).token, 2);
  EXPECT_EQ(sample_one(logits, greedy).finish, SlotFinish::kRunning);
  greedy.min_position = 9;
  EXPECT_EQ(sample_one(logits, greedy).token, 1);
  EXPECT_EQ(sample_one(logits, greedy).finish, SlotFinish::kStop);
}

TEST(VocabHead, GreedySkipsBannedIdsAndSaysWhenNoneIsLeft) {
  std::vector<float> logits(1100, -7.0f);
  logits[0] = 3;
  logits[70] = 5;
  logits[1090] = 5;
  logits[1099] = -0.0f;
  const auto token_without = [&](std::vector<int32_t> banned) {
    SlotInit greedy = slot_of(0, {.temperature = 0});
    greedy.min_position = 10;
    greedy.stop_token_ids = std::move(banned);
    return sample_one(logits, greedy).token;
  };
  EXPECT_EQ(token_without({}), 70);
  EXPECT_EQ(token_without({70}), 1090);
  EXPECT_EQ(token_without({0, 70, 1090}), 1099);
  std::vector<int32_t> last_block;  // nothing is left of a block and its panels
  for (int32_t id = 1024; id < 1100; ++id) last_block.push_back(id);
  EXPECT_EQ(token_without(last_block), 70);
  std::vector<int32_t> all;
  for (int32_t id = 0; id < 1100; ++id) all.push_back(id);
  const std::vector<SamplingParams> kinds = {
      {.temperature = 0}, {}, {.top_k = 3}, {.top_p = 0.5f}};
  for (const SamplingParams& sampling : kinds) {
    SlotInit none = slot_of(0, sampling);
    none.min_position = 10;
    none.stop_token_ids = all;
    EXPECT_THROW(sample_one(logits, none), Error);
  }
}

TEST(VocabHead, TopPOnALongTailKeepsTheSmallestSufficientSet) {
  constexpr int64_t kV = 2100;
  const auto logits = Numbers(9).vector(kV, 1.5f);  // flat: no few tokens hold the mass
  const auto p = softmax(logits, 1.0f);
  for (const float top_p : {0.05f, 0.5f, 0.99f}) {
    std::vector<double> sorted = p;
    std::sort(sorted.rbegin(), sorted.rend());
    double mass = 0;
    for (const double value : sorted) {
      mass += value;
      if (mass >= static_cast<double>(top_p)) break;
    }
    const HeadResult result = sample_one(logits, slot_of(0, {.top_p = top_p}));
    EXPECT_NEAR(result.support_logmass, std::log(mass), 2e-6) << top_p;
  }
}

TEST(VocabHead, TruncatedAndPlainSiblingsOfOneRowKeepTheirBits) {
  const auto logits = Numbers(10).vector(1300, 4.0f);
  const auto other = Numbers(11).vector(1300, 4.0f);
  const std::vector<SamplingParams> kinds = {{},
                                             {.temperature = 0.5f},
                                             {.temperature = 0},
                                             {.top_k = 3},
                                             {.temperature = 0.5f, .top_p = 0.9f}};
  std::vector<std::vector<uint32_t>> alone;
  for (int32_t i = 0; i < 5; ++i) {
    const auto slot = slot_of(i, kinds[static_cast<size_t>(i)], static_cast<uint32_t>(i));
    alone.push_back(bits_of(sample_one(logits, slot)));
  }
  Head head({other, logits, other}, 3);
  StepPlan plan;
  for (int32_t i = 0; i < 5; ++i) {
    plan.slot_inits.push_back(slot_of(i, kinds[static_cast<size_t>(i)], static_cast<uint32_t>(i)));
    plan.samples.push_back({.row = 1, .slot = i});
  }
  plan.slot_inits.push_back(slot_of(9, {.min_p = 0.1f}));
  plan.samples.push_back({.row = 2, .slot = 9});
  plan.wants_entropy = true;
  const auto results = head.run(std::move(plan)).samples;
  for (size_t i = 0; i < 5; ++i) EXPECT_EQ(bits_of(results[i]), alone[i]) << "kind " << i;
}

TEST(VocabHead, ANonFiniteLogitVoidsItsRowOnly) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    // 0 x infinity is NaN, so a bad weight reaches every row; a lone row suffices here.
    auto logits = Numbers(12).vector(1100, 4.0f);
    logits[1099] = bad;
    const HeadResult result = sample_one(logits, slot_of(0, {}));
    EXPECT_FALSE(result.is_finite);
    EXPECT_EQ(result.finish, SlotFinish::kRunning);
  }
}

TEST(VocabHead, EntropyOfSamplesIsNaNWhereNotAskedFor) {
  Head head({Numbers(13).vector(100, 1.0f)});
  StepPlan plan;
  plan.slot_inits = {slot_of(0, {})};
  plan.samples = {{.row = 0, .slot = 0}};
  EXPECT_TRUE(std::isnan(head.run(std::move(plan)).samples[0].entropy));
}

}  // namespace
}  // namespace rollpack::kernels::testing
