// Whole steps of a tiny transformer over every backend: however the same tokens are cut into steps,
// placed on pages or batched with others, every row gives the same bits.
#include <algorithm>
#include <iterator>

#include "tests/kernels/tiny_model.h"

namespace rollpack::kernels::testing {
namespace {

using TransformerSteps = BackendTest;
using Ids = std::vector<int32_t>;
using Results = std::vector<HeadResult>;

Ids slice(const Ids& ids, int64_t begin, int64_t end) {
  return {ids.begin() + begin, ids.begin() + end};
}

// Scores ids[begin + 1 .. end] as the successors of rows [begin, end).
void add_scored(StepPlan& plan, const Ids& ids, int64_t begin, int64_t end, const Ids& pages) {
  add_sequence(plan, slice(ids, begin, end), static_cast<int32_t>(begin), pages);
  score_all(plan, slice(ids, begin + 1, end + 1));
}

Results one_pass(TinyModel& model, const Ids& ids, const Ids& pages) {
  StepPlan plan;
  add_scored(plan, ids, 0, static_cast<int64_t>(ids.size()) - 1, pages);
  return model.run(plan).scores;
}

Results in_two(TinyModel& model, const Ids& ids, int64_t cut, const Ids& pages) {
  StepPlan first, second;
  add_scored(first, ids, 0, cut, pages);
  add_scored(second, ids, cut, static_cast<int64_t>(ids.size()) - 1, pages);
  Results results = model.run(first).scores;
  const Results rest = model.run(second).scores;
  results.insert(results.end(), rest.begin(), rest.end());
  return results;
}

TEST_P(TransformerSteps, PrefillCutAnywhereGivesTheBitsOfOnePass) {
  for (const DType dtype : cases_of(GetParam(), kModelDTypes, 1)) {
    TinyModel model(GetParam(), dtype);
    const Ids ids = Numbers(1).ids(51, model.V());
    const Results want = one_pass(model, ids, page_range(0, 4));
    for (const int32_t cut : numbers_of(GetParam(), 1, 49, 5)) {
      expect_same_results(in_two(model, ids, cut, page_range(8, 4)), want,
                          "cut " + std::to_string(cut));
    }
  }
}

TEST_P(TransformerSteps, PrefillCutAroundAttentionChunksGivesTheBitsOfOnePass) {
  for (const DType dtype : cases_of(GetParam(), kModelDTypes, 1)) {
    TinyModel model(GetParam(), dtype);
    const Ids ids = Numbers(2).ids(291, model.V());
    const Results want = one_pass(model, ids, page_range(0, 19));
    for (const int64_t cut : cases_of<int64_t>(GetParam(), {1, 31, 64, 255, 289, 257, 256}, 1)) {
      expect_same_results(in_two(model, ids, cut, page_range(20, 19)), want,
                          "cut " + std::to_string(cut));
    }
  }
}

TEST_P(TransformerSteps, SharedPrefixPagesGiveTheBitsOfPrivateOnes) {
  for (const DType dtype : cases_of(GetParam(), kModelDTypes, 1)) {
    TinyModel model(GetParam(), dtype);
    for (const int32_t shared : {32, 37}) {  // whole pages; five tokens more on a copied one
      const Ids prefix = Numbers(3).ids(shared, model.V());
      StepPlan prefill;
      add_sequence(prefill, prefix, 0, {0, 1, 2});
      model.run(prefill);
      StepPlan fork;
      std::vector<Ids> texts;
      for (int32_t child = 0; child < 3; ++child) {
        Ids text = prefix;
        const Ids rest = Numbers(10 + static_cast<uint64_t>(child)).ids(14, model.V());
        text.insert(text.end(), rest.begin(), rest.end());
        const int32_t own = 3 + 2 * child;
        if (shared > 32) fork.page_copies.push_back({2, own, shared - 32});
        add_scored(fork, text, shared, shared + 13, {0, 1, own, own + 1});
        texts.push_back(text);
      }
      const Results got = model.run(fork).scores;
      for (int32_t child = 0; child < 3; ++child) {
        const Results whole = one_pass(model, texts[static_cast<size_t>(child)], page_range(20, 4));
        expect_same_results({got.begin() + 13 * child, got.begin() + 13 * (child + 1)},
                            {whole.end() - 13, whole.end()}, "child " + std::to_string(child));
      }
    }
  }
}

TEST_P(TransformerSteps, SequencesGiveTheSameBitsAloneInABatchAndPermuted) {
  const std::vector<int64_t> lengths = {1, 2, 15, 16, 17, 33, 64, 70};
  for (const DType dtype : kModelDTypes) {
    std::vector<Ids> texts;
    std::vector<Results> alone;
    TinyModel single(GetParam(), dtype);
    for (const int64_t length : lengths) {
      texts.push_back(Numbers(static_cast<uint64_t>(length)).ids(length + 1, single.V()));
      alone.push_back(one_pass(single, texts.back(), page_range(0, pages_for(length))));
    }
    for (const int32_t threads : numbers_of(GetParam(), 1, 3, 1)) {
      TinyModel model(GetParam(), dtype, {.num_threads = threads});
      const Ids order = Numbers(static_cast<uint64_t>(threads)).permutation(8);
      const Ids pages = Numbers(static_cast<uint64_t>(threads + 9)).permutation(96);
      StepPlan plan;
      auto next = pages.begin();
      for (const int32_t s : order) {
        const int64_t length = lengths[static_cast<size_t>(s)];
        const auto end = next + pages_for(length);
        add_scored(plan, texts[static_cast<size_t>(s)], 0, length, {next, end});
        next = end;
      }
      const Results got = model.run(plan).scores;
      auto at = got.begin();
      for (const int32_t s : order) {
        const auto end = at + lengths[static_cast<size_t>(s)];
        expect_same_results(
            {at, end}, alone[static_cast<size_t>(s)],
            "sequence " + std::to_string(s) + ", threads " + std::to_string(threads));
        at = end;
      }
    }
  }
}

SlotInit slot_init(int32_t slot, float temperature, int32_t next_position) {
  return {.slot = slot,
          .sampling = {.temperature = temperature},
          .seed = 5,
          .prompt_hash = 77,
          .sample_index = static_cast<uint32_t>(slot),
          .next_position = next_position,
          .end_position = 400};
}

// Prefills `prompt` and decodes to `count` tokens, one a step, from pending tokens.
Results decode(TinyModel& model, const Ids& prompt, int32_t slot, float temperature, int32_t count,
               const Ids& pages) {
  const auto length = static_cast<int32_t>(prompt.size());
  StepPlan prefill{.slot_inits = {slot_init(slot, temperature, length)}, .wants_entropy = true};
  add_sequence(prefill, prompt, 0, pages, slot);
  prefill.samples = {{length - 1, slot}};
  Results results = {model.run(prefill).samples.at(0)};
  for (int32_t i = 1; i < count; ++i) {
    StepPlan step{.wants_entropy = true};
    add_sequence(step, {kPendingToken}, length + i - 1, pages, slot);
    step.samples = {{0, slot}};
    results.push_back(model.run(step).samples.at(0));
  }
  return results;
}

TEST_P(TransformerSteps, DecodedTokensScoreWithTheBitsTheyWereSampledWith) {
  for (const DType dtype : kModelDTypes) {
    TinyModel model(GetParam(), dtype);
    for (const float temperature : cases_of<float>(GetParam(), {1.0f, 0.0f, 0.7f}, 1)) {
      Ids text = Numbers(6).ids(11, model.V());
      const Results sampled = decode(model, text, 0, temperature, 40, page_range(0, 4));
      for (const HeadResult& token : sampled) text.push_back(token.token);
      StepPlan scoring;
      add_sequence(scoring, slice(text, 0, 50), 0, page_range(8, 4));
      for (int32_t row = 10; row < 50; ++row) {
        scoring.scores.push_back({row, text[static_cast<size_t>(row) + 1], temperature});
      }
      expect_same_results(model.run(scoring).scores, sampled,
                          "temperature " + std::to_string(temperature));
    }
  }
}

TEST_P(TransformerSteps, DecodingInABatchGivesTheBitsOfDecodingAlone) {
  constexpr int32_t kSequences = 5, kTokens = 20;
  for (const DType dtype : cases_of(GetParam(), kModelDTypes, 1)) {
    TinyModel model(GetParam(), dtype);
    std::vector<Ids> prompts;
    std::vector<Results> alone;
    for (int32_t s = 0; s < kSequences; ++s) {
      prompts.push_back(Numbers(static_cast<uint64_t>(30 + s)).ids(9 + 5 * s, model.V()));
      alone.push_back(decode(model, prompts.back(), s, 1.0f, kTokens, page_range(0, 4)));
    }
    std::vector<Results> batched(kSequences);
    for (int32_t i = 0; i < kTokens; ++i) {
      StepPlan step{.wants_entropy = true};
      const Ids order = Numbers(static_cast<uint64_t>(i)).permutation(kSequences);
      for (const int32_t s : order) {
        const Ids& prompt = prompts[static_cast<size_t>(s)];
        const auto length = static_cast<int32_t>(prompt.size());
        if (i == 0) step.slot_inits.push_back(slot_init(s, 1.0f, length));
        add_sequence(step, i == 0 ? prompt : Ids{kPendingToken}, i == 0 ? 0 : length + i - 1,
                     page_range(4 * s, 4), s);
        step.samples.push_back({static_cast<int32_t>(step.num_rows()) - 1, s});
      }
      const Results got = model.run(step).samples;
      for (int32_t n = 0; n < kSequences; ++n) {
        batched[static_cast<size_t>(order[static_cast<size_t>(n)])].push_back(
            got[static_cast<size_t>(n)]);
      }
    }
    for (size_t s = 0; s < kSequences; ++s) {
      expect_same_results(batched[s], alone[s], "sequence " + std::to_string(s));
    }
  }
}

TEST_P(TransformerSteps, PadRowsChangeNoBitOfOthers) {
  for (const DType dtype : kModelDTypes) {
    TinyModel model(GetParam(), dtype);
    const Ids ids = Numbers(7).ids(21, model.V());
    const Results want = one_pass(model, ids, page_range(0, 2));
    StepPlan plan;
    add_sequence(plan, Ids(6, 0), 0, {});
    std::fill(plan.positions.begin(), plan.positions.end(), kPadPosition);
    add_scored(plan, ids, 0, 20, page_range(4, 2));
    expect_same_results(model.run(plan).scores, want, "behind six pads");
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, TransformerSteps, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
