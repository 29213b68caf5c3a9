// Truncated draws of vocabularies that a block of several warps works on, against the reference at
// the same random numbers.
#include "tests/kernels/head_rig.h"

namespace rollpack::kernels::testing {
namespace {

TEST(TruncatedDraw, LargeVocabulariesDrawTheTokensOfTheReference) {
  constexpr int64_t V = 9000;
  constexpr int32_t kSlots = 3;
  auto logits = Numbers(3).vector(V, 6.0f);
  for (size_t i = 100; i < 400; ++i) logits[i * 20] = 6.5f;  // ties, more than some limits take
  const std::vector<SamplingParams> all = {{.top_k = 250},
                                           {.top_k = 5000, .top_p = 0.7f},
                                           {.temperature = 0.6f, .top_p = 0.9f},
                                           {.temperature = 1.3f, .min_p = 0.02f},
                                           {.top_p = 0.04f}};
  const auto run = [&](const std::string& backend) {
    HeadRig rig(backend, {logits});
    StepPlan plan = rig.plan();
    for (int32_t s = 0; s < kSlots * static_cast<int32_t>(all.size()); ++s) {
      plan.slot_inits.push_back({.slot = s,
                                 .sampling = all[static_cast<size_t>(s / kSlots)],
                                 .seed = 9,
                                 .sample_index = static_cast<uint32_t>(s),
                                 .next_position = 4,
                                 .min_position = s % kSlots == 0 ? 7 : 0,
                                 .end_position = 9,
                                 .stop_token_ids = {2000, 2020, 8999}});
      plan.samples.push_back({0, s});
    }
    return rig.run(plan).samples;
  };
  const auto got = run(std::string(kEmulatedCuda)), want = run("reference");
  ASSERT_EQ(got.size(), want.size());
  for (size_t s = 0; s < got.size(); ++s) {
    EXPECT_EQ(got[s].token, want[s].token) << "slot " << s;
    // Both round once what is at most 8; sums of 9,000 terms, exps of f32.
    EXPECT_NEAR(got[s].support_logmass, want[s].support_logmass, 2e-6) << "slot " << s;
    EXPECT_NEAR(got[s].scaled_logprob, want[s].scaled_logprob, 4e-6) << "slot " << s;
  }
}

}  // namespace
}  // namespace rollpack::kernels::testing
