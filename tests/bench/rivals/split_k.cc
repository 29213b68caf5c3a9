#include "tests/bench/rivals/split_k.h"

#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

namespace rollpack::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kColumns = 64;  // of a panel: four registers
constexpr int64_t kTileRows = 6;  // 24 sums, 4 weights, 1 input of 32 registers
constexpr int64_t kSlices = 2;    // of K: one a thread of a machine like this
constexpr int64_t kHugePage = int64_t{2} << 20;

// out[r][n] = sum over `steps` pairs of in and panel, n < 64.
template <int kRows>
__attribute__((target("avx512f,avx512bw,avx512bf16"))) void tile_product(const uint16_t* in,
                                                                         int64_t in_stride,
                                                                         const uint16_t* panel,
                                                                         int64_t steps, float* out,
                                                                         int64_t out_stride) {
  __m512 sums[kRows][4];
  for (auto& row : sums) {
    for (auto& sum : row) sum = _mm512_setzero_ps();
  }
  for (int64_t step = 0; step < steps; ++step) {
    __m512bh weights[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      weights[c] = (__m512bh)_mm512_loadu_si512(panel + step * 2 * kColumns + c * 32);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, in + r * in_stride + 2 * step, sizeof pair);
      const auto input = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], input, weights[c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < 4; ++c) _mm512_storeu_ps(out + r * out_stride + 16 * c, sums[r][c]);
  }
}

using TileProduct = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, float*, int64_t);
constexpr TileProduct kTileProducts[kTileRows] = {tile_product<1>, tile_product<2>,
                                                  tile_product<3>, tile_product<4>,
                                                  tile_product<5>, tile_product<6>};

}  // namespace

bool SplitKGemm::is_supported() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
}

SplitKGemm::SplitKGemm(int64_t N, int64_t K_in, const std::vector<uint16_t>& weight,
                       int num_weights, int num_threads)
    : N_(N),
      K_in_(K_in),
      num_weights_(num_weights),
      pool_(num_threads),
      weight_elements_(N * K_in) {
  const int64_t bytes = weight_elements_ * num_weights * 2;
  panels_ = static_cast<uint16_t*>(
      std::aligned_alloc(kHugePage, (bytes + kHugePage - 1) / kHugePage * kHugePage));
  if (panels_ == nullptr) throw std::bad_alloc();
  ::madvise(panels_, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  for (int64_t n = 0; n < N; ++n) {
    uint16_t* const panel = panels_ + n / kColumns * kColumns * K_in;
    for (int64_t k = 0; k < K_in; ++k) {
      panel[k / 2 * 2 * kColumns + n % kColumns * 2 + k % 2] =
          weight[static_cast<size_t>(n * K_in + k)];
    }
  }
  for (int i = 1; i < num_weights; ++i) {
    std::memcpy(panels_ + i * weight_elements_, panels_, static_cast<size_t>(weight_elements_) * 2);
  }
}

SplitKGemm::~SplitKGemm() {
  std::free(panels_);
}

double SplitKGemm::run(const uint16_t* in, int64_t rows, float* out) {
  partial_.resize(static_cast<size_t>((kSlices - 1) * rows * N_));
  const auto start = Clock::now();
  for (int i = 0; i < num_weights_; ++i) {
    multiply(in, rows, panels_ + i * weight_elements_, out);
  }
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void SplitKGemm::multiply(const uint16_t* in, int64_t rows, const uint16_t* panels, float* out) {
  const int64_t steps = K_in_ / 2;
  const int64_t num_tiles = (rows + kTileRows - 1) / kTileRows;
  pool_.parallel_for(N_ / kColumns * kSlices, [&](int64_t task, int) {
    // Slice by slice, so that each thread streams through panels in the order of memory.
    const int64_t slice = task / (N_ / kColumns), panel = task % (N_ / kColumns);
    const int64_t begin = steps * slice / kSlices, end = steps * (slice + 1) / kSlices;
    float* const sums = slice == 0 ? out : partial_.data() + (slice - 1) * rows * N_;
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t row = rows * t / num_tiles, next = rows * (t + 1) / num_tiles;
      kTileProducts[next - row - 1](in + row * K_in_ + 2 * begin, K_in_,
                                    panels + (panel * steps + begin) * 2 * kColumns, end - begin,
                                    sums + row * N_ + panel * kColumns, N_);
    }
  });
  const int64_t num_blocks = (rows * N_ + 4095) / 4096;
  pool_.parallel_for(num_blocks, [&](int64_t block, int) {
    const int64_t end = std::min(rows * N_, (block + 1) * 4096);
    for (int64_t slice = 1; slice < kSlices; ++slice) {
      const float* const sums = partial_.data() + (slice - 1) * rows * N_;
      for (int64_t i = block * 4096; i < end; ++i) out[i] += sums[i];
    }
  });
}

}  // namespace rollpack::bench
