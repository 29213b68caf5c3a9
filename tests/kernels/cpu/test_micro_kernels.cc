// Every micro-kernel of every instruction set of this machine against the portable one, bit for
// bit, on inputs that include subnormals, zeros of both signs and large numbers; and the portable
// products against the contract written out once more.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/cpu/float_mode.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/polynomial.h"
#include "toy_model.h"

namespace rollpack::kernels::cpu {
namespace {

using testing::Numbers;

// Finite floats of all kinds: a third ordinary, the rest from the edges of the format.
float wild(Numbers& numbers) {
  const float ordinary = numbers.uniform(4.0f);
  switch (numbers.below(12)) {
    case 0:
      return 0.0f;
    case 1:
      return -0.0f;
    case 2:
      return std::ldexp(ordinary, -126);  // about the smallest normal
    case 3:
      return std::ldexp(ordinary, -63);  // products about it
    case 4:
      return std::ldexp(ordinary, -70);
    case 5:
      return std::bit_cast<float>(static_cast<uint32_t>(numbers.next()) & 0x807fffffu);
    case 6:
      return std::ldexp(ordinary, 40);
    case 7:
      return std::ldexp(ordinary, -20);
    default:
      return ordinary;
  }
}

template <class Element>
Element element(float value) {
  if constexpr (sizeof(Element) == 2) {
    return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);  // keeps subnormals
  } else {
    return value;
  }
}

template <class Element>
std::vector<Element> wild_elements(Numbers& numbers, int64_t count) {
  std::vector<Element> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(element<Element>(wild(numbers)));
  return values;
}

std::vector<float> wild_floats(Numbers& numbers, int64_t count) {
  return wild_elements<float>(numbers, count);
}

// Bits, with every NaN as one: which NaN comes out is no promise.
template <class T>
std::vector<uint32_t> bits(const std::vector<T>& values) {
  std::vector<uint32_t> result;
  for (const T value : values) {
    if constexpr (sizeof(T) == 2) {
      result.push_back((value & 0x7fffu) > 0x7f80u ? 0x7fc0u : value);
    } else {
      const uint32_t word = std::bit_cast<uint32_t>(value);
      result.push_back((word & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : word);
    }
  }
  return result;
}

std::vector<Isa> vector_isas() {
  std::vector<Isa> isas = supported_isas();
  isas.pop_back();  // portable, the one compared with
  return isas;
}

template <class Element>
class MicroKernels : public ::testing::Test {
 protected:
  static constexpr int64_t kWidth = sizeof(Element) == 2 ? 2 : 1;
  static const ElementKernels<Element>& of(Isa isa) { return kernel_table(isa).of<Element>(); }
  FlushSubnormalsScope flush_;
};

using Elements = ::testing::Types<uint16_t, float>;
TYPED_TEST_SUITE(MicroKernels, Elements);

// The contract of a product, element by element.
float chain(const uint16_t* a, const uint16_t* panel, int64_t steps, int column) {
  float acc = 0;
  for (int64_t s = 0; s < steps; ++s) {
    const uint16_t* b = panel + s * 128 + column * 2;
    acc = std::fmaf(bf16_to_f32(a[2 * s + 1]), bf16_to_f32(b[1]), acc);
    acc = std::fmaf(bf16_to_f32(a[2 * s]), bf16_to_f32(b[0]), acc);
  }
  return acc;
}
float chain(const float* a, const float* panel, int64_t steps, int column) {
  float acc = 0;
  for (int64_t s = 0; s < steps; ++s) acc = std::fmaf(a[s], panel[s * 64 + column], acc);
  return acc;
}

TYPED_TEST(MicroKernels, ProductsAreTheContractsChainForEveryRowCount) {
  Numbers numbers(1);
  for (const int64_t steps : {1, 2, 31, 64, 65, 144}) {
    const int64_t stride = steps * this->kWidth + 6;
    const auto a = wild_elements<TypeParam>(numbers, kTileRows * stride);
    const auto panel = wild_elements<TypeParam>(numbers, steps * kPanelColumns * this->kWidth);
    for (const Isa isa : supported_isas()) {
      for (int rows = 1; rows <= kTileRows; ++rows) {
        std::vector<float> tile(kTileRows * kPanelColumns, -1.0f);
        this->of(isa).panel_product(a.data(), stride, rows, panel.data(), steps, tile.data(), {});
        std::vector<float> want(tile.size(), -1.0f);
        for (int r = 0; r < rows; ++r) {
          for (int c = 0; c < kPanelColumns; ++c) {
            want[static_cast<size_t>(r * kPanelColumns + c)] =
                chain(a.data() + r * stride, panel.data(), steps, c);
          }
        }
        ASSERT_EQ(bits(tile), bits(want)) << isa_name(isa) << ", " << rows << " rows";
      }
    }
  }
}

TYPED_TEST(MicroKernels, ProductsInPartsOfKAreTheWholeProduct) {
  Numbers numbers(11);
  const int64_t steps = 61, stride = steps * this->kWidth;
  const auto a = wild_elements<TypeParam>(numbers, kTileRows * stride);
  const auto panel = wild_elements<TypeParam>(numbers, steps * kPanelColumns * this->kWidth);
  for (const Isa isa : supported_isas()) {
    const ElementKernels<TypeParam>& of = this->of(isa);
    for (const int64_t cut : {1, 16, 17, 60}) {
      std::vector<float> whole(kTileRows * kPanelColumns), parts(whole.size());
      of.panel_product(a.data(), stride, kTileRows, panel.data(), steps, whole.data(), {});
      of.panel_product(a.data(), stride, kTileRows, panel.data(), cut, parts.data(),
                       {.ahead = panel.data(), .ahead_lines = 5});
      of.panel_product(a.data() + cut * this->kWidth, stride, kTileRows,
                       panel.data() + cut * kPanelColumns * this->kWidth, steps - cut, parts.data(),
                       {.continues = true});
      ASSERT_EQ(bits(parts), bits(whole)) << isa_name(isa) << ", cut at " << cut;
    }
  }
}

TYPED_TEST(MicroKernels, NormsAgreeForEveryTail) {
  Numbers numbers(2);
  for (const int64_t n : {1, 2, 15, 16, 17, 20, 31, 32, 33, 100, 576}) {
    const auto in = numbers.vector(n, 3.0f), weight = wild_floats(numbers, n);
    std::vector<TypeParam> want(static_cast<size_t>(n) + 1, element<TypeParam>(7.0f));
    this->of(Isa::kPortable).rms_norm(in.data(), weight.data(), n, 1e-6f, want.data());
    EXPECT_EQ(want.back(), element<TypeParam>(7.0f)) << "written past the row";
    for (const Isa isa : vector_isas()) {
      std::vector<TypeParam> got(want.size(), element<TypeParam>(7.0f));
      this->of(isa).rms_norm(in.data(), weight.data(), n, 1e-6f, got.data());
      EXPECT_EQ(bits(got), bits(want)) << isa_name(isa) << ", n = " << n;
    }
  }
}

TYPED_TEST(MicroKernels, GatedTilesAgreeForEveryWidthAndBias) {
  Numbers numbers(3);
  const auto tile = wild_floats(numbers, kTileRows * kPanelColumns);
  const auto bias = wild_floats(numbers, 2 * kPanelColumns);
  for (const bool has_bias : {false, true}) {
    for (int columns = 1; columns <= 32; ++columns) {
      const auto run = [&](Isa isa) {
        std::vector<TypeParam> out(kTileRows * 40, element<TypeParam>(7.0f));
        TileOutput output{.bias = has_bias ? bias.data() : nullptr,
                          .up_bias = 40,
                          .out = out.data(),
                          .stride = 40,
                          .columns = columns};
        this->of(isa).store_gated(tile.data(), kTileRows, output);
        return bits(out);
      };
      for (const Isa isa : vector_isas()) {
        EXPECT_EQ(run(isa), run(Isa::kPortable)) << isa_name(isa) << ", columns " << columns;
      }
    }
  }
}

TYPED_TEST(MicroKernels, AttentionAgreesForEveryPageAndRowCount) {
  Numbers numbers(4);
  constexpr int64_t kColumns = 80;  // one pass of four vectors and one of a single one
  constexpr int kRows = 2 * kTileRows + 1;
  const int64_t steps = 40 / this->kWidth;
  const auto q = wild_elements<TypeParam>(numbers, kRows * 40);
  const auto memory =
      wild_elements<TypeParam>(numbers, kChunkPages * kPageTokens * (kColumns + 40));
  for (int num_pages = 1; num_pages <= kChunkPages; ++num_pages) {
    const int rows = 1 + num_pages % kRows;
    std::vector<const TypeParam*> keys, values;
    for (int i = 0; i < num_pages; ++i) {
      keys.push_back(memory.data() + i * kPageTokens * 40);
      values.push_back(memory.data() + kChunkPages * kPageTokens * 40 + i * kPageTokens * kColumns);
    }
    const int begin = num_pages % 5, end = num_pages * kPageTokens - num_pages % 13;
    const auto run = [&](Isa isa) {
      std::vector<float> scores(kRows * kChunkKeys), out(kRows * kColumns), sums;
      std::vector<TypeParam> p(kRows * kChunkKeys);
      PagesAhead ahead{.pages = {reinterpret_cast<const std::byte*>(keys[0])},
                       .count = 1,
                       .lines_per_page = 4,
                       .lines_per_call = 3};
      this->of(isa).page_scores(q.data(), 40, rows, keys.data(), num_pages, steps, 0.158f,
                                scores.data(), ahead);
      for (int r = 0; r < rows; ++r) {
        float max = 0, sum = 0;
        this->of(isa).chunk_softmax(scores.data() + r * kChunkKeys, num_pages, begin, end,
                                    p.data() + r * kChunkKeys, &max, &sum);
        sums.insert(sums.end(), {max, sum});
      }
      // In two parts, as pages that are shared and pages that are not.
      const int cut = num_pages / 2;
      if (cut > 0) {
        this->of(isa).page_values(p.data(), rows, values.data(), cut, kColumns, false, out.data(),
                                  ahead);
      }
      this->of(isa).page_values(p.data() + cut * kPageTokens, rows, values.data() + cut,
                                num_pages - cut, kColumns, cut > 0, out.data(), ahead);
      std::vector<float> whole(out.size());
      this->of(isa).page_values(p.data(), rows, values.data(), num_pages, kColumns, false,
                                whole.data(), ahead);
      EXPECT_EQ(bits(out), bits(whole)) << isa_name(isa) << ", pages " << num_pages;
      SoftmaxState state{.max = 0.5f, .sum = 3.0f};
      kernel_table(isa).merge_chunk(whole.data(), &state, out.data(), sums[0], sums[1], kColumns);
      sums.insert(sums.end(), {state.max, state.sum});
      std::vector<TypeParam> divided(20);
      this->of(isa).divide(out.data(), 3.0f, 20, divided.data());
      auto all = bits(scores);
      for (const auto& part : {bits(p), bits(sums), bits(out), bits(whole), bits(divided)}) {
        all.insert(all.end(), part.begin(), part.end());
      }
      return all;
    };
    for (const Isa isa : vector_isas()) {
      EXPECT_EQ(run(isa), run(Isa::kPortable)) << isa_name(isa) << ", pages " << num_pages;
    }
  }
}

TYPED_TEST(MicroKernels, RotationsAgreeAndSeeWhatIsNotFiniteAfterRounding) {
  Numbers numbers(13);
  for (const int64_t n : {2, 6, 20, 32, 34, 64, 128}) {
    auto in = numbers.vector(n, 3.0f);
    const auto table = numbers.vector(n, 1.0f);
    const auto run = [&](Isa isa) {
      std::vector<TypeParam> rotated(static_cast<size_t>(n)), rounded(static_cast<size_t>(n));
      const bool is_finite = this->of(isa).rotate_head(in.data(), table.data(), n, rotated.data());
      const bool is_row = this->of(isa).round_row(in.data(), n, rounded.data());
      auto all = bits(rotated);
      const auto rest = bits(rounded);
      all.insert(all.end(), rest.begin(), rest.end());
      all.push_back(is_finite);
      all.push_back(is_row);
      return all;
    };
    const auto finite = run(Isa::kPortable);
    EXPECT_EQ(finite.back(), 1u);
    EXPECT_EQ(finite[finite.size() - 2], 1u);
    for (const Isa isa : vector_isas()) EXPECT_EQ(run(isa), run(Isa::kPortable)) << isa_name(isa);
    // The largest float rounds to infinity in bf16 and is itself in f32.
    in[static_cast<size_t>(n) - 1] = std::numeric_limits<float>::max();
    for (const Isa isa : supported_isas()) {
      EXPECT_EQ(run(isa).back(), sizeof(TypeParam) == 2 ? 0u : 1u) << isa_name(isa);
    }
    in[0] = std::numeric_limits<float>::quiet_NaN();
    for (const Isa isa : supported_isas()) {
      EXPECT_EQ(run(isa).back(), 0u) << isa_name(isa);
      EXPECT_EQ(run(isa)[finite.size() - 2], 0u) << isa_name(isa);
    }
  }
}

TYPED_TEST(MicroKernels, MaskedKeysHaveNoWeightWhateverTheirScore) {
  for (const Isa isa : supported_isas()) {
    std::vector<float> scores(kChunkKeys, std::numeric_limits<float>::quiet_NaN());
    for (int key = 5; key < 23; ++key) scores[static_cast<size_t>(key)] = 0.25f;
    std::vector<TypeParam> p(kChunkKeys, element<TypeParam>(7.0f));
    float max = 0, sum = 0;
    this->of(isa).chunk_softmax(scores.data(), 2, 5, 23, p.data(), &max, &sum);
    EXPECT_EQ(max, 0.25f);
    EXPECT_EQ(sum, 18.0f);
    for (int key = 0; key < 32; ++key) {
      const float want = key >= 5 && key < 23 ? 1.0f : 0.0f;
      EXPECT_EQ(p[static_cast<size_t>(key)], element<TypeParam>(want)) << "key " << key;
    }
  }
}

TEST(VocabularyKernels, StatsAgreeForEveryWidth) {
  const FlushSubnormalsScope flush;
  Numbers numbers(5);
  for (int columns = 1; columns <= kPanelColumns; ++columns) {
    const auto logits = numbers.vector(3 * kPanelColumns, 30.0f);
    const auto run = [&](Isa isa, bool with_weighted) {
      std::vector<BlockPanels> blocks(3, BlockPanels::empty());
      std::vector<LogitsRow> rows;
      for (size_t r = 0; r < 3; ++r) {
        rows.push_back(
            {logits.data() + r * kPanelColumns, 1.4f - static_cast<float>(r) * 0.2f, &blocks[r]});
      }
      kernel_table(isa).panel_stats(rows.data(), 3, columns, columns % kBlockPanels, with_weighted);
      return blocks;
    };
    for (const bool with_weighted : {false, true}) {
      const auto want = run(Isa::kPortable, with_weighted);
      for (const Isa isa : vector_isas()) {
        const auto got = run(isa, with_weighted);
        EXPECT_EQ(std::memcmp(got.data(), want.data(), 3 * sizeof want[0]), 0)
            << isa_name(isa) << ", " << columns;
      }
    }
  }
}

TEST(VocabularyKernels, StatsOfAFurtherScaleAreThoseOfItAlone) {
  const FlushSubnormalsScope flush;
  Numbers numbers(9);
  for (int round = 0; round < 200; ++round) {
    // Values so small that scaling flushes some, of ordinary size, and so large that it overflows.
    const float size = std::ldexp(1.0f, round % 5 == 0 ? -126 : round % 5 == 1 ? 127 : round % 9);
    auto logits = numbers.vector(kPanelColumns, size);
    if (round % 3 == 0) {
      for (float& x : logits) x = -std::abs(x);
    }
    const float scale = 0.3f + static_cast<float>(round % 7) * 0.5f;
    const int columns = 1 + round % kPanelColumns;
    for (const Isa isa : supported_isas()) {
      BlockPanels unit{}, further{}, alone{};
      const LogitsRow both[] = {{logits.data(), 1.0f, &unit}, {logits.data(), scale, &further}};
      const LogitsRow one = {logits.data(), scale, &alone};
      kernel_table(isa).panel_stats(both, 2, columns, 3, true);
      kernel_table(isa).panel_stats(&one, 1, columns, 3, true);
      EXPECT_EQ(further.max[3], alone.max[3]) << isa_name(isa) << ", round " << round;
      EXPECT_EQ(bits(std::vector{further.sum[3], further.weighted[3]}),
                bits(std::vector{alone.sum[3], alone.weighted[3]}))
          << isa_name(isa) << ", round " << round;
    }
  }
}

TEST(VocabularyKernels, MergedPanelsAreTheSumsInOrder) {
  const FlushSubnormalsScope flush;
  Numbers numbers(12);
  for (int count = 1; count <= kBlockPanels; ++count) {
    BlockPanels panels = BlockPanels::empty();
    for (int p = 0; p < count; ++p) {
      panels.max[p] = numbers.uniform(20.0f);
      panels.sum[p] = 1.0f + std::abs(numbers.uniform(60.0f));
      panels.weighted[p] = -std::abs(numbers.uniform(60.0f));
    }
    BlockStats want{.max = *std::max_element(panels.max, panels.max + count)};
    for (int p = 0; p < count; ++p) {
      const auto shift = static_cast<double>(panels.max[p] - want.max);
      const auto factor = static_cast<double>(exp_f32(panels.max[p] - want.max));
      want.sum += static_cast<double>(panels.sum[p]) * factor;
      want.weighted +=
          (static_cast<double>(panels.weighted[p]) + shift * static_cast<double>(panels.sum[p])) *
          factor;
    }
    for (const Isa isa : supported_isas()) {
      const BlockStats got = kernel_table(isa).merge_panels(panels, true);
      EXPECT_EQ(got.max, want.max);
      EXPECT_EQ(got.sum, want.sum) << isa_name(isa) << ", " << count << " panels";
      EXPECT_EQ(got.weighted, want.weighted) << isa_name(isa) << ", " << count << " panels";
    }
  }
}

TEST(VocabularyKernels, PanelsAreCutAsTokenByToken) {
  const FlushSubnormalsScope flush;
  Numbers numbers(14);
  for (int columns = 1; columns <= kPanelColumns; ++columns) {
    auto logits = numbers.vector(kPanelColumns, 5.0f);
    const float scale = 0.7f, limit = logits[static_cast<size_t>(numbers.below(columns))] * scale;
    logits[static_cast<size_t>(numbers.below(columns))] = limit / scale;
    const float max = *std::max_element(logits.begin(), logits.end()) * scale;
    PanelMask want;
    uint64_t heavy = 0;
    for (int c = 0; c < columns; ++c) {
      const float x = logits[static_cast<size_t>(c)] * scale;
      want.above |= static_cast<uint64_t>(x > limit) << c;
      want.equal |= static_cast<uint64_t>(x == limit) << c;
      heavy |= static_cast<uint64_t>(exp_f32(x - max) >= 0.01f) << c;
    }
    const uint64_t some = numbers.next() & (want.above | want.equal);
    const PanelKept portable =
        kernel_table(Isa::kPortable).panel_mass(logits.data(), some, scale, max, 0.01f);
    double mass = 0;
    for (int c = 0; c < columns; ++c) {
      if ((some & heavy) >> c & 1) mass += exp_f32(logits[static_cast<size_t>(c)] * scale - max);
    }
    EXPECT_NEAR(portable.mass, mass, 1e-6 * mass);
    for (const Isa isa : supported_isas()) {
      const PanelMask mask = kernel_table(isa).compare_panel(logits.data(), columns, scale, limit);
      EXPECT_EQ(mask.above, want.above) << isa_name(isa) << ", " << columns;
      EXPECT_EQ(mask.equal, want.equal) << isa_name(isa) << ", " << columns;
      const PanelKept kept = kernel_table(isa).panel_mass(logits.data(), some, scale, max, 0.01f);
      EXPECT_EQ(kept.columns, some & heavy) << isa_name(isa) << ", " << columns;
      EXPECT_EQ(kept.mass, portable.mass) << isa_name(isa) << ", " << columns;
    }
  }
}

TEST(VocabularyKernels, SharesOfAListAgreeForEveryLength) {
  const FlushSubnormalsScope flush;
  Numbers numbers(15);
  for (const int64_t n : {0, 1, 15, 16, 17, 1023, 1024, 1025, 1040, 3000}) {
    const auto x = numbers.vector(n, 2.0f);
    auto weights = numbers.vector(n, 1.0f);
    for (float& weight : weights) weight = std::abs(weight);
    const float limit = 0.25f;
    int64_t count = 0;
    double weight = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      if (x[i] < limit) continue;
      ++count;
      weight += static_cast<double>(weights[i]);
    }
    const ListShare want =
        kernel_table(Isa::kPortable).share_from(x.data(), weights.data(), n, limit);
    EXPECT_NEAR(want.weight, weight, 1e-5 * weight);
    for (const Isa isa : supported_isas()) {
      const ListShare ones = kernel_table(isa).share_from(x.data(), nullptr, n, limit);
      const ListShare got = kernel_table(isa).share_from(x.data(), weights.data(), n, limit);
      EXPECT_EQ(ones.count, count);
      EXPECT_EQ(ones.weight, static_cast<double>(count));
      EXPECT_EQ(got.count, count);
      EXPECT_EQ(got.weight, want.weight) << isa_name(isa) << ", n = " << n;
    }
  }
}

TEST(VocabularyKernels, AnyNonFiniteLogitIsSeenAndNoneBeyondTheWidth) {
  for (const Isa isa : supported_isas()) {
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
          -std::numeric_limits<float>::infinity()}) {
      for (int at = 0; at < kPanelColumns; ++at) {
        std::vector<float> logits(kPanelColumns, 1.0f);
        logits[static_cast<size_t>(at)] = bad;
        EXPECT_FALSE(kernel_table(isa).all_finite(logits.data(), kPanelColumns));
        EXPECT_TRUE(kernel_table(isa).all_finite(logits.data(), at));
      }
    }
  }
}

// A product of widened operands is the product of the pairs, on every instruction set.
TEST(WidenedProducts, HaveTheBitsOfPairs) {
  const FlushSubnormalsScope flush;
  Numbers numbers(8);
  for (const int64_t steps : {1, 2, 15, 16, 17, 63, 64, 65, 130}) {
    for (int rows = 1; rows <= kTileRows; ++rows) {
      const auto a = wild_elements<uint16_t>(numbers, rows * steps * 2);
      const auto panel = wild_elements<uint16_t>(numbers, steps * 2 * kPanelColumns);
      std::vector<float> want(static_cast<size_t>(rows) * kPanelColumns);
      kernel_table(Isa::kPortable)
          .bf16.panel_product(a.data(), steps * 2, rows, panel.data(), steps, want.data(), {});
      for (const Isa isa : supported_isas()) {
        const KernelTable& kernels = kernel_table(isa);
        std::vector<float> wide_a(a.size()), wide_panel(panel.size()), got(want.size());
        kernels.widen_pairs(a.data(), rows * steps, wide_a.data());
        kernels.widen_panel(panel.data(), steps, wide_panel.data());
        kernels.f32.panel_product(wide_a.data(), steps * 2, rows, wide_panel.data(), 2 * steps,
                                  got.data(), {});
        EXPECT_EQ(bits(got), bits(want)) << isa_name(isa) << ", " << rows << " x " << steps;
      }
    }
  }
}

TEST(TileKernels, PlainAndResidualTilesAgreeForEveryWidth) {
  const FlushSubnormalsScope flush;
  Numbers numbers(6);
  const auto tile = wild_floats(numbers, kTileRows * kPanelColumns);
  const auto bias = wild_floats(numbers, kPanelColumns);
  const auto before = wild_floats(numbers, kTileRows * 70);
  for (int columns = 1; columns <= kPanelColumns; ++columns) {
    const auto run = [&](Isa isa, bool is_residual) {
      std::vector<float> out = before;
      const TileOutput output{.bias = columns % 2 == 0 ? bias.data() : nullptr,
                              .out = out.data(),
                              .stride = 70,
                              .columns = columns};
      (is_residual ? kernel_table(isa).store_residual : kernel_table(isa).store_plain)(
          tile.data(), kTileRows, output);
      return bits(out);
    };
    for (const Isa isa : vector_isas()) {
      EXPECT_EQ(run(isa, false), run(Isa::kPortable, false)) << isa_name(isa) << columns;
      EXPECT_EQ(run(isa, true), run(Isa::kPortable, true)) << isa_name(isa) << columns;
    }
  }
}

TEST(Rounding, LanesRoundToBf16AsTheScalarDoes) {
  const FlushSubnormalsScope flush;
  std::vector<float> values;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 65521) {  // prime: all low halves
    values.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  }
  for (const uint32_t edge : {0x007fffffu, 0x00800000u, 0x7f7fffffu, 0x3f808000u, 0x3f818000u}) {
    values.push_back(std::bit_cast<float>(edge));
    values.push_back(-std::bit_cast<float>(edge));
  }
  const auto n = static_cast<int64_t>(values.size());
  for (const Isa isa : supported_isas()) {
    std::vector<uint16_t> got(values.size());
    // Division by 1 changes nothing but subnormals, which rounding flushes as well.
    kernel_table(isa).bf16.divide(values.data(), 1.0f, n, got.data());
    std::vector<uint16_t> want;
    for (const float value : values) want.push_back(f32_to_bf16(value));
    EXPECT_EQ(bits(got), bits(want)) << isa_name(isa);
  }
}

}  // namespace
}  // namespace rollpack::kernels::cpu
