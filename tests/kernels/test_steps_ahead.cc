// Steps planned before the results of the one before are known, on every backend: a sample that
// has ended meanwhile draws nothing, and nobody else's bits change.
#include <limits>

#include "tests/kernels/tiny_model.h"

namespace rollpack::kernels::testing {
namespace {

using StepsAhead = BackendTest;
using Ids = std::vector<int32_t>;

constexpr int32_t kPrompt = 9;

// Sample `slot`, on pages of its own.
SlotInit init_of(int32_t slot, int32_t end_position, Ids stops = {}) {
  return {.slot = slot,
          .sampling = {.temperature = 1.0f},
          .seed = 4,
          .prompt_hash = 9,
          .sample_index = static_cast<uint32_t>(slot),
          .next_position = kPrompt,
          .end_position = end_position,
          .stop_token_ids = std::move(stops)};
}

StepPlan prefill(const std::vector<SlotInit>& inits, const Ids& prompt) {
  StepPlan plan{.slot_inits = inits};
  for (const SlotInit& init : inits) {
    add_sequence(plan, prompt, 0, page_range(3 * init.slot, 3), init.slot);
    plan.samples.push_back({static_cast<int32_t>(plan.num_rows()) - 1, init.slot});
  }
  return plan;
}

StepPlan decoding(const Ids& slots, int32_t position) {
  StepPlan plan;
  for (const int32_t slot : slots) {
    add_sequence(plan, {kPendingToken}, position, page_range(3 * slot, 3), slot);
    plan.samples.push_back({static_cast<int32_t>(plan.num_rows()) - 1, slot});
  }
  return plan;
}

TEST_P(StepsAhead, ASampleThatHasEndedDrawsNothingUntilItsSlotIsFilledAgain) {
  TinyModel model(GetParam(), DType::kBF16);
  const Ids prompt = Numbers(3).ids(kPrompt, model.V());
  const std::vector<StepPlan> endless = {prefill({init_of(0, 40), init_of(1, 40)}, prompt),
                                         decoding({0, 1}, kPrompt), decoding({0, 1}, kPrompt + 1)};
  std::vector<StepResult> want;
  for (const StepPlan& plan : endless) want.push_back(model.run(plan));

  // Sample 0 draws a stop token in the second step, or in the first its last token.
  const int32_t stop = want[1].samples[0].token;
  const bool stops_at_once = want[0].samples[0].token == stop;
  for (const bool by_stop : {true, false}) {
    std::vector<StepPlan> plans = endless;
    plans[0] = prefill({by_stop ? init_of(0, 40, {stop}) : init_of(0, kPrompt + 1), init_of(1, 40)},
                       prompt);
    plans.push_back(prefill({init_of(0, 40)}, prompt));
    const std::vector<StepResult> got = run_ahead(model.rig().backend(), plans);
    const size_t last = by_stop && !stops_at_once ? 1 : 0;
    for (size_t step = 0; step < 3; ++step) {
      const HeadResult& ended = got[step].samples[0];
      EXPECT_EQ(ended.is_rejected, step > last) << "step " << step;
      EXPECT_EQ(ended.slot, 0);
      if (step <= last) {
        EXPECT_EQ(ended.token, want[step].samples[0].token);
      }
      EXPECT_TRUE(got[step].failed_sequences.empty());
      expect_same_result(got[step].samples[1], want[step].samples[1],
                         "the other, step " + std::to_string(step));
    }
    EXPECT_EQ(got[last].samples[0].finish, by_stop ? SlotFinish::kStop : SlotFinish::kLength);
    expect_same_result(got[3].samples[0], want[0].samples[0], "filled again");
  }
}

TEST_P(StepsAhead, ADrawFromLogitsThatAreNotFiniteIsTheLast) {
  constexpr int64_t V = 130, D = 2;
  ModelShape shape = small_shape(DType::kF32);
  shape.D = D;
  shape.V = V;
  Rig rig(GetParam(), shape);
  const WeightId id = rig.weight(WeightKind::kLmHead, {Numbers(17).vector(V * D)}, D);
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  StepPlan plan = plan_of_rows(1);
  plan.slot_inits = {{.slot = 0, .end_position = 9}};
  plan.samples = {{0, 0}};
  const auto run = [&](float second) {
    const Tensor in = rig.tensor(DType::kF32, 1, D, {0.5f, second});
    return rig.run(plan, [&](Backend& backend) { backend.lm_head({.weight = id, .in = in}); })
        .samples.at(0);
  };
  EXPECT_FALSE(run(kNaN).is_finite);
  plan.slot_inits.clear();
  EXPECT_TRUE(run(1.0f).is_rejected);
  plan.slot_inits = {{.slot = 0, .end_position = 9}};
  const HeadResult again = run(1.0f);
  EXPECT_FALSE(again.is_rejected);
  EXPECT_TRUE(again.is_finite);
}

INSTANTIATE_TEST_SUITE_P(Backends, StepsAhead, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
