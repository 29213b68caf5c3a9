#include "kernels/profile/profiled_backend.h"

#include <algorithm>

#include "kernels/registry.h"
#include "tests/kernels/tiny_model.h"

namespace rollpack::kernels::testing {
namespace {

constexpr int64_t kRows = 5, kPads = 3;

// Runs one linear layer and attention over pads and rows: all the cost that depends on a plan.
class OneLayer : public StepProgram {
 public:
  OneLayer(Backend& backend, const ModelShape& shape, WeightId embedding, WeightId weight)
      : backend_(backend), shape_(shape), embedding_(embedding), weight_(weight) {
    for (Buffer& buffer : buffers_) buffer = backend.alloc(4096 * 4);
  }
  ~OneLayer() override {
    for (const Buffer& buffer : buffers_) backend_.free(buffer);
  }
  void run(Backend& backend, int64_t num_rows, int64_t) override {
    const int64_t q = shape_.H * shape_.K, qkv = q + 2 * shape_.G * shape_.K;
    const auto view = [&](int i, int64_t cols) {
      return Tensor{.data = buffers_[i].data, .dtype = DType::kF32, .shape = {num_rows, cols}};
    };
    backend.embed({.weight = embedding_, .out = view(0, shape_.D)});
    backend.linear({.weight = weight_, .in = view(0, shape_.D), .out = view(1, qkv)});
    backend.rope_append({.qkv = view(1, qkv), .rope_table = rope_table(), .q = view(2, q)});
    backend.attention({.window = 2, .q = view(2, q), .out = view(3, q)});
  }

 private:
  Tensor rope_table() const {
    return {.data = buffers_[4].data, .dtype = DType::kF32, .shape = {16, shape_.K}};
  }
  Backend& backend_;
  const ModelShape shape_;
  const WeightId embedding_, weight_;
  Buffer buffers_[5];
};

TEST(ProfiledBackend, CountsRowsWithPadsAndPairsWithoutThem) {
  const ModelShape shape{
      .D = 8, .H = 2, .G = 1, .K = 4, .F = 8, .V = 20, .L = 1, .dtype = DType::kF32};
  ProfiledBackend backend(make_backend("reference", shape,
                                       {.num_threads = 1,
                                        .kv_cache_bytes = 1 << 16,
                                        .max_num_seqs = 2,
                                        .max_num_batched_tokens = 32}),
                          shape);
  const WeightId embedding = backend.declare_weight(
      {.name = "embedding", .kind = WeightKind::kEmbedding, .part_rows = {20}, .cols = 8});
  const WeightId qkv =
      backend.declare_weight({.name = "layers.0.qkv", .part_rows = {8, 4, 4}, .cols = 8});
  backend.begin_staging();
  const std::vector<float> ones(160, 1.0f);
  const auto load = [&](WeightId id, int32_t part, int64_t rows) {
    backend.load_weight(id, part, {.data = ones.data(), .shape = {rows, 8}}, {0, rows});
  };
  load(embedding, 0, 20);
  load(qkv, 0, 8);
  load(qkv, 1, 4);
  load(qkv, 2, 4);
  backend.commit_weights();
  backend.set_program(std::make_shared<OneLayer>(backend, shape, embedding, qkv));

  StepPlan plan;
  plan.input_ids.assign(kRows + kPads, 1);
  plan.positions = {kPadPosition, kPadPosition, kPadPosition, 0, 1, 2, 3, 4};
  plan.sequences = {{.slot = 0, .num_rows = kRows + kPads, .num_pages = 1}};
  plan.page_tables = {2};
  for (int step = 0; step < 2; ++step) {
    backend.wait(backend.submit(plan), Deadline::clock::now() + std::chrono::seconds(30));
  }

  const StepProfile profile = backend.take();
  EXPECT_EQ(profile.num_steps, 2);
  double ops_s = 0;
  for (const OpProfile& op : profile.ops) {
    ops_s += op.seconds;
    EXPECT_EQ(op.num_calls, 2) << op.name;
    EXPECT_EQ(op.num_rows, 2 * (kRows + kPads)) << op.name;
    EXPECT_GT(op.bytes, 0) << op.name;
  }
  EXPECT_LE(ops_s, profile.program_s);
  const auto find = [&](const char* name) {
    return *std::ranges::find(profile.ops, std::string(name), &OpProfile::name);
  };
  ASSERT_EQ(profile.ops.size(), 4u);
  EXPECT_EQ(find("linear qkv").flops, 2 * 2.0 * 16 * 8 * (kRows + kPads));
  EXPECT_EQ(find("linear qkv").bytes, 2 * 16.0 * 8 * 4);
  // Window 2: the first row sees one key, the other four see two.
  EXPECT_EQ(find("attention").flops, 2 * 4.0 * 2 * 4 * (1 + 4 * 2));
  EXPECT_TRUE(backend.take().ops.empty()) << "taken is taken";
}

TEST(ProfiledBackend, ForgetsAPlanThatTheBackendRefuses) {
  const ModelShape shape{
      .D = 8, .H = 2, .G = 1, .K = 4, .F = 8, .V = 20, .L = 1, .dtype = DType::kF32};
  ProfiledBackend backend(make_backend("reference", shape, {.kv_cache_bytes = 1 << 16}), shape);
  EXPECT_ANY_THROW(backend.submit({})) << "no program is set";
  EXPECT_EQ(backend.take().num_steps, 0);
}

}  // namespace
}  // namespace rollpack::kernels::testing
