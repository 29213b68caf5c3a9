// rope_append of every backend: norm and rotation of Q against the reference, within the rounding
// of two products, for every width around a vector. What it writes to pages is attention's to show.
#include <cmath>

#include "tests/kernels/rig.h"

namespace rollpack::kernels::testing {
namespace {

using Rotation = BackendTest;

struct Rope {
  DType dtype;
  bool has_norm;
  int64_t K;

  // Q of all rows after norm and rotation.
  std::vector<float> run(const std::string& backend, const std::vector<float>& qkv,
                         const std::vector<float>& norm, const std::vector<float>& table,
                         int64_t rows) const {
    ModelShape shape = small_shape(dtype);
    shape.K = K;
    Rig rig(backend, shape);
    const WeightId id = rig.weight(WeightKind::kVector, {norm}, 1);
    const Tensor in = rig.tensor(DType::kF32, rows, 4 * shape.K, qkv);
    const Tensor angles = rig.tensor(DType::kF32, rows, shape.K, table);
    const Tensor q = rig.tensor(dtype, rows, 2 * shape.K);
    rig.run(plan_of_rows(rows), [&](Backend& backend) {
      backend.rope_append({.layer = 0,
                           .qkv = in,
                           .rope_table = angles,
                           .q_norm = has_norm ? id : kNoWeight,
                           .k_norm = has_norm ? id : kNoWeight,
                           .norm_epsilon = 1e-6f,
                           .q = q});
    });
    return rig.read(q);
  }
};

// Cosines and sines of the usual angles.
std::vector<float> rotation_table(int64_t rows, int64_t K) {
  std::vector<float> table(static_cast<size_t>(rows * K));
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t k = 0; k < K / 2; ++k) {
      const double angle = static_cast<double>(p) * std::pow(10000.0, -2.0 * k / K);
      table[p * K + k] = static_cast<float>(std::cos(angle));
      table[p * K + K / 2 + k] = static_cast<float>(std::sin(angle));
    }
  }
  return table;
}

void expect_rotation_conforms(const std::string& backend, const Rope& rope, int64_t rows) {
  const int64_t K = rope.K;
  Numbers numbers(static_cast<uint64_t>(31 + K));
  const auto qkv = numbers.vector(rows * 4 * K, 3.0f);
  const auto norm = numbers.vector(K);
  const auto table = rotation_table(rows, K);
  const auto want = rope.run("reference", qkv, norm, table, rows);
  std::vector<double> bound;
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t i = 0; i < 2 * K; ++i) {
      const float* head = qkv.data() + t * 4 * K + i / K * K;
      const int64_t k = i % (K / 2);
      double squares = 0;
      for (int64_t n = 0; n < K; ++n) squares += static_cast<double>(head[n]) * head[n];
      const double scale = rope.has_norm ? 1 / std::sqrt(squares / K + 1e-6) : 1.0;
      const double low = scale * std::abs(head[k] * (rope.has_norm ? norm[k] : 1.0f));
      const double high =
          scale * std::abs(head[k + K / 2] * (rope.has_norm ? norm[k + K / 2] : 1.0f));
      const double a = std::abs(table[t * K + k]), b = std::abs(table[t * K + K / 2 + k]);
      const double magnitude = i % K < K / 2 ? low * a + high * b : high * a + low * b;
      const double roundings = rope.has_norm ? 0.5 * K + 5 + 3 : 3;  // of norm and rotation
      bound.push_back(1.01 * gamma_of(roundings) * magnitude +
                      2 * unit_of(rope.dtype) * std::abs(want[t * 2 * K + i]) * 1.01 + kFlush);
    }
  }
  expect_within(rope.run(backend, qkv, norm, table, rows), want, bound,
                std::string(rope.has_norm ? "rope with norm" : "rope") + " K " + std::to_string(K));
}

TEST_P(Rotation, StaysWithinTheRoundingOfTwoProducts) {
  std::vector<int64_t> widths = {46, 48, 50, 62, 64, 66, 96, 126, 128, 130, 256};
  for (int64_t K = 2; K <= 34; K += 2) widths.push_back(K);
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const bool has_norm : {false, true}) {
      expect_rotation_conforms(GetParam(), {dtype, has_norm, 16}, 300);
      for (const int64_t K : widths) {
        if (K > max_head_width(GetParam())) continue;
        expect_rotation_conforms(GetParam(), {dtype, has_norm, K}, 7);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, Rotation, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
