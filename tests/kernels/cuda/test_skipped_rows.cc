// Rows that fill a step up to the rows of its graph, kernel by kernel: what belongs to them, and
// what lies around the memory of others, keeps its bytes, and no kernel reads what they have not.
#include <cstring>
#include <vector>

#include "kernels/cuda/emulation/emulated_device.h"
#include "kernels/cuda/head_memory.h"
#include "tests/kernels/rig.h"

namespace rollpack::kernels::cuda {
namespace {

using testing::Numbers;

constexpr uint8_t kPoison = 0xff;  // NaN as f32 and as bf16
constexpr int32_t kRows = 8, kLive = 3;

class SkippedRows : public ::testing::Test {
 protected:
  template <class T>
  static bool is_poison(const T* first, int64_t count) {
    const auto* const bytes = reinterpret_cast<const uint8_t*>(first);
    return std::all_of(bytes, bytes + count * static_cast<int64_t>(sizeof(T)),
                       [](uint8_t byte) { return byte == kPoison; });
  }
  template <class T>
  static std::vector<T> poisoned(int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    std::memset(static_cast<void*>(values.data()), kPoison, values.size() * sizeof(T));
    return values;
  }
  // Values of live rows, then one for all that are skipped.
  static std::vector<int32_t> filled_up(std::vector<int32_t> values, int32_t value) {
    values.resize(kRows, value);
    return values;
  }

  std::unique_ptr<Device> device_ = make_emulated_device();
  OwnStream stream_{*device_};
};

TEST_F(SkippedRows, AreNotEmbeddedGatheredOrWritten) {
  constexpr int64_t D = 16;
  const std::vector<float> weight = Numbers(1).vector(10 * D);
  const std::vector<int32_t> ids = filled_up({4, 0, 9}, kSkippedRow);
  const std::vector<int32_t> positions = filled_up({0, 0, 0}, kPadPosition);
  StepRows rows{.num_rows = kRows, .input_ids = ids.data(), .positions = positions.data()};
  std::vector<float> x = poisoned<float>(kRows * D);
  device_->kernels().embed(stream_,
                           {.rows = rows,
                            .weight = {.data = weight.data(), .N = 10, .K_in = D, .row_stride = D},
                            .dtype = DType::kF32,
                            .out = x.data()});
  EXPECT_EQ(x[D], weight[0]);
  EXPECT_TRUE(is_poison(x.data() + kLive * D, (kRows - kLive) * D));

  // A row before the first is another's memory.
  std::vector<float> in = Numbers(2).vector((kRows + 1) * D), out = poisoned<float>(kRows * D);
  const std::vector<int32_t> gathered = filled_up({0, 1, 2}, -1);
  device_->kernels().gather_rows(stream_, {.head = {.num_rows = kRows, .rows = gathered.data()},
                                           .width = D,
                                           .in = in.data() + D,
                                           .out = out.data()});
  EXPECT_EQ(out[0], in[D]);
  EXPECT_TRUE(is_poison(out.data() + kLive * D, (kRows - kLive) * D));
}

// A draw for every live row and every skipped one.
TEST_F(SkippedRows, DrawNothingAndHaveNoResult) {
  constexpr int64_t D = 16, V = 300;
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const std::vector<float> values = Numbers(3).vector((V + kRows) * D);
    std::vector<uint16_t> bits;
    for (const float value : values) bits.push_back(f32_to_bf16(value));
    const auto* const data = dtype == DType::kBF16 ? static_cast<const void*>(bits.data())
                                                   : static_cast<const void*>(values.data());
    const int64_t rows_at = V * D * dtype_bytes(dtype);
    const StepScalars scalars;
    const std::vector<int32_t> positions = filled_up({5, 6, 7}, kPadPosition);
    const std::vector<int32_t> head_rows = filled_up({0, 1, 2}, -1);
    const std::vector<int32_t> slots_of = filled_up({2, 0, 1}, -1);
    const std::vector<int32_t> draws(kRows, 0);
    const std::vector<int32_t> all = {0, 1, 2, 3, 4, 5, 6, 7};
    // A state on either side of those that there are.
    std::vector<SlotState> states = poisoned<SlotState>(kLive + 2);
    std::vector<uint32_t> stops(kLive * 10);
    for (int32_t s = 0; s < kLive; ++s) {
      states[static_cast<size_t>(s + 1)] = {
          .seed = 4, .next_position = 8, .end_position = 20, .top_p = s == 1 ? 0.5f : 1.0f};
    }
    std::vector<HeadResult> results = poisoned<HeadResult>(kRows);
    const VocabularyPart part{.V = V, .held = {0, V}};
    const HeadMemory sizes = head_memory(nullptr, part, kRows);
    std::vector<uint8_t> workspace = poisoned<uint8_t>(sizes.bytes);
    const HeadGroup group{.num_rows = kRows, .num_queries = kRows};
    const LmHeadInputs inputs = {
        .rows = {.num_rows = kRows, .scalars = &scalars, .positions = positions.data()},
        .head = {.num_rows = kRows,
                 .num_samples = kRows,
                 .rows = head_rows.data(),
                 .sample_head_row = all.data(),
                 .sample_slot = slots_of.data(),
                 .sample_draw = draws.data(),
                 .results = results.data()},
        .slots = {.states = states.data() + 1, .stop_bits = stops.data(), .stop_words = 10},
        .weight = {.data = data, .N = V, .K_in = D, .row_stride = D},
        .part = part,
        .dtype = dtype,
        .in = static_cast<const std::byte*>(data) + rows_at,
        .workspace = workspace.data(),
        .max_rows = kRows,
        .queries = all.data(),
        .groups = {&group, 1}};
    device_->kernels().lm_head(stream_, inputs);
    for (int32_t i = 0; i < kLive; ++i) {
      const HeadResult& result = results[static_cast<size_t>(i)];
      EXPECT_TRUE(result.is_finite && result.slot == slots_of[static_cast<size_t>(i)]);
      EXPECT_EQ(result.position, 8);
      EXPECT_EQ(states[static_cast<size_t>(result.slot + 1)].pending_token, result.token);
    }
    EXPECT_TRUE(is_poison(results.data() + kLive, kRows - kLive));
    EXPECT_TRUE(is_poison(states.data(), 1) && is_poison(states.data() + kLive + 1, 1));
    const HeadMemory memory = head_memory(workspace.data(), part, kRows);
    EXPECT_FALSE(is_poison(memory.panels + (kLive - 1) * memory.num_panels, memory.num_panels));
    EXPECT_TRUE(
        is_poison(memory.panels + kLive * memory.num_panels, (kRows - kLive) * memory.num_panels));
    EXPECT_TRUE(is_poison(memory.row_stats + kLive, kRows - kLive));
  }
}

}  // namespace
}  // namespace rollpack::kernels::cuda
