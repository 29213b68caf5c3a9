// Attention kernels over a work list and pages that the test makes itself: however the work is cut
// and whatever lies in slots that no row may see, NaN included, every row keeps its bits.
#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/emulation/emulated_device.h"
#include "tests/kernels/rig.h"

namespace rollpack::kernels::cuda {
namespace {

using testing::Numbers;

struct Heads {
  int64_t H, G, K;
};

// A sequence whose last `num_rows` tokens are rows of the step.
struct Sequence {
  uint64_t prompt;  // keys and values of the first `num_shared` tokens are those of this number
  int32_t num_shared;
  uint64_t own;  // and those of the others of this one
  int32_t num_tokens;
  int32_t num_rows;
};

const std::vector<Sequence> kSequences = {
    {1, 530, 2, 600, 1}, {1, 530, 3, 777, 1}, {1, 530, 4, 531, 1}, {5, 0, 6, 540, 40},
    {7, 0, 8, 3, 1},     {1, 530, 9, 600, 3}, {10, 0, 11, 256, 1}, {12, 0, 13, 1100, 1}};

class Pages {
 public:
  Pages(const Heads& heads, DType dtype, bool shares)
      : heads_(heads), dtype_(dtype), shares_(shares), stride_((heads.K + 15) / 16 * 16) {
    bytes_.assign(static_cast<size_t>(kPages * page_bytes()), 0xff);  // NaN as bf16 and as f32
  }

  // Pages of a sequence; those that hold shared tokens alone may be another's.
  std::vector<int32_t> place(const Sequence& sequence) {
    std::vector<int32_t> table;
    for (int32_t first = 0; first < sequence.num_tokens; first += kPageTokens) {
      const bool is_shared = first + kPageTokens <= sequence.num_shared;
      if (is_shared && shares_ && shared_.size() > static_cast<size_t>(first / kPageTokens)) {
        table.push_back(shared_[static_cast<size_t>(first / kPageTokens)]);
        continue;
      }
      const int32_t page = order_[static_cast<size_t>(next_page_++)];
      if (is_shared) shared_.push_back(page);
      table.push_back(page);
      for (int32_t t = first; t < std::min(first + kPageTokens, sequence.num_tokens); ++t) {
        write(page, t, t < sequence.num_shared ? sequence.prompt : sequence.own);
      }
    }
    return table;
  }

  KvCache cache() {
    return {.data = reinterpret_cast<std::byte*>(bytes_.data()),
            .num_pages = kPages,
            .G = static_cast<int32_t>(heads_.G),
            .K = static_cast<int32_t>(heads_.K),
            .row_stride = static_cast<int32_t>(stride_)};
  }

 private:
  static constexpr int64_t kPages = 400;

  int64_t page_bytes() const { return heads_.G * 2 * kPageTokens * stride_ * dtype_bytes(dtype_); }

  void write(int32_t page, int32_t token, uint64_t seed) {
    Numbers numbers(seed * 10007 + static_cast<uint64_t>(token));
    for (int64_t head = 0; head < heads_.G; ++head) {
      for (const bool is_value : {false, true}) {
        auto row = numbers.vector(heads_.K, 2.0f);
        row.resize(static_cast<size_t>(stride_), 0.0f);  // zeros behind the head
        const int64_t at = (((page * heads_.G + head) * 2 + (is_value ? 1 : 0)) * kPageTokens +
                            token % kPageTokens) *
                           stride_;
        for (int64_t k = 0; k < stride_; ++k) put(bytes_.data(), at + k, row[k]);
      }
    }
  }
  void put(unsigned char* base, int64_t index, float value) const {
    if (dtype_ == DType::kF32) {
      std::memcpy(base + index * 4, &value, 4);
    } else {
      const uint16_t bits = f32_to_bf16(value);
      std::memcpy(base + index * 2, &bits, 2);
    }
  }

  const Heads heads_;
  const DType dtype_;
  const bool shares_;
  const int64_t stride_;
  std::vector<unsigned char> bytes_;
  std::vector<int32_t> order_ = Numbers(5).permutation(kPages);
  std::vector<int32_t> shared_;
  int32_t next_page_ = 0;
};

struct Cut {
  int32_t max_states, wanted_blocks;
  bool shares;
  int32_t item_blocks = 0;  // 0: one an item
};

// Outputs of a sequence's rows, one vector a sequence.
using Outputs = std::vector<std::vector<float>>;

Outputs attend(const Heads& heads, DType dtype, int32_t window, const Cut& cut,
               const std::vector<int32_t>& order, int64_t shared_bytes = 227 * 1024) {
  Pages pages(heads, dtype, cut.shares);
  StepPlan plan;
  for (const int32_t s : order) {
    const Sequence& sequence = kSequences[static_cast<size_t>(s)];
    testing::add_sequence(plan, std::vector<int32_t>(static_cast<size_t>(sequence.num_rows), 0),
                          sequence.num_tokens - sequence.num_rows, pages.place(sequence));
  }
  const int64_t width = heads.H * heads.K;
  const auto size = static_cast<size_t>(plan.num_rows() * width);
  const auto bytes_of = static_cast<size_t>(dtype_bytes(dtype));
  std::vector<unsigned char> q(size * bytes_of), out(size * bytes_of, 0xff);
  for (const StepSequence& sequence : plan.sequences) {
    const auto index = static_cast<size_t>(&sequence - plan.sequences.data());
    const auto values =
        Numbers(900 + static_cast<uint64_t>(order[index])).vector(sequence.num_rows * width, 2.0f);
    for (size_t i = 0; i < values.size(); ++i) {
      const size_t at = (static_cast<size_t>(sequence.row_begin * width) + i) * bytes_of;
      const uint16_t bits = f32_to_bf16(values[i]);
      const void* const value = dtype == DType::kF32 ? static_cast<const void*>(&values[i]) : &bits;
      std::memcpy(q.data() + at, value, bytes_of);
    }
  }
  const KvCache cache = pages.cache();
  const AttentionLimits limits = {.group = static_cast<int32_t>(heads.H / heads.G),
                                  .num_kv_heads = static_cast<int32_t>(heads.G),
                                  .max_states = cut.max_states,
                                  .wanted_blocks = cut.wanted_blocks};
  const AttentionPlan work = plan_attention(plan, limits);
  // NaN where states will be, zeros where they are counted.
  const int64_t num_counters = cut.max_states * heads.H;
  std::vector<float> states(
      static_cast<size_t>(attention_workspace_bytes(cut.max_states, heads.H, heads.K) / 4),
      std::numeric_limits<float>::quiet_NaN());
  std::fill(states.end() - num_counters, states.end(), 0.0f);
  const StepScalars scalars = {.num_items = static_cast<int32_t>(work.items.size())};
  const auto device = make_emulated_device();
  device->kernels().attention(
      device->make_stream(),
      {.rows = {.num_rows = static_cast<int32_t>(plan.num_rows()),
                .scalars = &scalars,
                .positions = plan.positions.data(),
                .page_tables = plan.page_tables.data()},
       .cache = cache,
       .work = {.items = work.items.data(),
                .item_rows = work.item_rows.data(),
                .row_states = work.row_states.data(),
                .pad_rows = work.pad_rows.data(),
                .item_blocks = cut.item_blocks > 0 ? cut.item_blocks : scalars.num_items,
                .num_pads = static_cast<int32_t>(work.pad_rows.size()),
                .max_states = cut.max_states},
       .window = window,
       .H = static_cast<int32_t>(heads.H),
       .dtype = dtype,
       .q = q.data(),
       .out = out.data(),
       .out_stride = heads.H * cache.K,
       .workspace = states.data(),
       .max_shared_bytes = shared_bytes});
  EXPECT_EQ(std::count(states.end() - num_counters, states.end(), 0.0f), num_counters);
  Outputs outputs(kSequences.size());
  for (const StepSequence& sequence : plan.sequences) {
    const auto index = static_cast<size_t>(&sequence - plan.sequences.data());
    auto& rows = outputs[static_cast<size_t>(order[index])];
    for (int64_t i = 0; i < sequence.num_rows * width; ++i) {
      const size_t at = static_cast<size_t>(sequence.row_begin * width + i) * bytes_of;
      if (dtype == DType::kF32) {
        float value;
        std::memcpy(&value, out.data() + at, sizeof value);
        rows.push_back(value);
      } else {
        uint16_t bits;
        std::memcpy(&bits, out.data() + at, sizeof bits);
        rows.push_back(bf16_to_f32(bits));
      }
    }
  }
  return outputs;
}

void expect_same_outputs(const Outputs& got, const Outputs& want, const std::string& what) {
  for (size_t s = 0; s < got.size(); ++s) {
    if (got[s].empty()) continue;
    testing::expect_same_bits(got[s], want[s], what + ", sequence " + std::to_string(s));
  }
}

void expect_cuts_change_nothing(const Heads& heads, DType dtype, int32_t window) {
  const auto num_sequences = static_cast<int32_t>(kSequences.size());
  Outputs alone(kSequences.size());
  for (int32_t s = 0; s < num_sequences; ++s) {
    alone[static_cast<size_t>(s)] =
        attend(heads, dtype, window, {0, 1, false}, {s})[static_cast<size_t>(s)];
    for (const float x : alone[static_cast<size_t>(s)]) ASSERT_TRUE(std::isfinite(x)) << s;
  }
  // Nothing stored; shared chunks alone; all that fits; memory for some; nothing shared. Blocks
  // that take several items in turn, and more blocks than items.
  for (const Cut& cut : {Cut{0, 1, true, 3},
                         {500, 1, true},
                         {500, 1000, true, 7},
                         {9, 1000, true, 90},
                         {500, 1000, false}}) {
    const auto order = Numbers(static_cast<uint64_t>(cut.max_states + cut.wanted_blocks))
                           .permutation(num_sequences);
    expect_same_outputs(attend(heads, dtype, window, cut, order), alone,
                        "states " + std::to_string(cut.max_states) + ", blocks " +
                            std::to_string(cut.wanted_blocks) + ", window " +
                            std::to_string(window));
  }
}

TEST(AttentionWork, HowItIsCutAndWhatLiesInUnusedSlotsChangesNoBit) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const int32_t window : {0, 300}) {
      expect_cuts_change_nothing({.H = 4, .G = 1, .K = 16}, dtype, window);
    }
  }
}

// Widths that kernels are compiled for, and one between; a device with little shared memory has the
// values take the place of the keys.
TEST(AttentionWork, SharedMemoryOfTheDeviceChangesNoBit) {
  for (const int64_t K : {32, 64, 80, 96, 128, 20}) {
    const Heads heads{.H = 2, .G = 2, .K = K};
    const std::vector<int32_t> order = {4, 6, 2};
    expect_same_outputs(attend(heads, DType::kBF16, 0, {0, 1, true}, order, 99 * 1024),
                        attend(heads, DType::kBF16, 0, {0, 1, true}, order, 1 << 20),
                        "K " + std::to_string(K));
  }
}

TEST(AttentionWork, MoreHeadsThanAnItemHasRowsAreCutIntoParts) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const Outputs many = attend({.H = 71, .G = 1, .K = 16}, dtype, 0, {500, 1000, true}, {2, 0});
    for (const float x : many[2]) ASSERT_TRUE(std::isfinite(x));
    expect_same_outputs(many, attend({.H = 71, .G = 1, .K = 16}, dtype, 0, {0, 1, false}, {0, 2}),
                        "71 heads");
  }
}

}  // namespace
}  // namespace rollpack::kernels::cuda
