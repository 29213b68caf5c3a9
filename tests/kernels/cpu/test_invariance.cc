// Whole steps: neither the rows beside a row, nor where a prompt is cut, nor pages, threads or
// instruction sets change a bit of what is said of it.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cpu/amx.h"
#include "kernels/cpu/isa.h"
#include "tests/sanitized.h"
#include "toy_model.h"

namespace rollpack::kernels::testing {
namespace {

constexpr int32_t kPageTokens = 16;

using Bits = std::vector<uint32_t>;

// Many rows on three instruction sets: widths that are no multiple of anything, but few.
ToyOptions small_options(DType dtype) {
  return {.shape = {.D = 18, .H = 3, .G = 1, .K = 6, .F = 35, .V = 130, .L = 1, .dtype = dtype},
          .num_pages = 80};
}

struct Sequence {
  std::vector<int32_t> ids;
  int32_t slot = 0;
};

// 70 rows in sequences of 1, 2, 3, 5, 1, 2, ... rows.
std::vector<Sequence> sequences_of_70_rows(int64_t V) {
  const int32_t lengths[] = {1, 2, 3, 5};
  std::vector<Sequence> sequences;
  for (int32_t rows = 0; rows < 70;) {
    const auto index = static_cast<int32_t>(sequences.size());
    const int32_t length = std::min(lengths[index % 4], 70 - rows);
    sequences.push_back({random_ids(100 + static_cast<uint64_t>(index), length, V), index});
    rows += length;
  }
  return sequences;
}

// Scores every row (as the successor: the row's own token) and samples behind the last.
void add_sequence(StepPlan& plan, const Sequence& sequence) {
  const auto row = static_cast<int32_t>(plan.input_ids.size());
  const auto num_rows = static_cast<int32_t>(sequence.ids.size());
  plan.slot_inits.push_back({.slot = sequence.slot,
                             .sampling = {.temperature = 0.7f},
                             .seed = 3,
                             .prompt_hash = static_cast<uint64_t>(sequence.slot),
                             .next_position = num_rows,
                             .end_position = 1000});
  add_rows(plan, sequence.ids, 0, {sequence.slot}, sequence.slot);
  for (int32_t i = 0; i < num_rows; ++i) {
    plan.scores.push_back(
        {.row = row + i, .token = sequence.ids[static_cast<size_t>(i)], .temperature = 1.5f});
  }
  plan.samples.push_back({.row = row + num_rows - 1, .slot = sequence.slot});
}

// The bits of each sequence of a step, scores first.
std::vector<Bits> run_sequences(ToyModel& model, const std::vector<Sequence>& sequences) {
  StepPlan plan;
  plan.wants_entropy = true;
  for (const Sequence& sequence : sequences) add_sequence(plan, sequence);
  const StepResult result = model.run(plan);
  std::vector<Bits> bits;
  size_t score = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    Bits all;
    for (size_t i = 0; i < sequences[s].ids.size(); ++i) {
      for (const uint32_t word : bits_of(result.scores[score++])) all.push_back(word);
    }
    for (const uint32_t word : bits_of(result.samples[s])) all.push_back(word);
    bits.push_back(all);
  }
  return bits;
}

void expect_bits_at_every_number_of_rows(ToyModel& model, ToyModel& reference,
                                         const std::vector<Sequence>& sequences,
                                         const std::vector<Bits>& alone) {
  // Sanitizers see each end of two tiles of 16, then fewer: portable loops are slow there.
  const int32_t stride = kIsSanitized ? 7 : 1;
  for (int32_t M = 1; M <= 70; M += M < 35 ? 1 : stride) {
    std::vector<Sequence> taken;
    int32_t rows = 0;
    for (const Sequence& sequence : sequences) {
      if (rows == M) break;
      taken.push_back(sequence);
      const auto length = std::min<size_t>(sequence.ids.size(), static_cast<size_t>(M - rows));
      taken.back().ids.resize(length);
      rows += static_cast<int32_t>(length);
    }
    if (M % 2 == 1) std::reverse(taken.begin(), taken.end());
    const std::vector<Bits> bits = run_sequences(model, taken);
    for (size_t i = 0; i < taken.size(); ++i) {
      const auto slot = static_cast<size_t>(taken[i].slot);
      const bool is_whole = taken[i].ids.size() == sequences[slot].ids.size();
      const Bits expected = is_whole ? alone[slot] : run_sequences(reference, {taken[i]}).front();
      ASSERT_EQ(bits[i], expected) << M << " rows, sequence " << slot;
    }
  }
}

class EveryNumberOfRows : public ::testing::TestWithParam<std::tuple<cpu::Isa, int32_t, DType>> {};

TEST_P(EveryNumberOfRows, LeavesEveryRowsBits) {
  const auto [isa, num_threads, dtype] = GetParam();
  ToyOptions options = small_options(dtype);
  options.num_threads = 1;
  const std::vector<Sequence> sequences = sequences_of_70_rows(options.shape.V);
  std::vector<Bits> alone;
  ToyModel reference(options);
  for (const Sequence& s : sequences) alone.push_back(run_sequences(reference, {s}).front());

  options.num_threads = num_threads;
  options.cpu.isa = isa;
  options.cpu.widens_products = num_threads == 2;
  ToyModel model(options);
  expect_bits_at_every_number_of_rows(model, reference, sequences, alone);
}

TEST(AmxSteps, EveryNumberOfRowsLeavesEveryRowsBits) {
  if (!cpu::amx_is_available()) GTEST_SKIP() << "no AMX here, or none that this process may use";
  ToyOptions options = small_options(DType::kBF16);
  options.amx = true;
  const std::vector<Sequence> sequences = sequences_of_70_rows(options.shape.V);
  ToyModel reference(options);
  std::vector<Bits> alone, other;
  for (const Sequence& s : sequences) alone.push_back(run_sequences(reference, {s}).front());
  options.num_threads = 3;
  ToyModel model(options);
  expect_bits_at_every_number_of_rows(model, reference, sequences, alone);
  EXPECT_EQ(model.backend().info().fingerprint, "cpu-v1 bfloat16 amx-v1");
  // Sums are in another order, which at least one of these many bits shows.
  options.amx = false;
  ToyModel without(options);
  for (const Sequence& s : sequences) other.push_back(run_sequences(without, {s}).front());
  EXPECT_NE(alone, other);
}


INSTANTIATE_TEST_SUITE_P(Cpu, EveryNumberOfRows,
                         ::testing::Combine(::testing::ValuesIn(cpu::supported_isas()),
                                            ::testing::Values(1, 2, 3),
                                            ::testing::Values(DType::kBF16, DType::kF32)),
                         [](const auto& info) {
                           return std::string(cpu::isa_name(std::get<0>(info.param))) + "_" +
                                  std::to_string(std::get<1>(info.param)) + "_threads_" +
                                  std::string(dtype_name(std::get<2>(info.param)));
                         });

struct Variant {
  const char* name;
  DType dtype;
  int32_t window;
  bool has_qk_norm;
};

class Prompt : public ::testing::TestWithParam<Variant> {
 protected:
  static constexpr int32_t kLength = 300;

  static ToyOptions options() {
    ToyOptions options;
    options.shape.dtype = GetParam().dtype;
    options.window = GetParam().window;
    options.has_qk_norm = GetParam().has_qk_norm;
    return options;
  }
  // Scores of all tokens but the first, with the prompt cut at `cuts`.
  static Bits run(ToyModel& model, const std::vector<int32_t>& pages, std::vector<int32_t> cuts) {
    const std::vector<int32_t> ids = random_ids(5, kLength, model.shape().V);
    cuts.push_back(kLength);
    Bits bits;
    int32_t begin = 0;
    for (const int32_t end : cuts) {
      StepPlan plan;
      add_rows(plan, {ids.begin() + begin, ids.begin() + end}, begin, pages);
      const std::vector<int32_t> from_begin(ids.begin() + begin, ids.end());
      add_scores(plan, 0, from_begin, std::min(end, kLength - 1) - begin);
      for (const uint32_t word : bits_of(model.run(plan).scores)) bits.push_back(word);
      begin = end;
    }
    return bits;
  }
  static std::vector<int32_t> pages_from(int32_t first) {
    return page_range(first, (kLength + kPageTokens - 1) / kPageTokens);
  }
};

TEST_P(Prompt, EveryCutGivesTheBitsOfOnePass) {
  ToyModel model(options());
  const Bits whole = run(model, pages_from(0), {});
  for (const int32_t cut : {1, 2, 15, 16, 17, 31, 48, 100, 239, 255, 256, 257, 272, 298, 299}) {
    ASSERT_EQ(run(model, pages_from(40), {cut}), whole) << "cut at " << cut;
  }
  ASSERT_EQ(run(model, pages_from(80), {7, 8, 9, 60, 61, 200, 256, 290}), whole);
}

TEST_P(Prompt, PlacesOfPagesAndWhatLayInThemChangeNoBit) {
  ToyModel model(options());
  const Bits whole = run(model, pages_from(0), {});
  std::vector<int32_t> pages = page_range(0, 256);
  Numbers order(9);
  for (size_t i = pages.size(); i > 1; --i) {
    std::swap(pages[i - 1], pages[static_cast<size_t>(order.below(static_cast<int32_t>(i)))]);
  }
  for (int32_t first = 0; first + 19 <= 256; first += 60) {  // the first pages hold the run before
    const std::vector<int32_t> some(pages.begin() + first, pages.begin() + first + 19);
    ASSERT_EQ(run(model, some, {130}), whole);
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, Prompt,
                         ::testing::Values(Variant{"bf16", DType::kBF16, 0, false},
                                           Variant{"bf16_window_qk_norm", DType::kBF16, 50, true},
                                           Variant{"f32", DType::kF32, 0, true}),
                         [](const auto& info) { return std::string(info.param.name); });

// Two continuations of one prompt of 40 tokens, two whole pages and half a third.
TEST(SharedPages, GiveTheBitsOfPrivateOnes) {
  ToyModel model({});
  const std::vector<int32_t> prompt = random_ids(1, 40, model.shape().V);
  std::vector<Bits> privately;
  for (const uint64_t seed : {2, 3}) {
    std::vector<int32_t> ids = prompt;
    for (const int32_t id : random_ids(seed, 20, model.shape().V)) ids.push_back(id);
    StepPlan plan;
    add_rows(plan, ids, 0, page_range(static_cast<int32_t>(seed) * 10, 4));
    add_scores(plan, 40, {ids.begin() + 40, ids.end()}, 19);
    privately.push_back(bits_of(model.run(plan).scores));
  }
  StepPlan prefill;
  add_rows(prefill, prompt, 0, {0, 1, 2});
  model.run(prefill);
  // The first continuation takes the prompt's own page, the second a copy that is made of it in
  // the step that writes on in it.
  StepPlan plan;
  plan.page_copies = {{.source = 2, .target = 5, .num_tokens = 8}};
  const std::vector<int32_t> first = random_ids(2, 20, model.shape().V);
  const std::vector<int32_t> second = random_ids(3, 20, model.shape().V);
  add_rows(plan, first, 40, {0, 1, 2, 3});
  add_rows(plan, second, 40, {0, 1, 5, 6});
  add_scores(plan, 0, first, 19);
  add_scores(plan, 20, second, 19);
  const StepResult result = model.run(plan);
  const auto middle = result.scores.begin() + 19;
  EXPECT_EQ(bits_of({result.scores.begin(), middle}), privately[0]);
  EXPECT_EQ(bits_of({middle, result.scores.end()}), privately[1]);
}

TEST(PendingTokens, GiveTheBitsOfTokensThatAreNamed) {
  ToyModel model({});
  const std::vector<int32_t> prompt = random_ids(1, 10, model.shape().V);
  StepPlan plan;
  plan.slot_inits = {{.slot = 4, .seed = 8, .next_position = 10, .end_position = 40}};
  add_rows(plan, prompt, 0, page_range(0, 3), 4);
  plan.samples = {{.row = 9, .slot = 4}};
  std::vector<HeadResult> sampled = model.run(plan).samples;
  for (int32_t position = 10; position < 39; ++position) {
    StepPlan step;
    add_rows(step, {kPendingToken}, position, page_range(0, 3), 4);
    step.samples = {{.row = 0, .slot = 4}};
    sampled.push_back(model.run(step).samples.front());
  }
  EXPECT_EQ(sampled.back().finish, SlotFinish::kLength);

  std::vector<int32_t> ids = prompt;
  for (const HeadResult& result : sampled) ids.push_back(result.token);
  StepPlan whole;
  add_rows(whole, {ids.begin(), ids.end() - 1}, 0, page_range(10, 3));
  add_scores(whole, 0, ids, 39);
  const std::vector<HeadResult> scored = model.run(whole).scores;
  for (size_t i = 0; i < sampled.size(); ++i) {
    EXPECT_EQ(std::bit_cast<uint32_t>(sampled[i].logprob),
              std::bit_cast<uint32_t>(scored[i + 9].logprob));
    EXPECT_EQ(sampled[i].position, scored[i + 9].position);
  }
}

TEST(OversubscribedPool, GivesTheBitsOfOneThread) {
  ToyOptions options = small_options(DType::kBF16);
  const std::vector<Sequence> sequences = sequences_of_70_rows(options.shape.V);
  options.num_threads = 1;
  ToyModel one(options);
  options.num_threads = 24;
  ToyModel many(options);
  const std::vector<Bits> expected = run_sequences(one, sequences);
  for (int round = 0; round < 5; ++round) EXPECT_EQ(run_sequences(many, sequences), expected);
}

}  // namespace
}  // namespace rollpack::kernels::testing
