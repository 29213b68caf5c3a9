#include "tests/kernels/tiny_model.h"

#include <utility>

namespace rollpack::kernels::testing {
namespace {

constexpr ModelShape kShape = {.D = 48, .H = 6, .G = 2, .K = 20, .F = 72, .V = 1100, .L = 2};
constexpr int64_t kQkvColumns = (kShape.H + 2 * kShape.G) * kShape.K;

ModelShape shape_of(DType dtype) {
  ModelShape shape = kShape;
  shape.dtype = dtype;
  return shape;
}

struct Layer {
  WeightId norm1, qkv, bias, q_norm, k_norm, o, norm2, gate_up, down;
  int32_t window;
};

struct Buffers {
  Tensor x, h, qkv, q, attended, gated, head, head_normed, rope_table;
};

Tensor first_rows(Tensor tensor, int64_t rows) {
  tensor.shape[0] = rows;
  return tensor;
}

class TinyProgram final : public StepProgram {
 public:
  TinyProgram(WeightId embedding, WeightId norm, std::vector<Layer> layers, const Buffers& buffers)
      : embedding_(embedding), norm_(norm), layers_(std::move(layers)), buffers_(buffers) {}

  void run(Backend& backend, int64_t rows, int64_t head_rows) override {
    const Tensor x = first_rows(buffers_.x, rows), h = first_rows(buffers_.h, rows);
    const Tensor qkv = first_rows(buffers_.qkv, rows), q = first_rows(buffers_.q, rows);
    const Tensor attended = first_rows(buffers_.attended, rows);
    const Tensor gated = first_rows(buffers_.gated, rows);
    backend.embed({.weight = embedding_, .out = x});
    for (int32_t l = 0; l < kShape.L; ++l) {
      const Layer& layer = layers_[static_cast<size_t>(l)];
      backend.rms_norm({.weight = layer.norm1, .in = x, .out = h});
      backend.linear({.weight = layer.qkv, .bias = layer.bias, .in = h, .out = qkv});
      backend.rope_append({.layer = l,
                           .qkv = qkv,
                           .rope_table = buffers_.rope_table,
                           .q_norm = layer.q_norm,
                           .k_norm = layer.k_norm,
                           .q = q});
      backend.attention({.layer = l, .window = layer.window, .q = q, .out = attended});
      backend.linear(
          {.weight = layer.o, .epilogue = Epilogue::kResidual, .in = attended, .out = x});
      backend.rms_norm({.weight = layer.norm2, .in = x, .out = h});
      backend.linear(
          {.weight = layer.gate_up, .epilogue = Epilogue::kGated, .in = h, .out = gated});
      backend.linear(
          {.weight = layer.down, .epilogue = Epilogue::kResidual, .in = gated, .out = x});
    }
    if (head_rows == 0) return;
    const Tensor head = first_rows(buffers_.head, head_rows);
    const Tensor head_normed = first_rows(buffers_.head_normed, head_rows);
    backend.gather_head_rows({.in = x, .out = head});
    backend.rms_norm({.weight = norm_, .in = head, .out = head_normed});
    backend.lm_head({.weight = embedding_, .in = head_normed});
  }
  bool is_replayable() const override { return true; }

 private:
  WeightId embedding_, norm_;
  std::vector<Layer> layers_;
  Buffers buffers_;
};

std::vector<float> rope_table() {
  std::vector<float> table;
  for (int64_t p = 0; p < TinyModel::kPositions; ++p) {
    const auto angle = [&](int64_t k) {
      return static_cast<double>(p) *
             std::pow(10000.0, -2.0 * static_cast<double>(k) / static_cast<double>(kShape.K));
    };
    for (int64_t k = 0; k < kShape.K / 2; ++k) {
      table.push_back(static_cast<float>(std::cos(angle(k))));
    }
    for (int64_t k = 0; k < kShape.K / 2; ++k) {
      table.push_back(static_cast<float>(std::sin(angle(k))));
    }
  }
  return table;
}

struct Weight {
  WeightKind kind;
  std::vector<int64_t> part_rows;
  int64_t cols;
  float scale;
};

// In the order of their ids: embedding, final norm, then nine a layer.
std::vector<Weight> weight_list() {
  const auto [D, H, G, K, F, V, L, dtype] = kShape;
  std::vector<Weight> list = {{WeightKind::kEmbedding, {V}, D, 0.5f},
                              {WeightKind::kVector, {D}, 1, 1.0f}};
  for (int64_t l = 0; l < L; ++l) {
    const std::vector<int64_t> heads = {H * K, G * K, G * K};
    list.insert(list.end(), {{WeightKind::kVector, {D}, 1, 1.0f},
                             {WeightKind::kLinear, heads, D, 0.3f},
                             {WeightKind::kVector, heads, 1, 0.3f},
                             {WeightKind::kVector, {K}, 1, 1.5f},
                             {WeightKind::kVector, {K}, 1, 1.5f},
                             {WeightKind::kLinear, {D}, H * K, 0.2f},
                             {WeightKind::kVector, {D}, 1, 1.0f},
                             {WeightKind::kGated, {F, F}, D, 0.3f},
                             {WeightKind::kLinear, {D}, F, 0.3f}});
  }
  return list;
}

std::vector<std::vector<float>> values_of(const Weight& weight, Numbers& numbers) {
  std::vector<std::vector<float>> parts;
  for (const int64_t rows : weight.part_rows) {
    parts.push_back(numbers.vector(rows * weight.cols, weight.scale));
  }
  return parts;
}

}  // namespace

TinyModel::TinyModel(const std::string& backend, DType dtype, RigOptions options)
    : rig_(backend, shape_of(dtype), options) {
  Numbers numbers(0);
  for (const Weight& weight : weight_list()) {
    ids_.push_back(rig_.weight(weight.kind, values_of(weight, numbers), weight.cols));
  }
  std::vector<Layer> layers;
  for (size_t l = 0; l < 2; ++l) {
    const WeightId* id = ids_.data() + 2 + 9 * l;
    const bool is_plain = l == 1;  // the second layer: no biases, no head norms, a window
    layers.push_back({id[0], id[1], is_plain ? kNoWeight : id[2], is_plain ? kNoWeight : id[3],
                      is_plain ? kNoWeight : id[4], id[5], id[6], id[7], id[8], is_plain ? 23 : 0});
  }
  const int64_t rows = options.max_num_batched_tokens;
  const Buffers buffers = {
      .x = rig_.tensor(DType::kF32, rows, kShape.D),
      .h = rig_.tensor(dtype, rows, kShape.D),
      .qkv = rig_.tensor(DType::kF32, rows, kQkvColumns),
      .q = rig_.tensor(dtype, rows, kShape.H * kShape.K),
      .attended = rig_.tensor(dtype, rows, kShape.H * kShape.K),
      .gated = rig_.tensor(dtype, rows, kShape.F),
      .head = rig_.tensor(DType::kF32, rows, kShape.D),
      .head_normed = rig_.tensor(dtype, rows, kShape.D),
      .rope_table = rig_.tensor(DType::kF32, kPositions, kShape.K, rope_table())};
  written_ = {buffers.x,        buffers.h,     buffers.qkv,  buffers.q,
              buffers.attended, buffers.gated, buffers.head, buffers.head_normed};
  rig_.backend().set_program(
      std::make_shared<TinyProgram>(ids_[0], ids_[1], std::move(layers), buffers));
}

void TinyModel::set_weights(uint64_t seed) {
  Numbers numbers(seed);
  const std::vector<Weight> list = weight_list();
  for (size_t i = 0; i < list.size(); ++i) rig_.set_weight(ids_[i], values_of(list[i], numbers));
}

void TinyModel::poison() {
  for (const Tensor& tensor : written_) {
    const std::vector<unsigned char> bits(static_cast<size_t>(tensor.bytes()), 0xff);
    rig_.backend().upload({tensor.data, tensor.bytes()}, bits.data(), tensor.bytes());
  }
}

void score_all(StepPlan& plan, const std::vector<int32_t>& successors) {
  const int32_t first = plan.sequences.back().row_begin;
  for (size_t i = 0; i < successors.size(); ++i) {
    plan.scores.push_back({first + static_cast<int32_t>(i), successors[i]});
  }
}

int32_t pages_for(int64_t tokens) {
  return static_cast<int32_t>((tokens + 15) / 16);
}

void expect_same_results(const std::vector<HeadResult>& got, const std::vector<HeadResult>& want,
                         const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (size_t i = 0; i < got.size(); ++i) {
    expect_same_result(got[i], want[i], what + ", result " + std::to_string(i));
  }
}

}  // namespace rollpack::kernels::testing
