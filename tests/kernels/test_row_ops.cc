// embed, rms_norm and linear of every backend against the reference, within derived bounds, and
// the promise that rows do not influence each other's bits.
#include <algorithm>

#include "tests/kernels/rig.h"

namespace rollpack::kernels::testing {
namespace {

using RowOps = BackendTest;

// Around the widths of bf16 pairs, vectors (16 f32, 32 bf16), panels (64) and chunks (256).
const std::vector<int64_t> kLengths = {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257};

struct LinearCase {
  int64_t rows, cols, in;
  Epilogue epilogue = Epilogue::kNone;
  bool has_bias = false;
  DType dtype = DType::kBF16;

  std::string name() const {
    return std::string(dtype_name(dtype)) + " linear rows " + std::to_string(rows) + " N " +
           std::to_string(cols) + " K_in " + std::to_string(in) + " epilogue " +
           std::to_string(static_cast<int>(epilogue));
  }
};

// Inputs of one case, as stored: what both backends see, and what bounds are made of.
struct LinearData {
  std::vector<float> in, residual, bias;
  std::vector<std::vector<float>> weight;  // parts
};

LinearData make_data(const LinearCase& c) {
  Numbers numbers(static_cast<uint64_t>(c.rows * 7919 + c.cols * 104729 + c.in));
  LinearData data;
  data.in = rounded(numbers.vector(c.rows * c.in), c.dtype);
  data.residual = numbers.vector(c.rows * c.cols);
  data.bias = numbers.vector(c.cols);
  const int64_t first = c.epilogue == Epilogue::kGated ? c.cols / 2 : c.cols - c.cols / 3;
  data.weight.push_back(rounded(numbers.vector(first * c.in), c.dtype));
  if (first < c.cols) {
    data.weight.push_back(rounded(numbers.vector((c.cols - first) * c.in), c.dtype));
  }
  return data;
}

std::vector<float> run_linear(const std::string& backend, const LinearCase& c,
                              const LinearData& data, int32_t threads = 2) {
  ModelShape shape = small_shape(c.dtype);
  Rig rig(backend, shape, {.num_threads = threads});
  const bool is_gated = c.epilogue == Epilogue::kGated;
  const WeightId weight =
      rig.weight(is_gated ? WeightKind::kGated : WeightKind::kLinear, data.weight, c.in);
  const WeightId bias = c.has_bias ? rig.weight(WeightKind::kVector, {data.bias}, 1) : kNoWeight;
  const Tensor in = rig.tensor(c.dtype, c.rows, c.in, data.in);
  const Tensor out = is_gated ? rig.tensor(c.dtype, c.rows, c.cols / 2)
                              : rig.tensor(DType::kF32, c.rows, c.cols, data.residual);
  rig.run(plan_of_rows(c.rows), [&](Backend& backend) {
    backend.linear({.weight = weight, .bias = bias, .epilogue = c.epilogue, .in = in, .out = out});
  });
  return rig.read(out);
}

struct Chain {
  double value = 0, error = 0;  // f64 sum, and how far one f32 chain may stray from it
};

Chain chain_of(const LinearCase& c, const LinearData& data, int64_t t, int64_t n) {
  const int64_t first = static_cast<int64_t>(data.weight[0].size()) / c.in;
  const float* row =
      n < first ? data.weight[0].data() + n * c.in : data.weight[1].data() + (n - first) * c.in;
  Chain chain;
  double magnitude = 0;
  for (int64_t k = 0; k < c.in; ++k) {
    const double product = static_cast<double>(data.in[t * c.in + k]) * row[k];
    chain.value += product;
    magnitude += std::abs(product);
  }
  // c.in fused roundings, each of at most the sum of magnitudes; flushed subnormals beside.
  chain.error =
      gamma_of(static_cast<double>(c.in)) * magnitude + static_cast<double>(c.in) * kFlush;
  if (c.has_bias) {
    chain.value += data.bias[n];
    chain.error += kUnitF32 * (std::abs(chain.value) + chain.error);
  }
  return chain;
}

std::vector<double> linear_bound(const LinearCase& c, const LinearData& data) {
  std::vector<double> bound;
  for (int64_t t = 0; t < c.rows; ++t) {
    if (c.epilogue == Epilogue::kGated) {
      for (int64_t n = 0; n < c.cols / 2; ++n) {
        const Chain gate = chain_of(c, data, t, n), up = chain_of(c, data, t, n + c.cols / 2);
        const double silu = std::abs(gate.value / (1 + std::exp(-gate.value)));
        // |silu'| < 1.1; its exp, sum and division round, so does the product.
        const double silu_error = 1.1 * gate.error + (kExpError + 3 * kUnitF32) * silu + kFlush;
        const double up_size = std::abs(up.value) + up.error;
        const double error =
            silu_error * up_size + silu * up.error + kUnitF32 * silu * up_size + kFlush;
        // Both results are then rounded to the compute dtype.
        bound.push_back(error + 2 * unit_of(c.dtype) * (silu * up_size + error) + kFlush);
      }
      continue;
    }
    for (int64_t n = 0; n < c.cols; ++n) {
      const Chain chain = chain_of(c, data, t, n);
      const double base = c.epilogue == Epilogue::kResidual ? data.residual[t * c.cols + n] : 0.0;
      bound.push_back(chain.error + 2 * kUnitF32 * (std::abs(base + chain.value) + chain.error) +
                      kFlush);
    }
  }
  return bound;
}

void expect_linear_conforms(const std::string& backend, const LinearCase& c) {
  const LinearData data = make_data(c);
  expect_within(run_linear(backend, c, data), run_linear("reference", c, data),
                linear_bound(c, data), c.name());
}

TEST_P(RowOps, LinearStaysWithinTheRoundingOfItsSum) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const int64_t length : kLengths) {
      expect_linear_conforms(GetParam(), {.rows = 3, .cols = 37, .in = length, .dtype = dtype});
      expect_linear_conforms(GetParam(), {.rows = 2, .cols = length, .in = 33, .dtype = dtype});
      expect_linear_conforms(GetParam(), {.rows = length, .cols = 65, .in = 18, .dtype = dtype});
    }
  }
}

// Tiles of a few rows end anywhere: every count of rows up to two tiles of 16, then the edges of
// larger ones, under each epilogue.
TEST_P(RowOps, LinearOfEveryFewRowsStaysWithinTheRoundingOfItsSum) {
  std::vector<int64_t> counts = {47, 48, 49, 63, 64, 65, 70, 95, 96, 97, 127, 128, 129, 513};
  for (int64_t rows = 1; rows <= 33; ++rows) counts.push_back(rows);
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const int64_t rows : counts) {
      for (const auto epilogue : {Epilogue::kNone, Epilogue::kGated, Epilogue::kResidual}) {
        expect_linear_conforms(
            GetParam(), {.rows = rows, .cols = 66, .in = 11, .epilogue = epilogue, .dtype = dtype});
      }
    }
  }
}

TEST_P(RowOps, LinearOfAModelsWidthStaysWithinTheRoundingOfItsSum) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    expect_linear_conforms(GetParam(), {.rows = 5, .cols = 130, .in = 4864, .dtype = dtype});
  }
}

TEST_P(RowOps, EpiloguesStayWithinTheRoundingOfTheirSums) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const bool has_bias : {false, true}) {
      for (const int64_t length : {2, 30, 32, 34, 62, 64, 66, 126, 128, 130, 512}) {
        for (const auto epilogue : {Epilogue::kGated, Epilogue::kResidual, Epilogue::kNone}) {
          expect_linear_conforms(GetParam(), {.rows = 7,
                                              .cols = length,
                                              .in = 37,
                                              .epilogue = epilogue,
                                              .has_bias = has_bias,
                                              .dtype = dtype});
        }
      }
    }
  }
}

// Rows of a batch, one by one and in another order, against the batch.
TEST_P(RowOps, LinearRowsDoNotInfluenceEachOther) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const auto epilogue : {Epilogue::kNone, Epilogue::kGated, Epilogue::kResidual}) {
      const LinearCase batch{70, 194, 129, epilogue, true, dtype};
      const LinearData data = make_data(batch);
      const auto want = run_linear(GetParam(), batch, data);
      const auto width = static_cast<int64_t>(want.size()) / batch.rows;
      const auto slice = [](const std::vector<float>& all, int64_t row, int64_t columns) {
        return std::vector<float>(all.begin() + row * columns, all.begin() + (row + 1) * columns);
      };
      for (const int64_t row : {0, 1, 5, 6, 47, 69}) {
        LinearCase alone = batch;
        alone.rows = 1;
        LinearData one = data;
        one.in = slice(data.in, row, batch.in);
        one.residual = slice(data.residual, row, batch.cols);
        expect_same_bits(run_linear(GetParam(), alone, one), slice(want, row, width),
                         batch.name() + " row alone");
      }
      for (const int32_t threads : {1, 3}) {
        LinearData turned = data;
        std::vector<float> turned_want = want;
        for (int64_t t = 0; t < batch.rows; ++t) {
          const int64_t from = batch.rows - 1 - t;
          std::copy_n(data.in.begin() + from * batch.in, batch.in,
                      turned.in.begin() + t * batch.in);
          std::copy_n(data.residual.begin() + from * batch.cols, batch.cols,
                      turned.residual.begin() + t * batch.cols);
          std::copy_n(want.begin() + from * width, width, turned_want.begin() + t * width);
        }
        expect_same_bits(run_linear(GetParam(), batch, turned, threads), turned_want,
                         batch.name() + " rows reversed");
      }
    }
  }
}

struct Norm {
  std::vector<float> in, weight;
  int64_t rows, cols;
  float epsilon;
  DType dtype;

  std::vector<float> run(const std::string& backend, int32_t threads = 2) const {
    Rig rig(backend, small_shape(dtype), {.num_threads = threads});
    const WeightId id = rig.weight(WeightKind::kVector, {weight}, 1);
    const Tensor source = rig.tensor(DType::kF32, rows, cols, in);
    const Tensor out = rig.tensor(dtype, rows, cols);
    rig.run(plan_of_rows(rows), [&](Backend& backend) {
      backend.rms_norm({.weight = id, .epsilon = epsilon, .in = source, .out = out});
    });
    return rig.read(out);
  }
};

Norm make_norm(int64_t rows, int64_t cols, DType dtype) {
  Numbers numbers(static_cast<uint64_t>(rows * 31 + cols));
  return {numbers.vector(rows * cols, 3.0f), numbers.vector(cols), rows, cols, 1e-5f, dtype};
}

TEST_P(RowOps, RmsNormStaysWithinTheRoundingOfItsMean) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const int64_t cols : kLengths) {
      const Norm norm = make_norm(5, cols, dtype);
      const auto want = norm.run("reference");
      // The mean is off by gamma of cols squares and sums, its root by half of that; the root, the
      // quotient and the product round once each, and both results are stored.
      const double relative = gamma_of(0.5 * static_cast<double>(cols) + 5) + 2 * unit_of(dtype);
      std::vector<double> bound;
      for (const float x : want) bound.push_back(1.01 * relative * std::abs(x) + kFlush);
      expect_within(norm.run(GetParam()), want, bound, "rms_norm D " + std::to_string(cols));
    }
  }
}

TEST_P(RowOps, RmsNormRowsDoNotInfluenceEachOther) {
  const Norm batch = make_norm(19, 257, DType::kBF16);
  const auto want = batch.run(GetParam());
  expect_same_bits(batch.run(GetParam(), 1), want, "one thread");
  for (int64_t row = 0; row < batch.rows; row += 3) {
    Norm alone = batch;
    alone.rows = 1;
    alone.in.assign(batch.in.begin() + row * 257, batch.in.begin() + (row + 1) * 257);
    expect_same_bits(alone.run(GetParam()),
                     {want.begin() + row * 257, want.begin() + (row + 1) * 257},
                     "row " + std::to_string(row));
  }
}

TEST_P(RowOps, RmsNormOfZerosIsZero) {
  Norm norm = make_norm(1, 33, DType::kF32);
  std::fill(norm.in.begin(), norm.in.end(), 0.0f);
  for (const float x : norm.run(GetParam())) EXPECT_EQ(x, 0.0f);
}

TEST_P(RowOps, EmbedAndGatherCopyRowsExactly) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const int64_t D : {1, 15, 16, 17, 33, 65, 257}) {
      ModelShape shape = small_shape(dtype);
      shape.D = D;
      Rig rig(GetParam(), shape);
      const auto table = Numbers(static_cast<uint64_t>(D)).vector(shape.V * D);
      const WeightId id = rig.weight(WeightKind::kEmbedding, {table}, D);
      StepPlan plan;
      const std::vector<int32_t> ids = {0, 129, 64, 63, 1, 64};
      add_sequence(plan, ids, 0, {0});
      plan.scores = {{.row = 4}, {.row = 1}, {.row = 4, .token = 1}};
      const Tensor out = rig.tensor(DType::kF32, 6, D), head = rig.tensor(DType::kF32, 2, D);
      const Tensor normed = rig.tensor(dtype, 2, D);
      rig.run(plan, [&](Backend& backend) {
        backend.embed({.weight = id, .out = out});
        backend.gather_head_rows({.in = out, .out = head});
        backend.lm_head({.weight = id, .in = normed});
      });
      std::vector<float> want;
      for (const int32_t token : ids) {
        want.insert(want.end(), table.begin() + token * D, table.begin() + (token + 1) * D);
      }
      want = rounded(want, dtype);
      expect_same_bits(rig.read(out), want, "embed D " + std::to_string(D));
      std::vector<float> rows(want.begin() + 1 * D, want.begin() + 2 * D);
      rows.insert(rows.end(), want.begin() + 4 * D, want.begin() + 5 * D);
      expect_same_bits(rig.read(head), rows, "gathered rows D " + std::to_string(D));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, RowOps, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
