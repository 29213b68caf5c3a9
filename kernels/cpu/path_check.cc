#include "kernels/cpu/path_check.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/cpu/amx.h"
#include "kernels/cpu/float_mode.h"

namespace rollpack::kernels::cpu {
namespace {

constexpr int kRows = 4;  // of one call
constexpr int kCallTriples = kRows * kPanelColumns;
static_assert(kCheckedTriples % kCallTriples == 0);

// Bits of a finite float of every kind: of ordinary size, about the smallest normal and below it,
// with products about it, and zeros of both signs. The generator is splitmix64.
class Triples {
 public:
  float next() {
    const auto bits = static_cast<uint32_t>(word() >> 16);
    const uint32_t sign_and_fraction = bits & 0x807fffffu;
    switch (word() % 8) {
      case 0:
        return std::bit_cast<float>(sign_and_fraction);  // subnormal
      case 1:
        return std::bit_cast<float>(sign_and_fraction | 1u << 23);  // 2^-126
      case 2:
        return std::bit_cast<float>(sign_and_fraction | (64u - 1u) << 23);  // 2^-64
      case 3:
        return std::bit_cast<float>(bits & 0x80000000u);
      default:
        return std::bit_cast<float>(sign_and_fraction | (120u + (bits >> 8 & 15u)) << 23);
    }
  }

 private:
  uint64_t word() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  uint64_t state_ = 1;
};

template <class Element>
Element element(float value) {
  if constexpr (sizeof(Element) == 2) {
    return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);  // keeps subnormals
  } else {
    return value;
  }
}

float scalar_step(const uint16_t* a, const uint16_t* b, float sum) {
  const float odd = std::fmaf(bf16_to_f32(a[1]), bf16_to_f32(b[1]), sum);
  return std::fmaf(bf16_to_f32(a[0]), bf16_to_f32(b[0]), odd);
}
float scalar_step(const float* a, const float* b, float sum) {
  return std::fmaf(*a, *b, sum);
}

bool is_same(float got, float want) {
  return std::bit_cast<uint32_t>(got) == std::bit_cast<uint32_t>(want) ||
         (std::isnan(got) && std::isnan(want));
}

template <class Element>
bool agrees_on_products(const KernelTable& kernels) {
  constexpr int kWidth = sizeof(Element) == 2 ? 2 : 1;
  Triples triples;
  for (int done = 0; done < kCheckedTriples; done += kCallTriples) {
    Element a[kRows * kWidth], panel[kPanelColumns * kWidth];
    alignas(64) float want[kCallTriples], got[kCallTriples];
    for (Element& x : a) x = element<Element>(triples.next());
    for (Element& x : panel) x = element<Element>(triples.next());
    for (float& x : got) x = triples.next();
    for (int i = 0; i < kCallTriples; ++i) {
      want[i] =
          scalar_step(a + i / kPanelColumns * kWidth, panel + i % kPanelColumns * kWidth, got[i]);
    }
    kernels.of<Element>().panel_product(a, kWidth, kRows, panel, 1, got, {.continues = true});
    for (int i = 0; i < kCallTriples; ++i) {
      if (!is_same(got[i], want[i])) return false;
    }
    uint16_t rounded[kCallTriples];
    kernels.bf16.round_row(want, kCallTriples, rounded);
    for (int i = 0; i < kCallTriples; ++i) {
      if (!is_same(bf16_to_f32(rounded[i]), bf16_to_f32(f32_to_bf16(want[i])))) return false;
    }
  }
  return true;
}

}  // namespace

bool agrees_with_scalar(const KernelTable& kernels) {
  const FlushSubnormalsScope flush;
  return agrees_on_products<uint16_t>(kernels) && agrees_on_products<float>(kernels);
}

bool amx_agrees_with_scalar() {
  const FlushSubnormalsScope flush;
  constexpr int64_t kMaxSteps = 3 * kAmxSliceSteps - 1;
  Triples triples;
  const auto next = [&] { return element<uint16_t>(triples.next()); };
  std::vector<uint16_t> a(kAmxTileRows * 2 * kMaxSteps), panel(kMaxSteps * 2 * kPanelColumns);
  alignas(64) float sums[kAmxTileRows * kPanelColumns];
  for (int64_t steps = 1; steps <= kMaxSteps; ++steps) {
    std::ranges::generate(a, next);
    std::ranges::generate(panel, next);
    const int rows = 1 + static_cast<int>(steps * 7 % kAmxTileRows);
    AmxTiles().panel_product(a.data(), 2 * steps, rows, panel.data(), steps, sums, {});
    for (int i = 0; i < rows * kPanelColumns; ++i) {
      const uint16_t* const row = a.data() + i / kPanelColumns * 2 * steps;
      if (!is_same(sums[i], amx_sum(row, panel.data(), i % kPanelColumns, steps, 0))) return false;
    }
  }
  return true;
}

PathChoice choose_path(std::span<const KernelTable* const> candidates) {
  PathChoice choice;
  for (const KernelTable* kernels : candidates) {
    choice.kernels = kernels;
    if (kernels == candidates.back() || agrees_with_scalar(*kernels)) break;
    if (!choice.refused.empty()) choice.refused += ", ";
    choice.refused += isa_name(kernels->isa);
  }
  return choice;
}

}  // namespace rollpack::kernels::cpu
