// A sample's life over several steps of a tiny transformer: siblings that share their prompt,
// forks, preemption, two steps in flight and pads change no bit of it.
#include <algorithm>

#include "tests/kernels/tiny_model.h"
#include "tests/sanitized.h"

namespace rollpack::kernels::testing {
namespace {

using TransformerDecoding = BackendTest;
using Ids = std::vector<int32_t>;
using Results = std::vector<HeadResult>;

// Scores every row; the successor of the last one is token 0.
Results one_pass(TinyModel& model, const Ids& ids) {
  StepPlan plan;
  add_sequence(plan, ids, 0, page_range(0, pages_for(static_cast<int64_t>(ids.size()))));
  Ids successors(ids.begin() + 1, ids.end());
  successors.push_back(0);
  score_all(plan, successors);
  return model.run(plan).scores;
}

SlotInit slot_init(int32_t slot, size_t next_position) {
  return {.slot = slot,
          .sampling = {.temperature = 0.8f, .top_p = 0.95f},
          .seed = 5,
          .prompt_hash = 17,
          .sample_index = static_cast<uint32_t>(slot),
          .next_position = static_cast<int32_t>(next_position),
          .end_position = TinyModel::kPositions};
}

// Sample 0 of the prompt, one token a step from pending tokens, on pages 0, 1, ...
Results decode(TinyModel& model, const Ids& prompt, int32_t num_tokens) {
  const auto length = static_cast<int32_t>(prompt.size());
  const Ids pages = page_range(0, pages_for(length + num_tokens));
  Results results;
  for (int32_t i = 0; i < num_tokens; ++i) {
    StepPlan plan{.wants_entropy = true};
    if (i == 0) plan.slot_inits = {slot_init(0, prompt.size())};
    add_sequence(plan, i == 0 ? prompt : Ids{kPendingToken}, i == 0 ? 0 : length + i - 1, pages, 0);
    plan.samples = {{static_cast<int32_t>(plan.num_rows()) - 1, 0}};
    results.push_back(model.run(plan).samples.at(0));
  }
  return results;
}

TEST_P(TransformerDecoding, EveryCutOfAPromptLongerThanAChunkGivesTheBitsOfOnePass) {
  // Plain loops take 50 ms a cut, emulated kernels more.
  const bool is_fast = takes_all_cases(GetParam());
  const size_t every = kIsSanitized ? 7 : 1;  // with all remainders of a page
  const size_t stride = GetParam() == "reference" ? 19 : is_fast ? every : 130;
  for (const DType dtype : cases_of(GetParam(), kModelDTypes, 1)) {
    TinyModel model(GetParam(), dtype);
    const Ids ids = Numbers(2).ids(267, model.V());
    const Results want = one_pass(model, ids);
    for (size_t cut = 1; cut < ids.size(); cut += stride) {
      StepPlan first, second;
      add_sequence(first, {ids.begin(), ids.begin() + cut}, 0, page_range(20, 17));
      add_sequence(second, {ids.begin() + cut, ids.end()}, static_cast<int32_t>(cut),
                   page_range(20, 17));
      second.scores = {{0, cut + 1 < ids.size() ? ids[cut + 1] : 0},  // at the cut and at the end
                       {static_cast<int32_t>(second.num_rows()) - 1, 0}};
      model.run(first);
      const Results got = model.run(second).scores;
      const std::string what = "cut " + std::to_string(cut);
      expect_same_result(got[0], want[cut], what);
      expect_same_result(got[1], want.back(), what);
      if (HasFailure()) return;  // one cut says enough
    }
  }
}

TEST_P(TransformerDecoding, TokenByTokenAcrossAChunkGivesTheBitsOfOnePass) {
  for (const DType dtype : cases_of(GetParam(), kModelDTypes, 1)) {
    TinyModel model(GetParam(), dtype);
    const Ids ids = Numbers(3).ids(270, model.V());
    const Results want = one_pass(model, ids);
    const size_t first = takes_all_cases(GetParam()) ? 0 : 254;
    if (first > 0) {  // in one step up to where the second chunk begins
      StepPlan plan;
      add_sequence(plan, {ids.begin(), ids.begin() + static_cast<ptrdiff_t>(first)}, 0,
                   page_range(40, 17));
      model.run(plan);
    }
    for (size_t t = first; t < ids.size(); ++t) {
      StepPlan plan;
      add_sequence(plan, {ids[t]}, static_cast<int32_t>(t), page_range(40, 17));
      score_all(plan, {t + 1 < ids.size() ? ids[t + 1] : 0});
      expect_same_result(model.run(plan).scores[0], want[t], "token " + std::to_string(t));
      if (HasFailure()) return;
    }
  }
}

TEST_P(TransformerDecoding, SiblingsOfOneRowDrawWhatTheyDrawAlone) {
  for (const DType dtype : kModelDTypes) {
    TinyModel model(GetParam(), dtype);
    const Ids prompt = Numbers(13).ids(30, model.V());
    const auto draw = [&](const Ids& slots) {
      StepPlan plan{.wants_entropy = true};
      add_sequence(plan, prompt, 0, {90, 91});
      for (const int32_t slot : slots) {
        plan.slot_inits.push_back(slot_init(slot, prompt.size()));
        plan.samples.push_back({29, slot});
      }
      return model.run(plan).samples;
    };
    const Results group = draw({3, 0, 2, 1, 7, 5, 4, 6});
    for (const HeadResult& sample : group) {
      expect_same_result(sample, draw({sample.slot})[0], "sibling " + std::to_string(sample.slot));
    }
    EXPECT_TRUE(std::any_of(group.begin(), group.end(), [&](const HeadResult& sample) {
      return sample.token != group[0].token;
    })) << "siblings have random numbers of their own";
  }
}

// Sequences of one step may stand on pages that another sequence of the same step fills.
TEST_P(TransformerDecoding, SiblingsMayReadAPrefixWrittenInTheirOwnStep) {
  for (const DType dtype : kModelDTypes) {
    TinyModel model(GetParam(), dtype);
    const Ids ids = Numbers(8).ids(40, model.V());
    const Results want = one_pass(model, ids);
    StepPlan plan;
    add_sequence(plan, {ids.begin(), ids.begin() + 32}, 0, {9, 4});
    for (const int32_t own : {30, 31}) {
      add_sequence(plan, {ids.begin() + 32, ids.end()}, 32, {9, 4, own});
      Ids successors(ids.begin() + 33, ids.end());
      successors.push_back(0);
      score_all(plan, successors);
    }
    const Results got = model.run(plan).scores;
    expect_same_results({got.begin(), got.begin() + 8}, {want.begin() + 32, want.end()}, "first");
    expect_same_results({got.begin() + 8, got.end()}, {want.begin() + 32, want.end()}, "second");
  }
}

TEST_P(TransformerDecoding, ForksInsideAPageContinueWithTheSameBits) {
  TinyModel model(GetParam(), DType::kBF16);
  const Ids ids = Numbers(9).ids(60, model.V());
  const Results want = one_pass(model, ids);
  for (const int32_t fork : cases_of<int32_t>(GetParam(), {1, 2, 15, 17, 31, 46, 37}, 2)) {
    StepPlan prefix, rest;
    add_sequence(prefix, {ids.begin(), ids.begin() + fork}, 0, page_range(20, 4));
    model.run(prefix);
    Ids pages = page_range(30, 4);
    const int32_t whole = fork / 16;  // pages that are shared; the next one is copied
    std::copy_n(page_range(20, 4).begin(), whole, pages.begin());
    rest.page_copies = {{20 + whole, 30 + whole, fork % 16}};
    add_sequence(rest, {ids.begin() + fork, ids.end()}, fork, pages);
    Ids successors(ids.begin() + fork + 1, ids.end());
    successors.push_back(0);
    score_all(rest, successors);
    expect_same_results(model.run(rest).scores, {want.begin() + fork, want.end()},
                        "forked at " + std::to_string(fork));
  }
}

// Preempted: the prompt and the tokens sampled so far are prefilled again, in another slot.
TEST_P(TransformerDecoding, ResumedSamplesContinueWithTheSameBits) {
  for (const DType dtype : kModelDTypes) {
    TinyModel model(GetParam(), dtype);
    const Ids prompt = Numbers(14).ids(21, model.V());
    const Results want = decode(model, prompt, 12);
    for (const size_t done : {1, 5, 11}) {
      Ids ids = prompt;
      for (size_t i = 0; i < done; ++i) ids.push_back(want[i].token);
      StepPlan plan{.wants_entropy = true};
      add_sequence(plan, ids, 0, page_range(60, 3));
      plan.slot_inits = {slot_init(9, ids.size())};
      plan.slot_inits[0].sample_index = 0;
      plan.samples = {{static_cast<int32_t>(ids.size()) - 1, 9}};
      expect_same_result(model.run(plan).samples[0], want[done],
                         "resumed behind " + std::to_string(done));
    }
  }
}

// The second step embeds a token that the first has yet to sample when it is submitted.
TEST_P(TransformerDecoding, PendingTokensFlowBetweenStepsInFlight) {
  for (const DType dtype : kModelDTypes) {
    TinyModel model(GetParam(), dtype);
    const Ids prompt = Numbers(15).ids(10, model.V());
    const Results want = decode(model, prompt, 2);
    StepPlan first{.wants_entropy = true}, second{.wants_entropy = true};
    first.slot_inits = {slot_init(0, prompt.size())};
    add_sequence(first, prompt, 0, {70});
    first.samples = {{9, 0}};
    add_sequence(second, {kPendingToken}, 10, {70}, 0);
    second.samples = {{0, 0}};
    Backend& backend = model.rig().backend();
    const StepHandle one = backend.submit(first), two = backend.submit(second);
    expect_same_result(backend.wait(one, soon()).samples[0], want[0], "first");
    expect_same_result(backend.wait(two, soon()).samples[0], want[1], "second");
  }
}

TEST_P(TransformerDecoding, LeftPadsOfAWaveAndTheirIdsChangeNothing) {
  for (const DType dtype : kModelDTypes) {
    TinyModel model(GetParam(), dtype);
    const Ids a = Numbers(10).ids(33, model.V()), b = Numbers(11).ids(20, model.V());
    const Results want_a = one_pass(model, a), want_b = one_pass(model, b);
    const Ids pad_ids = {0, 1, static_cast<int32_t>(model.V()) - 1, a[0]};
    for (const int32_t pad_id : cases_of(GetParam(), pad_ids, 1)) {
      StepPlan plan;
      for (const Ids* ids : {&a, &b}) {  // each padded to 40 columns, as one sequence of rows
        const auto pads = 40 - static_cast<int32_t>(ids->size());
        Ids row(static_cast<size_t>(pads), pad_id);
        row.insert(row.end(), ids->begin(), ids->end());
        add_sequence(plan, row, -pads, page_range(ids == &a ? 0 : 10, 3));
        const int32_t first = plan.sequences.back().row_begin;
        std::fill_n(plan.positions.begin() + first, pads, kPadPosition);
        for (size_t t = 0; t < ids->size(); ++t) {
          plan.scores.push_back(
              {first + pads + static_cast<int32_t>(t), t + 1 < ids->size() ? (*ids)[t + 1] : 0});
        }
      }
      const Results got = model.run(plan).scores;
      const std::string what = "pad id " + std::to_string(pad_id);
      expect_same_results({got.begin(), got.begin() + 33}, want_a, what);
      expect_same_results({got.begin() + 33, got.end()}, want_b, what);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, TransformerDecoding, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
