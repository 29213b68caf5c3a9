#include "kernels/machine_limits.h"

#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

namespace rollpack::kernels {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kNumBursts = 5;
constexpr auto kBurst = std::chrono::milliseconds(200);
constexpr int kNumChains = 24;       // covers latency 6 x 2 issues a cycle, with room to spare
constexpr int64_t kRounds = 100000;  // 24 chains at 3 GHz: about 1 ms between looks at the clock
constexpr int kNumEstimates = 20;    // rounds of each thread for an estimate: some 10 ms
constexpr int64_t kReadBytes = int64_t{1} << 30;

// Each returns how many FLOPs `kRounds` rounds took; `sink` keeps the chains alive.
__attribute__((target("avx512f,avx512bf16"))) double burst_avx512_bf16(float* sink) {
  __m512 acc[kNumChains];
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = (__m512bh)_mm512_set1_epi16(0);
  for (auto& chain : acc) chain = _mm512_setzero_ps();
  for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kNumChains; ++c) acc[c] = _mm512_dpbf16_ps(acc[c], a, b);
  }
  for (const auto& chain : acc) *sink += _mm512_reduce_add_ps(chain);
  return double{kRounds} * kNumChains * 64;
}

__attribute__((target("avx512f"))) double burst_avx512(float* sink) {
  __m512 acc[kNumChains];
  const __m512 a = _mm512_set1_ps(*sink), b = _mm512_set1_ps(*sink);
  for (auto& chain : acc) chain = _mm512_setzero_ps();
  for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kNumChains; ++c) acc[c] = _mm512_fmadd_ps(a, b, acc[c]);
  }
  for (const auto& chain : acc) *sink += _mm512_reduce_add_ps(chain);
  return double{kRounds} * kNumChains * 32;
}

__attribute__((target("avx2,fma"))) double burst_avx2(float* sink) {
  constexpr int kChains = 12;  // there are 16 ymm registers
  __m256 acc[kChains];
  const __m256 a = _mm256_set1_ps(*sink), b = _mm256_set1_ps(*sink);
  for (auto& chain : acc) chain = _mm256_setzero_ps();
  for (int64_t i = 0; i < 2 * kRounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) acc[c] = _mm256_fmadd_ps(a, b, acc[c]);
  }
  float lanes[8];
  for (const auto& chain : acc) {
    _mm256_storeu_ps(lanes, chain);
    *sink += lanes[0];
  }
  return double{2 * kRounds} * kChains * 16;
}

double burst_scalar(float* sink) {
  float acc[8] = {};
  for (int64_t i = 0; i < kRounds; ++i) {
    for (float& chain : acc) chain = chain * 0.5f + *sink;
  }
  for (const float chain : acc) *sink += chain * 0.0f;
  return double{kRounds} * 8 * 2;
}

using Burst = double (*)(float*);

// Some processors take a pair's instruction half as often as two FMAs: what they can do at most is
// the faster way of the two.
Burst faster_of(Burst a, Burst b) {
  const auto rate_of = [](Burst burst) {
    float sink = 0;
    double best = 0;
    for (int call = 0; call < 3; ++call) {
      const auto start = Clock::now();
      const double flops = burst(&sink);
      best = std::max(best, flops / std::chrono::duration<double>(Clock::now() - start).count());
    }
    asm volatile("" : : "g"(&sink) : "memory");
    return best;
  };
  return rate_of(a) >= rate_of(b) ? a : b;
}

Burst pick_burst(DType dtype, RegisterWidth width) {
  const bool has_ymm = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (width == RegisterWidth::kYmm && has_ymm) return burst_avx2;
  if (dtype == DType::kBF16 && __builtin_cpu_supports("avx512bf16")) {
    static const Burst burst = faster_of(burst_avx512_bf16, burst_avx512);
    return burst;
  }
  if (__builtin_cpu_supports("avx512f")) return burst_avx512;
  if (has_ymm) return burst_avx2;
  return burst_scalar;
}

// Sums `count` words, a multiple of kWordsPerRound, in as many chains as hide an addition: the
// loads are all there is to wait for.
constexpr int64_t kWordsPerRound = 64;

__attribute__((target("avx512f"))) uint64_t read_avx512(const uint64_t* words, int64_t count) {
  __m512i sums[8];
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += kWordsPerRound) {
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) {
      sums[c] = _mm512_add_epi64(sums[c], _mm512_loadu_si512(words + i + 8 * c));
    }
  }
  uint64_t total = 0;
  for (const auto& sum : sums) total += static_cast<uint64_t>(_mm512_reduce_add_epi64(sum));
  return total;
}

__attribute__((target("avx2"))) uint64_t read_avx2(const uint64_t* words, int64_t count) {
  __m256i sums[8];
  for (auto& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += kWordsPerRound / 2) {
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) {
      const auto* at = reinterpret_cast<const __m256i*>(words + i + 4 * c);
      sums[c] = _mm256_add_epi64(sums[c], _mm256_loadu_si256(at));
    }
  }
  uint64_t lanes[4], total = 0;
  for (const auto& sum : sums) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sum);
    for (const uint64_t lane : lanes) total += lane;
  }
  return total;
}

uint64_t read_scalar(const uint64_t* words, int64_t count) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i < count; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += words[i + lane];
  }
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}

uint64_t (*pick_read())(const uint64_t*, int64_t) {
  if (__builtin_cpu_supports("avx512f")) return read_avx512;
  if (__builtin_cpu_supports("avx2")) return read_avx2;
  return read_scalar;
}

void on_threads(int32_t num_threads, const std::function<void(int32_t)>& body) {
  std::vector<std::jthread> threads;
  for (int32_t i = 0; i < num_threads; ++i) threads.emplace_back(body, i);
}

}  // namespace

double measure_peak_flops(DType dtype, int32_t num_threads, RegisterWidth width) {
  double (*const burst)(float*) = pick_burst(dtype, width);
  double best = 0;
  for (int attempt = 0; attempt < kNumBursts; ++attempt) {
    std::vector<double> rates(num_threads);
    on_threads(num_threads, [&](int32_t thread) {
      float sink = 0;
      double flops = 0;
      const auto start = Clock::now();
      while (Clock::now() - start < kBurst) flops += burst(&sink);
      rates[thread] = flops / std::chrono::duration<double>(Clock::now() - start).count();
      asm volatile("" : : "g"(&sink) : "memory");
    });
    double total = 0;
    for (const double rate : rates) total += rate;
    best = std::max(best, total);
  }
  return best;
}

double measure_read_bandwidth(int32_t num_threads) {
  void* memory =
      ::mmap(nullptr, kReadBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 0;
  ::madvise(memory, kReadBytes, MADV_HUGEPAGE);
  auto* const words = static_cast<uint64_t*>(memory);
  const int64_t share = kReadBytes / 8 / num_threads / kWordsPerRound * kWordsPerRound;
  on_threads(num_threads, [&](int32_t thread) { std::fill_n(words + thread * share, share, 1); });
  uint64_t (*const read)(const uint64_t*, int64_t) = pick_read();
  double best = 0;
  for (int attempt = 0; attempt < kNumBursts; ++attempt) {
    const auto start = Clock::now();
    on_threads(num_threads, [&](int32_t thread) {
      const uint64_t sum = read(words + thread * share, share);
      asm volatile("" : : "g"(&sum) : "memory");
    });
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    best = std::max(best, static_cast<double>(share * 8 * num_threads) / seconds);
  }
  ::munmap(memory, kReadBytes);
  return best;
}

MachineLimits measure_machine_limits(DType dtype, int32_t num_threads) {
  return {.peak_flops = measure_peak_flops(dtype, num_threads),
          .read_bandwidth_bytes_per_s = measure_read_bandwidth(num_threads)};
}

double estimate_peak_flops(DType dtype, int32_t num_threads) {
  double (*const burst)(float*) = pick_burst(dtype, RegisterWidth::kWidest);
  std::vector<double> rates(num_threads);
  on_threads(num_threads, [&](int32_t thread) {
    float sink = 0;
    for (int call = 0; call < kNumEstimates; ++call) {
      const auto start = Clock::now();
      const double flops = burst(&sink);
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      rates[thread] = std::max(rates[thread], flops / seconds);
    }
    asm volatile("" : : "g"(&sink) : "memory");
  });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

}  // namespace rollpack::kernels
