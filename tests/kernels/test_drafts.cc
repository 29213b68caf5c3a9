// Steps that draw from a slot more than once, behind draft tokens: whatever is guessed, the draws
// that count are those of decoding token by token, bit for bit.
#include <algorithm>
#include <functional>
#include <limits>

#include "tests/kernels/tiny_model.h"

namespace rollpack::kernels::testing {
namespace {

using Drafts = BackendTest;
using Ids = std::vector<int32_t>;
using Results = std::vector<HeadResult>;

constexpr DType kDTypes[] = {DType::kBF16, DType::kF32};
constexpr int32_t kTokens = 40;
const Ids kPages = page_range(0, 5);

// Guesses for the tokens behind the first `num_drawn`, of which the newest is not computed yet.
using Guess = std::function<Ids(int32_t num_drawn)>;

SlotInit init_of(const Ids& prompt, const SamplingParams& sampling) {
  const auto length = static_cast<int32_t>(prompt.size());
  return {.slot = 3,
          .sampling = sampling,
          .seed = 5,
          .prompt_hash = 77,
          .next_position = length,
          .end_position = length + kTokens};
}

// Draws from `prompt` until the sample is finished, `guess` filling the rows behind pending tokens;
// `rejected` counts the draws that did not count.
Results decode(TinyModel& model, const Ids& prompt, const SlotInit& init, const Guess& guess,
               int32_t* rejected = nullptr) {
  const auto length = static_cast<int32_t>(prompt.size());
  StepPlan prefill{.slot_inits = {init}, .wants_entropy = true};
  add_sequence(prefill, prompt, 0, kPages, init.slot);
  prefill.samples = {{length - 1, init.slot}};
  Results drawn = {model.run(prefill).samples.at(0)};
  while (drawn.back().finish == SlotFinish::kRunning && drawn.size() <= kTokens) {
    const auto num_drawn = static_cast<int32_t>(drawn.size());
    Ids rows = guess(num_drawn);
    rows.insert(rows.begin(), kPendingToken);
    StepPlan step{.wants_entropy = true};
    add_sequence(step, rows, length + num_drawn - 1, kPages, init.slot);
    for (int32_t row = 0; row < static_cast<int32_t>(rows.size()); ++row) {
      step.samples.push_back({row, init.slot});
    }
    const StepResult result = model.run(step);
    EXPECT_TRUE(result.failed_sequences.empty());
    bool counts = true;
    for (size_t i = 0; i < rows.size(); ++i) {
      const HeadResult& got = result.samples.at(i);
      const bool follows = i == 0 || (counts && drawn.back().finish == SlotFinish::kRunning &&
                                      drawn.back().token == rows[i]);
      counts = counts && follows;
      EXPECT_EQ(got.is_rejected, !counts) << "draw " << i << " behind " << num_drawn << " tokens";
      EXPECT_EQ(got.slot, init.slot);
      if (counts) drawn.push_back(got);
      if (!counts && rejected != nullptr) ++*rejected;
    }
  }
  return drawn;
}

Ids no_guess(int32_t) {
  return {};
}

// Guesses up to five tokens, each right in `num_right` of 8 cases.
Guess guess_of(const Results& want, int32_t num_right, uint64_t seed, int64_t V) {
  return [&want, num_right, V, numbers = Numbers(seed)](int32_t num_drawn) mutable {
    Ids ids(static_cast<size_t>(numbers.below(6)));
    for (size_t i = 0; i < ids.size(); ++i) {
      const size_t at = static_cast<size_t>(num_drawn) + i;
      const bool is_right = numbers.below(8) < num_right && at < want.size();
      ids[i] = is_right ? want[at].token : numbers.below(static_cast<int32_t>(V));
    }
    return ids;
  };
}

void expect_same_with_drafts(const std::string& backend, DType dtype, const SlotInit& init,
                             const Ids& prompt, const Results& want, const std::string& what) {
  TinyModel model(backend, dtype);
  int32_t num_rejected = 0;
  for (const int32_t num_right : cases_of<int32_t>(backend, {0, 7, 8, 4}, 1)) {
    const Guess guess = guess_of(want, num_right, static_cast<uint64_t>(num_right), model.V());
    expect_same_results(decode(model, prompt, init, guess, &num_rejected), want,
                        what + ", " + std::to_string(num_right) + " of 8 right");
  }
  EXPECT_GT(num_rejected, 0);
}

TEST_P(Drafts, GuessesRightOrWrongChangeNoBit) {
  for (const DType dtype : cases_of<DType>(GetParam(), {DType::kF32, DType::kBF16}, 1)) {
    TinyModel model(GetParam(), dtype);
    const Ids prompt = Numbers(6).ids(11, model.V());
    const std::vector<SamplingParams> all = {{.temperature = 0},
                                             {.temperature = 1},
                                             {.temperature = 0.7f, .top_k = 20},
                                             {.temperature = 1, .top_p = 0.8f, .min_p = 0.01f}};
    for (size_t i = 0; i < all.size(); ++i) {
      const SlotInit init = init_of(prompt, all[i]);
      const Results want = decode(model, prompt, init, no_guess);
      ASSERT_EQ(want.size(), kTokens);
      EXPECT_EQ(want.back().finish, SlotFinish::kLength);
      expect_same_with_drafts(GetParam(), dtype, init, prompt, want,
                              "parameters " + std::to_string(i));
    }
  }
}

TEST_P(Drafts, AStopInsideADraftEndsTheSampleThere) {
  for (const float temperature : {0.0f, 1.0f}) {
    TinyModel model(GetParam(), DType::kBF16);
    const Ids prompt = Numbers(8).ids(9, model.V());
    SlotInit init = init_of(prompt, {.temperature = temperature});
    const Results endless = decode(model, prompt, init, no_guess);
    for (const size_t stop_at : cases_of<size_t>(GetParam(), {6, 7, 8, 9}, 1)) {
      init.stop_token_ids = {endless[stop_at].token};
      const Results want = decode(model, prompt, init, no_guess);
      ASSERT_LE(want.size(), stop_at + 1);
      EXPECT_EQ(want.back().finish, SlotFinish::kStop);
      expect_same_with_drafts(GetParam(), DType::kBF16, init, prompt, want,
                              "stop at " + std::to_string(stop_at));
    }
  }
}

// The bans of min_tokens end between two draws of one step: each has its own position's support.
TEST_P(Drafts, MinTokensEndsInsideADraft) {
  for (const SamplingParams& sampling :
       {SamplingParams{.temperature = 0}, {.temperature = 1}, {.temperature = 1, .top_k = 50}}) {
    TinyModel model(GetParam(), DType::kF32);
    const Ids prompt = Numbers(9).ids(10, model.V());
    SlotInit init = init_of(prompt, sampling);
    const Results endless = decode(model, prompt, init, no_guess);
    for (const HeadResult& token : endless) init.stop_token_ids.push_back(token.token);
    std::ranges::sort(init.stop_token_ids);
    bool was_cut = false;
    for (const int32_t min_tokens : numbers_of(GetParam(), 5, 8, 1)) {
      init.min_position = init.next_position + min_tokens;
      const Results want = decode(model, prompt, init, no_guess);
      ASSERT_GE(want.size(), static_cast<size_t>(min_tokens));
      for (const HeadResult& token : want) was_cut = was_cut || token.support_logmass < 0;
      expect_same_with_drafts(GetParam(), DType::kF32, init, prompt, want,
                              "min_tokens " + std::to_string(min_tokens));
    }
    EXPECT_EQ(was_cut, sampling.temperature != 0);
  }
}

TEST_P(Drafts, TheLastTokenInsideADraftEndsTheSampleByLength) {
  TinyModel model(GetParam(), DType::kBF16);
  const Ids prompt = Numbers(10).ids(14, model.V());
  const Results whole = decode(model, prompt, init_of(prompt, {}), no_guess);
  for (const int32_t limit : cases_of<int32_t>(GetParam(), {2, 3, 4, 7}, 2)) {
    SlotInit init = init_of(prompt, {});
    init.end_position = init.next_position + limit;
    const Results want = decode(model, prompt, init, no_guess);
    ASSERT_EQ(want.size(), static_cast<size_t>(limit));
    // Guesses reach past the end of the sample: those draws are rejected.
    int32_t num_rejected = 0;
    const auto all_right = [&](int32_t num_drawn) {
      Ids ids;
      for (int32_t i = num_drawn; i < num_drawn + 5; ++i) {
        ids.push_back(whole[static_cast<size_t>(i)].token);
      }
      return ids;
    };
    expect_same_results(decode(model, prompt, init, all_right, &num_rejected), want,
                        "limit " + std::to_string(limit));
    EXPECT_EQ(num_rejected, 6 - (limit - 1));  // one step of six draws
  }
}

TEST_P(Drafts, DrawsOfOtherSequencesInTheStepKeepTheirBits) {
  TinyModel model(GetParam(), DType::kBF16);
  constexpr int32_t kSequences = 4;
  std::vector<Ids> prompts;
  std::vector<SlotInit> inits;
  std::vector<Results> want;
  for (int32_t s = 0; s < kSequences; ++s) {
    prompts.push_back(Numbers(static_cast<uint64_t>(40 + s)).ids(7 + 9 * s, model.V()));
    inits.push_back(init_of(prompts.back(), {.temperature = s % 2 == 0 ? 0.9f : 0.0f}));
    want.push_back(decode(model, prompts.back(), inits.back(), no_guess));
    inits.back().slot = s;
  }
  std::vector<Results> got(kSequences);
  Numbers numbers(12);
  for (int32_t step_index = 0; step_index < 12; ++step_index) {
    StepPlan step{.wants_entropy = true};
    std::vector<int32_t> owners;
    for (const int32_t s : numbers.permutation(kSequences)) {
      const auto index = static_cast<size_t>(s);
      const auto length = static_cast<int32_t>(prompts[index].size());
      const auto num_drawn = static_cast<int32_t>(got[index].size());
      Ids rows = prompts[index];
      int32_t position = 0;
      if (num_drawn == 0) {
        step.slot_inits.push_back(inits[index]);
      } else {
        rows = guess_of(want[index], 6, numbers.next(), model.V())(num_drawn);
        rows.insert(rows.begin(), kPendingToken);
        position = length + num_drawn - 1;
      }
      add_sequence(step, rows, position, page_range(6 * s, 6), s);
      // The prompt's last row draws, and every row behind it.
      const auto num_draws = num_drawn == 0 ? 1 : static_cast<int32_t>(rows.size());
      for (int32_t i = num_draws; i > 0; --i) {
        step.samples.push_back({static_cast<int32_t>(step.num_rows()) - i, s});
        owners.push_back(s);
      }
    }
    const Results results = model.run(step).samples;
    for (size_t i = 0; i < results.size(); ++i) {
      if (!results[i].is_rejected) got[static_cast<size_t>(owners[i])].push_back(results[i]);
    }
  }
  for (size_t s = 0; s < kSequences; ++s) {
    ASSERT_GT(got[s].size(), 12u) << "no draft of sequence " << s << " was accepted";
    const size_t count = std::min(got[s].size(), want[s].size());
    expect_same_results({got[s].begin(), got[s].begin() + static_cast<ptrdiff_t>(count)},
                        {want[s].begin(), want[s].begin() + static_cast<ptrdiff_t>(count)},
                        "sequence " + std::to_string(s));
  }
}

// A wrong guess may overflow where the sequence's own tokens do not.
TEST_P(Drafts, AWrongDraftWithoutFiniteKeysHarmsNothing) {
  constexpr int64_t V = 40, D = 4;
  ModelShape shape = small_shape(DType::kF32);
  shape.D = D;
  shape.V = V;
  shape.H = shape.G = 1;
  shape.K = 2;
  shape.L = 1;
  std::vector<float> embedding = Numbers(3).vector(V * D);
  embedding[33 * D + 1] = std::numeric_limits<float>::infinity();
  Rig rig(GetParam(), shape);
  const WeightId embed = rig.weight(WeightKind::kEmbedding, {embedding}, D);
  const WeightId head = rig.weight(WeightKind::kLmHead, {Numbers(4).vector(V * D)}, D);
  // K and V of a row are numbers of its embedding.
  std::vector<float> picks(6 * D, 0.0f);
  for (int64_t i = 0; i < 6; ++i) picks[static_cast<size_t>(i * D + i % D)] = 1.0f;
  const WeightId project = rig.weight(WeightKind::kLinear, {picks}, D);
  const auto run = [&](const Ids& ids) {
    const auto rows = static_cast<int64_t>(ids.size());
    const Tensor x = rig.tensor(DType::kF32, rows, D);
    const Tensor qkv = rig.tensor(DType::kF32, rows, 3 * 2), q = rig.tensor(DType::kF32, rows, 2);
    const Tensor gathered = rig.tensor(DType::kF32, rows, D);
    const Tensor table = rig.tensor(DType::kF32, 8, 2, std::vector<float>(16, 1.0f));
    StepPlan plan;
    plan.slot_inits = {{.slot = 0, .sampling = {.temperature = 0}, .end_position = 9}};
    add_sequence(plan, ids, 0, {0}, 0);
    for (int32_t row = 0; row < static_cast<int32_t>(rows); ++row) plan.samples.push_back({row, 0});
    return rig.run(plan, [&](Backend& backend) {
      backend.embed({.weight = embed, .out = x});
      backend.linear({.weight = project, .in = x, .out = qkv});
      backend.rope_append({.layer = 0, .qkv = qkv, .rope_table = table, .q = q});
      backend.gather_head_rows({.in = x, .out = gathered});
      backend.lm_head({.weight = head, .in = gathered});
    });
  };
  const HeadResult first = run({1}).samples.at(0);
  ASSERT_NE(first.token, 33);
  const StepResult wrong = run({1, 33});
  EXPECT_TRUE(wrong.failed_sequences.empty());
  EXPECT_TRUE(wrong.samples.at(1).is_rejected);
  expect_same_result(wrong.samples.at(0), first, "before a wrong draft");
  const StepResult own = run({33, first.token});
  EXPECT_EQ(own.failed_sequences, Ids{0}) << "the sequence's own token does fail it";
  EXPECT_FALSE(own.samples.at(0).is_finite);
  EXPECT_TRUE(own.samples.at(1).is_rejected) << "nothing counts behind a draw that is void";
}

TEST_P(Drafts, APlanWhoseDraftsAreOutOfPlaceSaysSo) {
  TinyModel model(GetParam(), DType::kF32);
  StepPlan good;
  good.slot_inits = {{.slot = 2, .end_position = 9}, {.slot = 3, .end_position = 9}};
  add_sequence(good, {1, 2, 3}, 0, {0}, 2);
  add_sequence(good, {4, 5}, 0, {1}, 3);
  good.samples = {{0, 2}, {1, 2}, {2, 2}, {3, 3}};
  EXPECT_EQ(model.run(good).samples.size(), 4u);
  const auto text = [&](auto spoil) {
    StepPlan plan = good;
    spoil(plan);
    return error_text([&] { model.run(plan); });
  };
  const std::string place = ", with a token id, in the sequence of slot ";
  EXPECT_EQ(text([](StepPlan& p) { p.samples[1].row = 2; }),
            "step.samples[1].row = 2: expected 1" + place + "2 behind its draw before");
  EXPECT_EQ(text([](StepPlan& p) {
              p.samples = {{2, 2}, {3, 2}};
            }),
            "step.samples[1].row = 3: expected 3" + place + "2 behind its draw before");
  EXPECT_EQ(text([](StepPlan& p) {
              p.samples = {{3, 2}, {4, 2}};
            }),
            "step.samples[1].row = 4: expected 4" + place + "2 behind its draw before");
  EXPECT_EQ(text([](StepPlan& p) {
              p.samples = {{0, 2}, {3, 3}, {1, 2}};
            }),
            "step.samples[2].slot = 2: expected a filled slot, all draws of a slot next to each "
            "other");
  model.run(good);
  StepPlan pending;
  add_sequence(pending, {kPendingToken, kPendingToken}, 3, {0}, 2);
  pending.samples = {{0, 2}, {1, 2}};
  EXPECT_EQ(error_text([&] { model.run(pending); }),
            "step.samples[1].row = 1: expected 1" + place + "2 behind its draw before");
}

INSTANTIATE_TEST_SUITE_P(Backends, Drafts, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
