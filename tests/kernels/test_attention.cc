// Attention of every backend against the reference within derived bounds, and the promise that a
// row depends on its own sequence alone. rope_append without rotation puts K and V into the pages.
#include <algorithm>
#include <limits>

#include "tests/kernels/rig.h"

namespace rollpack::kernels::testing {
namespace {

using Attention = BackendTest;

struct Heads {
  int64_t H, G, K;
  int64_t cols() const { return (H + 2 * G) * K; }
};

struct Given {
  Heads heads;
  DType dtype = DType::kBF16;
  int32_t window = 0;
  int32_t threads = 2;
};

ModelShape shape_of(const Given& given) {
  ModelShape shape = small_shape(given.dtype);
  shape.H = given.heads.H;
  shape.G = given.heads.G;
  shape.K = given.heads.K;
  return shape;
}

// Cosines 1 and sines 0: K and V reach the pages exactly as given (rounded to the compute dtype).
std::vector<float> identity_table(int64_t positions, int64_t K) {
  std::vector<float> table(static_cast<size_t>(positions * K), 0.0f);
  for (int64_t p = 0; p < positions; ++p) {
    std::fill_n(table.begin() + p * K, K / 2, 1.0f);
  }
  return table;
}

// One rig, several steps over the same pages.
class AttentionRig {
 public:
  static constexpr int64_t kPositions = 1024;

  AttentionRig(const std::string& backend, const Given& given)
      : given_(given),
        rig_(backend, shape_of(given), {.num_threads = given.threads, .num_pages = 160}) {
    rig_.weight(WeightKind::kVector, {{1.0f}}, 1);  // a step needs some committed weight
    table_ = rig_.tensor(DType::kF32, kPositions, given.heads.K,
                         identity_table(kPositions, given.heads.K));
  }

  // qkv is [rows of the plan, (H + 2 G) K]; returns [rows, H K].
  std::vector<float> step(const StepPlan& plan, const std::vector<float>& qkv) {
    const int64_t rows = plan.num_rows(), width = given_.heads.H * given_.heads.K;
    const Tensor in = rig_.tensor(DType::kF32, rows, given_.heads.cols(), qkv);
    const Tensor q = rig_.tensor(given_.dtype, rows, width);
    const Tensor out = rig_.tensor(given_.dtype, rows, width);
    result_ = rig_.run(plan, [&](Backend& backend) {
      backend.rope_append({.layer = 0, .qkv = in, .rope_table = table_, .q = q});
      backend.attention({.layer = 0, .window = given_.window, .q = q, .out = out});
    });
    return rig_.read(out);
  }

  const StepResult& result() const { return result_; }

 private:
  Given given_;
  Rig rig_;
  Tensor table_;
  StepResult result_;
};

int32_t pages_for(int64_t tokens) {
  return static_cast<int32_t>((tokens + 15) / 16);
}

std::vector<int32_t> zeros(int64_t count) {
  return std::vector<int32_t>(count, 0);
}

// Bound of |out - exact| of both roundings for one sequence from position 0; `qkv` as stored.
std::vector<double> attention_bound(const Given& given, const std::vector<float>& qkv,
                                    int64_t rows) {
  const auto [H, G, K] = given.heads;
  const double scale = 1 / std::sqrt(static_cast<double>(K));
  std::vector<double> bound;
  const auto head = [&](int64_t t, int64_t h) {
    return qkv.data() + t * given.heads.cols() + h * K;
  };
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t begin = given.window > 0 ? std::max<int64_t>(0, t + 1 - given.window) : 0;
    for (int64_t h = 0; h < H; ++h) {
      const int64_t g = h / (H / G);
      std::vector<double> score;
      double max = -HUGE_VAL, min = HUGE_VAL, score_error = 0;
      for (int64_t j = begin; j <= t; ++j) {
        double sum = 0, magnitude = 0;
        for (int64_t k = 0; k < K; ++k) {
          const double product = static_cast<double>(head(t, h)[k]) * head(j, H + g)[k];
          sum += product;
          magnitude += std::abs(product);
        }
        score.push_back(sum * scale);
        max = std::max(max, sum * scale);
        min = std::min(min, sum * scale);
        // K fused roundings; the scale is itself rounded, and so is the product with it.
        score_error = std::max(score_error, scale * (gamma_of(K) + 2 * kUnitF32) * magnitude);
      }
      const auto keys = static_cast<double>(score.size());
      const double chunks = keys / 256 + 2;
      // p = exp(score - max): the shift is rounded, then exp; the sums are chains over the keys,
      // and every merge of two chunks rescales by one more exp and rounds three times.
      const double p_error = std::expm1(score_error + kUnitF32 * (max - min)) + kExpError;
      const double merge = chunks * (kExpError + kUnitF32 * (max - min) + 3 * kUnitF32);
      const double p_rounding = given.dtype == DType::kBF16 ? kUnitBF16 : 0;  // PV takes p stored
      const double relative = 2 * (p_error + merge + gamma_of(keys)) + p_rounding + kUnitF32;
      double total = 0;
      std::vector<double> sum(K), magnitude(K);
      for (int64_t j = begin; j <= t; ++j) {
        const double p = std::exp(score[j - begin] - max);
        total += p;
        for (int64_t k = 0; k < K; ++k) {
          sum[k] += p * head(j, H + G + g)[k];
          magnitude[k] += p * std::abs(head(j, H + G + g)[k]);
        }
      }
      for (int64_t k = 0; k < K; ++k) {
        const double error = 1.01 * relative * magnitude[k] / total;
        bound.push_back(error + 2 * unit_of(given.dtype) * (std::abs(sum[k] / total) + error) +
                        keys * kFlush);
      }
    }
  }
  return bound;
}

void expect_attention_conforms(const std::string& backend, const Given& given, int64_t rows) {
  Numbers numbers(static_cast<uint64_t>(rows * 131 + given.heads.cols()));
  const auto qkv = rounded(numbers.vector(rows * given.heads.cols(), 2.0f), given.dtype);
  const StepPlan plan = plan_of_rows(rows);
  expect_within(AttentionRig(backend, given).step(plan, qkv),
                AttentionRig("reference", given).step(plan, qkv), attention_bound(given, qkv, rows),
                std::string(dtype_name(given.dtype)) + " attention rows " + std::to_string(rows) +
                    " H " + std::to_string(given.heads.H) + " K " + std::to_string(given.heads.K) +
                    " window " + std::to_string(given.window));
}

TEST_P(Attention, StaysWithinTheRoundingOfItsSums) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const std::vector<int64_t> counts = {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257};
    for (const int64_t rows : cases_of(GetParam(), counts, 7)) {
      expect_attention_conforms(GetParam(), {.heads = {2, 1, 16}, .dtype = dtype}, rows);
    }
  }
}

// One to seven query heads a KV head, so that tiles of rows x heads end everywhere.
TEST_P(Attention, EveryFewRowsStayWithinTheRoundingOfTheirSums) {
  std::vector<int64_t> counts = {47, 48, 49, 511, 512, 513};
  for (int64_t rows = 1; rows <= 34; ++rows) counts.push_back(rows);
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const Heads heads : {Heads{1, 1, 6}, Heads{3, 1, 6}, Heads{7, 1, 6}}) {
      for (const int64_t rows : cases_of(GetParam(), counts, 6)) {
        if (rows > 100 && heads.H > 1) continue;
        expect_attention_conforms(GetParam(), {.heads = heads, .dtype = dtype}, rows);
      }
    }
  }
}

// Around pairs, vectors of 16 and their unrolled groups.
TEST_P(Attention, EveryHeadWidthStaysWithinTheRoundingOfItsSums) {
  std::vector<int64_t> widths = {46, 48, 50,  62,  64,  66,  78,  80,  82, 94,
                                 96, 98, 112, 126, 128, 130, 254, 256, 258};
  for (int64_t K = 2; K <= 34; K += 2) widths.push_back(K);
  std::erase_if(widths, [](int64_t K) { return K > max_head_width(GetParam()); });
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const int64_t K : cases_of(GetParam(), widths, 10)) {
      expect_attention_conforms(GetParam(), {.heads = {2, 1, K}, .dtype = dtype}, 19);
    }
  }
}

TEST_P(Attention, HeadShapesStayWithinTheRoundingOfTheirSums) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const std::vector<Heads> shapes = {{1, 1, 2},  {3, 3, 18}, {7, 1, 64}, {14, 2, 32},
                                       {4, 2, 80}, {9, 3, 64}, {2, 1, 128}};
    for (const Heads& heads : cases_of(GetParam(), shapes, 3)) {
      expect_attention_conforms(GetParam(), {.heads = heads, .dtype = dtype}, 37);
      expect_attention_conforms(GetParam(), {.heads = heads, .dtype = dtype, .window = 11}, 37);
    }
  }
}

TEST_P(Attention, WindowsAcrossChunksStayWithinTheRoundingOfTheirSums) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const std::vector<int32_t> windows = {1, 2, 15, 16, 17, 31, 255, 256, 257, 300, 512, 529};
    for (const int32_t window : cases_of(GetParam(), windows, 3)) {
      const Given given{.heads = {2, 1, 16}, .dtype = dtype, .window = window};
      expect_attention_conforms(GetParam(), given, 530);
    }
  }
}

TEST_P(Attention, AWindowOfOneReturnsTheRowsOwnValue) {
  const Given given{.heads = {2, 1, 16}, .dtype = DType::kF32, .window = 1};
  const auto qkv = Numbers(3).vector(40 * given.heads.cols());
  const auto out = AttentionRig(GetParam(), given).step(plan_of_rows(40), qkv);
  for (int64_t t = 0; t < 40; ++t) {
    for (int64_t k = 0; k < 32; ++k) {
      ASSERT_EQ(out[t * 32 + k], qkv[t * given.heads.cols() + 48 + k % 16]) << t << " " << k;
    }
  }
}

TEST_P(Attention, ScoresFarBelowZeroKeepTheirLargestKey) {
  const Given given{.heads = {1, 1, 16}, .dtype = DType::kF32};
  std::vector<float> qkv(3 * given.heads.cols(), 0.0f);
  for (int64_t t = 0; t < 3; ++t) {
    float* row = qkv.data() + t * given.heads.cols();
    row[0] = 4.0f;                                   // q
    row[16] = -1000.0f * static_cast<float>(t + 1);  // k: scores -1000, -2000, -3000
    row[32] = static_cast<float>(t + 1);             // v
  }
  const auto out = AttentionRig(GetParam(), given).step(plan_of_rows(3), qkv);
  EXPECT_EQ(out[2 * 16], 1.0f);
}

// A batch of sequences of edge lengths, placed on pages in a shuffled order.
struct Batch {
  StepPlan plan;
  std::vector<float> qkv;
  std::vector<int64_t> lengths;
};

Batch make_batch(const Heads& heads, const std::vector<int64_t>& lengths,
                 const std::vector<int32_t>& order, uint64_t page_seed) {
  Batch batch;
  const auto pages = Numbers(page_seed).permutation(160);
  size_t next_page = 0;
  for (const int32_t s : order) {
    const int64_t length = lengths[static_cast<size_t>(s)];
    const auto count = static_cast<size_t>(pages_for(length));
    const std::vector<int32_t> own(pages.begin() + next_page, pages.begin() + next_page + count);
    next_page += count;
    add_sequence(batch.plan, zeros(length), 0, own);
    const auto rows = Numbers(1000 + s).vector(length * heads.cols(), 2.0f);
    batch.qkv.insert(batch.qkv.end(), rows.begin(), rows.end());
    batch.lengths.push_back(length);
  }
  return batch;
}

TEST_P(Attention, SequencesDoNotInfluenceEachOther) {
  const std::vector<int64_t> lengths = {1, 15, 16, 17, 33, 64, 65, 257, 300, 2};
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const Given given{.heads = {6, 2, 32}, .dtype = dtype};
    const int64_t width = 6 * 32;
    std::vector<std::vector<float>> alone;
    for (size_t s = 0; s < lengths.size(); ++s) {
      const Batch one = make_batch(given.heads, lengths, {static_cast<int32_t>(s)}, s);
      alone.push_back(AttentionRig(GetParam(), given).step(one.plan, one.qkv));
    }
    for (const int32_t threads : numbers_of(GetParam(), 1, 3, 1)) {
      Given threaded = given;
      threaded.threads = threads;
      const auto order = Numbers(static_cast<uint64_t>(threads)).permutation(10);
      const Batch batch = make_batch(given.heads, lengths, order, 77);
      const auto got = AttentionRig(GetParam(), threaded).step(batch.plan, batch.qkv);
      int64_t row = 0;
      for (const int32_t s : order) {
        const auto begin = got.begin() + row * width;
        row += lengths[static_cast<size_t>(s)];
        expect_same_bits({begin, got.begin() + row * width}, alone[static_cast<size_t>(s)],
                         "sequence " + std::to_string(s) + ", threads " + std::to_string(threads));
      }
    }
  }
}

TEST_P(Attention, ChunksOfRowsGiveTheBitsOfOnePass) {
  constexpr int64_t kRows = 530;
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const int32_t window : {0, 100}) {
      const Given given{.heads = {4, 2, 16}, .dtype = dtype, .window = window};
      const auto qkv = Numbers(5).vector(kRows * given.heads.cols(), 2.0f);
      const auto want = AttentionRig(GetParam(), given).step(plan_of_rows(kRows), qkv);
      const std::vector<int64_t> chunks = {1, 7, 100, 16, 256, 257};
      for (const int64_t chunk : cases_of(GetParam(), chunks, 2)) {
        AttentionRig rig(GetParam(), given);
        std::vector<float> got;
        for (int64_t begin = 0; begin < kRows; begin += chunk) {
          const int64_t end = std::min(begin + chunk, kRows);
          StepPlan plan;
          add_sequence(plan, zeros(end - begin), static_cast<int32_t>(begin),
                       page_range(0, pages_for(kRows)));
          const auto out = rig.step(plan, {qkv.begin() + begin * given.heads.cols(),
                                           qkv.begin() + end * given.heads.cols()});
          got.insert(got.end(), out.begin(), out.end());
        }
        expect_same_bits(got, want,
                         "chunk " + std::to_string(chunk) + " window " + std::to_string(window));
      }
    }
  }
}

TEST_P(Attention, PadRowsGiveZeroAndChangeNothing) {
  const Given given{.heads = {2, 1, 16}};
  const auto qkv = Numbers(9).vector(20 * given.heads.cols());
  const auto want = AttentionRig(GetParam(), given).step(plan_of_rows(20), qkv);
  StepPlan plan = plan_of_rows(20);
  plan.input_ids.insert(plan.input_ids.begin(), 5, 0);
  plan.positions.insert(plan.positions.begin(), 5, kPadPosition);
  plan.sequences[0].num_rows = 25;
  auto padded = Numbers(10).vector(5 * given.heads.cols(), 50.0f);
  padded.insert(padded.end(), qkv.begin(), qkv.end());
  const auto got = AttentionRig(GetParam(), given).step(plan, padded);
  expect_same_bits({got.begin() + 5 * 32, got.end()}, want, "live rows behind pads");
  EXPECT_TRUE(std::all_of(got.begin(), got.begin() + 5 * 32, [](float x) { return x == 0.0f; }));
}

TEST_P(Attention, PageCopiesCarryTheirTokensAndStaleTokensAreNotSeen) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const Given given{.heads = {2, 1, 18}, .dtype = dtype};
    const int64_t cols = given.heads.cols();
    const auto qkv = Numbers(12).vector(48 * cols);
    const auto want = AttentionRig(GetParam(), given).step(plan_of_rows(48), qkv);
    for (const int32_t num_tokens : numbers_of(GetParam(), 1, 16, 4)) {
      const int32_t length = 32 + num_tokens;
      AttentionRig rig(GetParam(), given);
      rig.step(plan_of_rows(48), Numbers(13).vector(48 * cols, 100.0f));  // dirties pages 0 to 2
      StepPlan prefix;
      add_sequence(prefix, zeros(length), 0, {5, 6, 7});
      rig.step(prefix, {qkv.begin(), qkv.begin() + length * cols});
      StepPlan fork;  // shares pages 5 and 6, owns a copy of the tokens of page 7
      // A full page is copied too, and its last row computed again: the prompt's logits are wanted.
      const int32_t first = std::min(length, 47);
      add_sequence(fork, zeros(48 - first), first, {5, 6, 2});
      fork.page_copies = {{.source = 7, .target = 2, .num_tokens = num_tokens}};
      const auto got = rig.step(fork, {qkv.begin() + first * cols, qkv.end()});
      expect_same_bits(got, {want.begin() + first * 36, want.end()},
                       "fork behind " + std::to_string(num_tokens) + " tokens of a page");
    }
  }
}

TEST_P(Attention, NonFiniteKeysAndValuesFailTheirSequenceOnly) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const Given given{.heads = {2, 1, 16}, .dtype = dtype};
    const int64_t cols = given.heads.cols();
    const auto qkv = Numbers(21).vector(60 * cols);
    StepPlan plan;
    for (const int32_t s : {0, 1, 2}) add_sequence(plan, zeros(20), 0, page_range(2 * s, 2));
    AttentionRig clean(GetParam(), given);
    const auto want = clean.step(plan, qkv);
    EXPECT_TRUE(clean.result().failed_sequences.empty());
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      for (const int64_t column : {int64_t{2 * 16 + 3}, int64_t{3 * 16 + 5}}) {  // K, then V
        auto broken = qkv;
        broken[(20 + 7) * cols + column] = bad;
        AttentionRig rig(GetParam(), given);
        const auto got = rig.step(plan, broken);
        EXPECT_EQ(rig.result().failed_sequences, std::vector<int32_t>{1});
        expect_same_bits({got.begin(), got.begin() + 20 * 32},
                         {want.begin(), want.begin() + 20 * 32}, "sequence before");
        expect_same_bits({got.begin() + 40 * 32, got.end()}, {want.begin() + 40 * 32, want.end()},
                         "sequence behind");
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, Attention, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
