// Logprobs, entropy, greedy choice and non-finite logits of every backend.
#include <limits>

#include "tests/kernels/head_rig.h"

namespace rollpack::kernels::testing {
namespace {

using LmHead = BackendTest;

const std::vector<int64_t> kVocabularies = {1, 5, 63, 64, 65, 1000, 1023, 1024, 1025, 2500};

struct Exact {
  double logprob = 0, entropy = 0, bound = 0, entropy_bound = 0;
};

// f64 log softmax(x)[token] and entropy, and how far f32 block sums may stray from them, where each
// x itself is off by at most `x_error`.
Exact exact_of(const std::vector<double>& x, int32_t token, double x_error) {
  const double max = *std::max_element(x.begin(), x.end());
  const double min = *std::min_element(x.begin(), x.end());
  double sum = 0, weighted = 0;
  for (const double v : x) {
    sum += std::exp(v - max);
    weighted += (v - max) * std::exp(v - max);
  }
  Exact exact;
  exact.logprob = x[static_cast<size_t>(token)] - max - std::log(sum);
  exact.entropy = std::log(sum) - weighted / sum;
  // Every term: the shift is rounded, exp is; then V additions and a merge for each block.
  const double terms = static_cast<double>(x.size()) + 8;
  const double term_error = std::expm1(2 * x_error + kUnitF32 * (max - min)) + kExpError;
  const double sum_error = 1.01 * (term_error + gamma_of(terms));
  exact.bound = 2 * x_error + sum_error + 4 * kUnitF32 * std::abs(exact.logprob) + kFlush;
  const double spread = std::abs(weighted) / sum;
  exact.entropy_bound = sum_error + spread * (2 * sum_error + 4 * kUnitF32) + 2 * x_error +
                        4 * kUnitF32 * exact.entropy + kFlush;
  return exact;
}

std::vector<double> scaled(const std::vector<float>& logits, float temperature) {
  std::vector<double> x(logits.begin(), logits.end());
  for (double& v : x) v *= static_cast<double>(1.0f / temperature);
  return x;
}

void expect_near(double got, double want, double bound, const std::string& what) {
  ASSERT_TRUE(std::abs(got - want) <= bound)
      << what << ": got " << got << ", want " << want << ", bound " << bound;
}

TEST_P(LmHead, ScoresOfExactLogitsStayWithinTheRoundingOfTheirSums) {
  for (const int64_t V : kVocabularies) {
    const auto logits = Numbers(static_cast<uint64_t>(V)).vector(V, 9.0f);
    HeadRig rig(GetParam(), {logits});
    StepPlan plan = rig.plan();
    for (const float temperature : {1.0f, 0.7f, 3.0f, 0.0f}) {
      for (const int64_t token : {int64_t{0}, V / 2, V - 1}) {
        plan.scores.push_back({0, static_cast<int32_t>(token), temperature});
      }
    }
    const StepResult result = rig.run(plan);
    for (size_t i = 0; i < plan.scores.size(); ++i) {
      const ScoreRow& score = plan.scores[i];
      const HeadResult& got = result.scores[i];
      const std::string what = "V " + std::to_string(V) + ", score " + std::to_string(i);
      const float temperature = score.temperature == 0.0f ? 1.0f : score.temperature;
      const double x_error = temperature == 1.0f ? 0 : kUnitF32 * 9.0 / temperature;
      const Exact raw = exact_of(scaled(logits, 1.0f), score.token, 0);
      const Exact want = exact_of(scaled(logits, temperature), score.token, x_error);
      expect_near(got.logprob, raw.logprob, raw.bound, what + " logprob");
      expect_near(got.scaled_logprob, want.logprob, want.bound, what + " scaled_logprob");
      expect_near(got.entropy, want.entropy, want.entropy_bound, what + " entropy");
      EXPECT_EQ(got.token, score.token);
      EXPECT_EQ(got.position, 1);
      EXPECT_EQ(got.slot, -1);
      EXPECT_TRUE(got.is_finite);
      EXPECT_EQ(got.support_logmass, 0.0f);
      EXPECT_EQ(got.finish, SlotFinish::kRunning);
      if (temperature == 1.0f) {
        expect_same_bits({got.scaled_logprob}, {got.logprob}, what);
      }
    }
  }
}

struct HeadCase {
  DType dtype = DType::kBF16;
  int64_t V = 130, D = 17, rows = 3;
};

// Every row scored, against the reference within the bound of its own logits.
void expect_head_conforms(const std::string& backend, const HeadCase& c) {
  ModelShape shape = small_shape(c.dtype);
  shape.D = c.D;
  shape.V = c.V;
  Numbers numbers(static_cast<uint64_t>(c.V * 1000 + c.D));
  const auto weight = rounded(numbers.vector(c.V * c.D), c.dtype);
  const auto in = rounded(numbers.vector(c.rows * c.D), c.dtype);
  StepPlan plan = plan_of_rows(c.rows);
  for (int32_t row = 0; row < c.rows; ++row) {
    plan.scores.push_back({row, static_cast<int32_t>((row * 37 + 3) % c.V), row % 2 ? 0.5f : 1.0f});
  }
  const auto run = [&](const std::string& name) {
    Rig rig(name, shape);
    const WeightId id = rig.weight(WeightKind::kEmbedding, {weight}, c.D);
    const Tensor rows = rig.tensor(c.dtype, c.rows, c.D, in);
    return rig.run(plan, [&](Backend& backend) { backend.lm_head({.weight = id, .in = rows}); });
  };
  const StepResult got = run(backend), want = run("reference");
  for (size_t i = 0; i < plan.scores.size(); ++i) {
    std::vector<double> x(static_cast<size_t>(c.V));
    double magnitude = 0;  // the largest sum of magnitudes of any logit of the row
    for (int64_t v = 0; v < c.V; ++v) {
      double sum = 0;
      for (int64_t d = 0; d < c.D; ++d) {
        const double product = static_cast<double>(in[i * c.D + d]) * weight[v * c.D + d];
        x[static_cast<size_t>(v)] += product;
        sum += std::abs(product);
      }
      magnitude = std::max(magnitude, sum);
    }
    const float inverse = 1.0f / plan.scores[i].temperature;
    for (double& logit : x) logit *= inverse;
    const double x_error = inverse * (gamma_of(static_cast<double>(c.D)) + kUnitF32) * magnitude;
    const Exact bounds = exact_of(x, plan.scores[i].token, x_error);
    const std::string what = "V " + std::to_string(c.V) + " D " + std::to_string(c.D) + " row " +
                             std::to_string(i) + " of " + std::to_string(c.rows);
    expect_near(got.scores[i].scaled_logprob, want.scores[i].scaled_logprob, bounds.bound,
                what + " scaled_logprob");
    expect_near(got.scores[i].entropy, want.scores[i].entropy, bounds.entropy_bound,
                what + " entropy");
  }
}

TEST_P(LmHead, ScoresOfRandomRowsConformToTheReference) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const int64_t V : cases_of<int64_t>(GetParam(), {1000, 1024, 1025, 2500}, 2)) {
      for (const int64_t D : cases_of<int64_t>(GetParam(), {1, 32, 17, 65}, 2)) {
        expect_head_conforms(GetParam(), {.dtype = dtype, .V = V, .D = D});
      }
    }
  }
}

// Around lanes, panels of 64 columns and blocks of 1,024; pairs and steps of D; tiles of rows.
TEST_P(LmHead, EveryEdgeOfVocabularyWidthAndRowsConformsToTheReference) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const std::vector<int64_t> vocabularies = {
        1,  2,  15, 16,  17,  31,  32,  33,  47,   48,   49,   63,   64,   65,
        79, 80, 81, 127, 128, 129, 191, 193, 1087, 1088, 1089, 2047, 2048, 2049};
    for (const int64_t V : cases_of(GetParam(), vocabularies, 7)) {
      expect_head_conforms(GetParam(), {.dtype = dtype, .V = V});
    }
    const std::vector<int64_t> widths = {2,  3,   15,  16,  31,  33,  63,
                                         64, 127, 128, 129, 255, 256, 257};
    for (const int64_t D : cases_of(GetParam(), widths, 5)) {
      expect_head_conforms(GetParam(), {.dtype = dtype, .D = D});
    }
    for (const int32_t rows : numbers_of(GetParam(), 1, 34, 5)) {
      expect_head_conforms(GetParam(), {.dtype = dtype, .rows = rows});
    }
    const std::vector<int64_t> many = {47, 48, 49, 63, 64, 65, 127, 128, 129, 256, 513};
    for (const int64_t rows : cases_of(GetParam(), many, 3)) {
      expect_head_conforms(GetParam(), {.dtype = dtype, .V = 70, .rows = rows});
    }
  }
}

TEST_P(LmHead, LogitsFarBelowZeroKeepTheirLogprobs) {
  for (const float shift : {-200.0f, -3e38f, 3e38f}) {
    HeadRig rig(GetParam(), {std::vector<float>(1500, shift)});
    StepPlan plan = rig.plan();
    plan.scores = {{0, 1499, 1.0f}};
    const HeadResult got = rig.run(plan).scores[0];
    expect_near(got.logprob, -std::log(1500.0), gamma_of(1508) + 8 * kUnitF32, "uniform");
    expect_near(got.entropy, std::log(1500.0), gamma_of(1508) + 32 * kUnitF32, "uniform");
  }
}

TEST_P(LmHead, GreedyTakesTheLowestIdAmongTheLargest) {
  for (const std::vector<int32_t>& best :
       {std::vector<int32_t>{70, 1500}, {1023, 1024}, {63, 64}, {2499}, {0, 2499}, {5, 6}}) {
    auto logits = Numbers(4).vector(2500, 1.0f);
    for (const int32_t id : best) logits[static_cast<size_t>(id)] = 2.0f;
    HeadRig rig(GetParam(), {logits});
    StepPlan plan = rig.plan();
    plan.slot_inits = {
        {.slot = 3, .sampling = {.temperature = 0}, .next_position = 1, .end_position = 9}};
    plan.samples = {{0, 3}};
    const HeadResult got = rig.run(plan).samples[0];
    EXPECT_EQ(got.token, best.front());
    EXPECT_EQ(got.support_logmass, 0.0f);
    expect_same_bits({got.scaled_logprob}, {got.logprob}, "greedy has no temperature");
  }
}

TEST_P(LmHead, GreedyOfEqualLogitsTakesTokenZero) {
  HeadRig rig(GetParam(), {std::vector<float>(1025, -7.0f)});
  StepPlan plan = rig.plan();
  plan.slot_inits = {{.slot = 0, .sampling = {.temperature = 0}, .end_position = 9}};
  plan.samples = {{0, 0}};
  EXPECT_EQ(rig.run(plan).samples[0].token, 0);
}

TEST_P(LmHead, EntropyOfSamplesIsGivenWhenAskedForAndNaNOtherwise) {
  const auto logits = Numbers(8).vector(1025, 5.0f);
  HeadRig rig(GetParam(), {logits});
  StepPlan plan = rig.plan();
  plan.slot_inits = {{.slot = 0, .sampling = {.temperature = 0.5f, .top_k = 3}, .end_position = 9}};
  plan.samples = {{0, 0}};
  EXPECT_TRUE(std::isnan(rig.run(plan).samples[0].entropy));
  plan.wants_entropy = true;
  const Exact want = exact_of(scaled(logits, 0.5f), 0, 0);  // times 2 is exact
  expect_near(rig.run(plan).samples[0].entropy, want.entropy, want.entropy_bound,
              "the full vocabulary's entropy, whatever top_k");
}

// Sampling and scoring read one distribution: the same token has the same bits.
TEST_P(LmHead, ScoringASampledTokenGivesItsBits) {
  for (const int64_t V : {5, 1000, 1024, 1025, 2500}) {
    HeadRig rig(GetParam(), {Numbers(static_cast<uint64_t>(V)).vector(V, 4.0f)});
    for (const float temperature : {1.0f, 0.0f, 0.3f, 1.7f}) {
      StepPlan plan = rig.plan();
      plan.wants_entropy = true;
      for (int32_t s = 0; s < 32; ++s) {
        plan.slot_inits.push_back({.slot = s,
                                   .sampling = {.temperature = temperature},
                                   .sample_index = static_cast<uint32_t>(s),
                                   .next_position = 1,
                                   .end_position = 9});
        plan.samples.push_back({0, s});
      }
      const StepResult sampled = rig.run(plan);
      StepPlan scoring = rig.plan();
      for (const HeadResult& got : sampled.samples) {
        scoring.scores.push_back({0, got.token, temperature});
      }
      const StepResult scored = rig.run(scoring);
      for (size_t s = 0; s < 32; ++s) {
        expect_same_result(scored.scores[s], sampled.samples[s], "V " + std::to_string(V));
      }
    }
  }
}

TEST_P(LmHead, NonFiniteLogitsAreReportedAndOtherRowsKeepTheirBits) {
  constexpr int64_t V = 1500, D = 2;
  ModelShape shape = small_shape(DType::kF32);
  shape.D = D;
  shape.V = V;
  std::vector<float> weight = Numbers(17).vector(V * D);
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const auto run = [&](const std::vector<float>& in, float factor) {
    weight[1300 * D + 1] = factor;  // times 3e38: beyond f32
    Rig rig(GetParam(), shape);
    const WeightId id = rig.weight(WeightKind::kLmHead, {weight}, D);
    const Tensor rows = rig.tensor(DType::kF32, 2, D, in);
    StepPlan plan = plan_of_rows(2);
    plan.slot_inits = {{.slot = 0, .end_position = 9}, {.slot = 1, .end_position = 9}};
    plan.samples = {{0, 0}, {1, 1}};
    plan.scores = {{0, 3}, {1, 3}};
    return rig.run(plan, [&](Backend& backend) { backend.lm_head({.weight = id, .in = rows}); });
  };
  const StepResult clean = run({0.5f, 0.0f, 1.0f, 0.0f}, 10.0f);
  EXPECT_TRUE(clean.samples[1].is_finite);
  for (const auto& [bad, factor] : {std::pair{kNaN, 10.0f}, {3e38f, 10.0f}, {3e38f, -10.0f}}) {
    const StepResult got = run({0.5f, 0.0f, 1.0f, bad}, factor);
    EXPECT_FALSE(got.samples[1].is_finite);
    EXPECT_FALSE(got.scores[1].is_finite);
    expect_same_result(got.samples[0], clean.samples[0], "sampled row before the broken one");
    expect_same_result(got.scores[0], clean.scores[0], "scored row before the broken one");
  }
}

TEST_P(LmHead, LogitsThatATemperatureTakesBeyondF32AreReported) {
  auto logits = Numbers(18).vector(1025, 4.0f);
  logits[7] = 1e35f;
  HeadRig rig(GetParam(), {logits});
  StepPlan plan = rig.plan();
  plan.slot_inits = {{.slot = 0, .sampling = {.temperature = 1e-4f}, .end_position = 9}};
  plan.samples = {{0, 0}};
  plan.scores = {{0, 7, 1e-4f}, {0, 7, 1.0f}};
  const StepResult got = rig.run(plan);
  EXPECT_FALSE(got.samples[0].is_finite);
  EXPECT_FALSE(got.scores[0].is_finite);
  EXPECT_TRUE(got.scores[1].is_finite);
  EXPECT_EQ(got.scores[1].logprob, 0.0f);
}

TEST_P(LmHead, RowsDoNotInfluenceEachOther) {
  constexpr int64_t V = 2500, D = 48, kRows = 23;
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    ModelShape shape = small_shape(dtype);
    shape.D = D;
    shape.V = V;
    Numbers numbers(23);
    const auto weight = numbers.vector(V * D), in = numbers.vector(kRows * D);
    const auto run = [&](const std::vector<int32_t>& rows, int32_t threads) {
      Rig rig(GetParam(), shape, {.num_threads = threads});
      const WeightId id = rig.weight(WeightKind::kEmbedding, {weight}, D);
      StepPlan plan = plan_of_rows(static_cast<int64_t>(rows.size()));
      plan.wants_entropy = true;
      std::vector<float> chosen;
      for (size_t i = 0; i < rows.size(); ++i) {
        const auto slot = static_cast<int32_t>(i);
        chosen.insert(chosen.end(), in.begin() + rows[i] * D, in.begin() + (rows[i] + 1) * D);
        plan.slot_inits.push_back({.slot = slot,
                                   .sampling = {.temperature = 0.9f, .top_k = 200, .top_p = 0.95f},
                                   .prompt_hash = static_cast<uint64_t>(rows[i]),
                                   .end_position = 9});
        plan.samples.push_back({slot, slot});
      }
      const Tensor tensor = rig.tensor(dtype, static_cast<int64_t>(rows.size()), D, chosen);
      return rig.run(plan,
                     [&](Backend& backend) { backend.lm_head({.weight = id, .in = tensor}); });
    };
    std::vector<HeadResult> alone;
    for (int32_t row = 0; row < kRows; ++row) alone.push_back(run({row}, 2).samples[0]);
    for (const int32_t threads : numbers_of(GetParam(), 1, 3, 1)) {
      const auto order = Numbers(static_cast<uint64_t>(threads)).permutation(kRows);
      const StepResult batch = run(order, threads);
      for (size_t i = 0; i < order.size(); ++i) {
        expect_same_result(batch.samples[i], alone[static_cast<size_t>(order[i])],
                           "row " + std::to_string(order[i]));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, LmHead, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
