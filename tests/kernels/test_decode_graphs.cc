// Steps that only decode, as graphs and kernel by kernel, on every backend that has graphs: the
// same bits for any number of rows, with two steps under way, whatever lies in rows that are
// skipped, behind sleep too.
#include <numeric>

#include "tests/kernels/decoding_steps.h"

namespace rollpack::kernels::testing {
namespace {

std::vector<std::string> backends_with_graphs() {
  std::vector<std::string> names = tested_backends();
  std::erase_if(names,
                [](const std::string& name) { return name != "cuda" && name != kEmulatedCuda; });
  return names;
}

using DecodeGraphs = BackendTest;
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(DecodeGraphs);

// A model with graphs and one without, that are given the same steps.
class Pair {
 public:
  Pair(const std::string& backend, DType dtype, int32_t max_rows)
      : with_(backend, dtype, options(max_rows, false)),
        without_(backend, dtype, options(max_rows, true)) {
    for (TinyModel* model : {&with_, &without_}) model->run(DecodingSteps::prefill(model->V()));
    EXPECT_EQ(with_.rig().backend().info().row_buckets.back(), std::min(max_rows, 512));
    EXPECT_TRUE(without_.rig().backend().info().row_buckets.empty());
  }

  // The model with graphs sleeps and wakes up, in two parts and with the KV pages last.
  void sleep(int level) {
    Backend& backend = with_.rig().backend();
    const std::vector<int32_t> buckets = backend.info().row_buckets;
    backend.sleep(level);
    backend.wake_up({.weights = true});
    if (level == 2) with_.rig().commit();
    backend.wake_up({.kv_cache = true});
    EXPECT_EQ(backend.info().row_buckets, buckets);
    with_.run(DecodingSteps::prefill(with_.V()));
  }

  // A batch of `rows` sequences, then others of them, each step given before the last has ended.
  void expect_same(int32_t rows, uint64_t seed) {
    DecodingSteps steps(seed);
    std::vector<StepPlan> plans = {steps.first(rows, with_.V())};
    std::vector<int32_t> slots(static_cast<size_t>(rows));
    std::iota(slots.begin(), slots.end(), 0);
    plans.push_back(steps.next(slots));
    slots.resize(static_cast<size_t>(rows + 1) / 2);
    std::ranges::reverse(slots);
    plans.push_back(steps.next(slots));
    const std::vector<StepResult> got = run(with_, plans), want = run(without_, plans);
    for (size_t step = 0; step < plans.size(); ++step) {
      const std::string what = std::to_string(rows) + " rows, seed " + std::to_string(seed) +
                               ", step " + std::to_string(step);
      EXPECT_EQ(got[step].failed_sequences, want[step].failed_sequences) << what;
      ASSERT_EQ(got[step].samples.size(), want[step].samples.size()) << what;
      for (size_t i = 0; i < got[step].samples.size(); ++i) {
        const HeadResult &one = got[step].samples[i], &other = want[step].samples[i];
        EXPECT_EQ(one.slot, other.slot) << what;
        EXPECT_EQ(one.is_rejected, other.is_rejected) << what;
        if (!other.is_rejected) {
          expect_same_result(one, other, what + ", sample " + std::to_string(i));
        }
      }
    }
  }

 private:
  static RigOptions options(int32_t max_rows, bool is_eager) {
    return {.max_num_seqs = max_rows,
            .max_num_batched_tokens = std::max(max_rows, 16 * DecodingSteps::kPromptPages),
            .num_pages = DecodingSteps::num_pages(max_rows),
            .enforce_eager = is_eager};
  }

  static std::vector<StepResult> run(TinyModel& model, const std::vector<StepPlan>& plans) {
    model.poison();
    return run_ahead(model.rig().backend(), plans);
  }

  TinyModel with_, without_;
};

TEST_P(DecodeGraphs, ChangeNoBitForAnyNumberOfRows) {
  constexpr int32_t kMaxRows = 70;
  const bool takes_all = takes_all_cases(GetParam());
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    Pair pair(GetParam(), dtype, kMaxRows);
    std::vector<int32_t> all(kMaxRows);
    std::iota(all.rbegin(), all.rend(), 1);
    // Large ones first: what they leave behind lies in the rows that smaller ones skip.
    std::vector<int32_t> few = {kMaxRows, 33, 9, 17, 3, 1, 2, 8};
    if (dtype == DType::kF32) few = {6};
    for (const int32_t rows : takes_all ? all : few) {
      pair.expect_same(rows, static_cast<uint64_t>(rows));
    }
    if (HasFailure()) return;
  }
  if (!takes_all) return;
  Pair pair(GetParam(), DType::kBF16, 520);
  for (const int32_t rows : {256, 300, 129, 512}) pair.expect_same(rows, 2);
}

TEST_P(DecodeGraphs, ChangeNoBitBehindSleep) {
  Pair pair(GetParam(), DType::kBF16, 8);
  pair.expect_same(7, 1);
  for (const int level : {1, 2}) {
    pair.sleep(level);
    pair.expect_same(5, static_cast<uint64_t>(level) + 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, DecodeGraphs, ::testing::ValuesIn(backends_with_graphs()));

}  // namespace
}  // namespace rollpack::kernels::testing
