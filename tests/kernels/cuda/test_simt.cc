// The emulation of simt.h: what it computes, and that it finds what a device would not tell.
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/cuda/simt.h"
#include "tests/kernels/rig.h"

namespace rollpack::kernels::cuda::inline emulated {
namespace {

using testing::Numbers;

// ---- kernels
// -------------------------------------------------------------------------------------

__global__ void number_threads(int* out, int per_block) {
  out[blockIdx.x * static_cast<unsigned>(per_block) + threadIdx.x] =
      static_cast<int>(blockIdx.x * 1000 + threadIdx.x);
}

// out[block] = sum of the block's values, through shared memory.
__global__ void sum_block(const float* in, float* out, bool has_barrier) {
  auto* values = reinterpret_cast<float*>(dynamic_shared());
  values[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  if (has_barrier) __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
    if (has_barrier) __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = values[0];
}

__global__ void try_shuffles(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_xor_sync(kAllLanes, lane, 5);
  out[32 + lane] = __shfl_sync(kAllLanes, lane * 10, 7);
  out[64 + lane] = __shfl_up_sync(kAllLanes, lane, 3);
  out[96 + lane] = __shfl_down_sync(kAllLanes, lane, 3);
  out[128 + lane] = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0));
  __syncwarp();
}

// acc [16, 8] = A [16, 16] B [16, 8], B given as [8][16] (its columns), both through shared memory.
__global__ void multiply(const uint16_t* a, const uint16_t* b, float* out, bool is_b_transposed) {
  auto* shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  uint16_t* const shared_b = shared + 256;
  const unsigned lane = threadIdx.x;
  cp_async_16(shared + lane * 8, a + lane * 8, true);
  if (lane < 16) cp_async_16(shared_b + lane * 8, b + lane * 8, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[4];
  // Matrices 0 .. 3: rows 0 and 8, then the same of the second eight columns.
  ldmatrix_x4(fragment_a, shared + (lane % 16) * 16 + lane / 16 * 8);
  if (is_b_transposed) {
    // B as it is, [16][8]: matrices 0 and 1 are its rows 0 and 8; 2 and 3 are not used.
    ldmatrix_x4_trans(fragment_b, shared_b + (lane % 16) * 8);
  } else {
    ldmatrix_x4(fragment_b, shared_b + (lane % 8) * 16 + lane / 8 % 2 * 8);
  }
  float acc[4] = {};
  const uint32_t pair[2] = {fragment_b[0], fragment_b[1]};
  mma_bf16_m16n8k16(acc, fragment_a, pair);
  for (unsigned i = 0; i < 4; ++i) {
    out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = acc[i];
  }
}

// Two groups of copies; reads the first where `wait` says so.
__global__ void copy_groups(const float* in, float* out, int mode) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const unsigned t = threadIdx.x;
  cp_async_16(shared + t * 4, in + t * 4, true);
  cp_async_commit();
  cp_async_16(shared + 128 + t * 4, in + 128 + t * 4, t % 2 == 0);
  cp_async_commit();
  if (mode == 1) cp_async_wait<1>();
  if (mode == 0) cp_async_wait<0>();
  for (unsigned i = 0; i < 4; ++i) {
    out[t * 4 + i] = shared[t * 4 + i];
    out[128 + t * 4 + i] = shared[128 + t * 4 + i];
  }
}

__global__ void go_wrong(int how) {
  const unsigned t = threadIdx.x;
  if (how == 0 && t < 40) return;
  if (how == 1 && t == 3) __syncwarp();
  if (how == 2) reinterpret_cast<int*>(dynamic_shared())[t] = 1;
  if (how == 3) cp_async_16(dynamic_shared() + 8, nullptr, false);
  if (how == 4) __shfl_xor_sync(0xffffu, 1, 1);
  if (how == 5) {
    uint32_t r[4];
    ldmatrix_x4(r, dynamic_shared() + 64);
  }
  if (how == 6 && t == 5) {
    __syncwarp();
  } else if (how == 6) {
    __shfl_xor_sync(kAllLanes, 1, 1);
  }
  __syncthreads();
}

// ---- tests
// ---------------------------------------------------------------------------------------

TEST(Simt, EveryThreadOfEveryBlockRunsOnce) {
  std::vector<int> got(5 * 64, -1);
  launch(number_threads, {.kernel = "number_threads", .grid = {5}, .block = 64}, {}, got.data(),
         64);
  for (int i = 0; i < 5 * 64; ++i) EXPECT_EQ(got[i], i / 64 * 1000 + i % 64);
}

TEST(Simt, BarriersOrderSharedMemory) {
  const std::vector<float> in = Numbers(1).vector(3 * 256);
  std::vector<float> out(3);
  launch(sum_block, {.kernel = "sum_block", .grid = {3}, .block = 256, .shared_bytes = 1024}, {},
         in.data(), out.data(), true);
  for (int block = 0; block < 3; ++block) {
    const auto first = in.begin() + block * 256;
    EXPECT_NEAR(out[block], std::accumulate(first, first + 256, 0.0), 1e-4);
  }
}

TEST(Simt, MissingBarriersShowUnderSomeSeed) {
  const std::vector<float> in = Numbers(1).vector(256);
  const double want = std::accumulate(in.begin(), in.end(), 0.0);
  int num_wrong = 0;
  for (uint64_t seed = 0; seed < 4; ++seed) {
    emulation::set_seed(seed);
    float out = 0;
    launch(sum_block, {.kernel = "sum_block", .block = 256, .shared_bytes = 1024}, {}, in.data(),
           &out, false);
    num_wrong += !(std::abs(out - want) < 1e-4);
  }
  EXPECT_GT(num_wrong, 0);
}

TEST(Simt, WarpsExchangeValues) {
  std::vector<int> got(160);
  launch(try_shuffles, {.kernel = "try_shuffles"}, {}, got.data());
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT_EQ(got[lane], lane ^ 5);
    EXPECT_EQ(got[32 + lane], 70);
    EXPECT_EQ(got[64 + lane], lane < 3 ? lane : lane - 3);
    EXPECT_EQ(got[96 + lane], lane > 28 ? lane : lane + 3);
    EXPECT_EQ(static_cast<unsigned>(got[128 + lane]), 0x49249249u);
  }
}

TEST(Simt, FragmentsMeetInTheProduct) {
  Numbers numbers(2);
  std::vector<uint16_t> a(256), columns(128), rows(128);
  for (uint16_t& value : a) value = f32_to_bf16(static_cast<float>(numbers.below(9) - 4));
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < 8; ++n) {
      columns[n * 16 + k] = rows[k * 8 + n] = f32_to_bf16(static_cast<float>(numbers.below(9) - 4));
    }
  }
  for (const bool is_transposed : {false, true}) {
    std::vector<float> got(128);
    launch(multiply, {.kernel = "multiply", .shared_bytes = 768}, {}, a.data(),
           is_transposed ? rows.data() : columns.data(), got.data(), is_transposed);
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        float want = 0;
        for (int k = 0; k < 16; ++k) {
          want += bf16_to_f32(a[m * 16 + k]) * bf16_to_f32(rows[k * 8 + n]);
        }
        EXPECT_EQ(got[m * 8 + n], want) << "row " << m << ", column " << n;
      }
    }
  }
}

TEST(Simt, CopiesArriveWhenTheyAreWaitedFor) {
  alignas(16) float in[256];
  std::iota(in, in + 256, 1.0f);
  for (const int mode : {0, 1, 2}) {
    std::vector<float> out(256);
    launch(copy_groups, {.kernel = "copy_groups", .shared_bytes = 1024}, {}, &in[0], out.data(),
           mode);
    for (int i = 0; i < 128; ++i) {
      // Neighbouring threads may not have asked yet: what each reads is its own.
      if (mode <= 1)
        EXPECT_EQ(out[i], in[i]);
      else
        EXPECT_TRUE(std::isnan(out[i]));
      if (mode == 0)
        EXPECT_EQ(out[128 + i], i / 4 % 2 == 0 ? in[128 + i] : 0.0f);
      else
        EXPECT_TRUE(std::isnan(out[128 + i]));
    }
  }
}

TEST(Simt, WhatHangsOrIsUndefinedIsAnErrorThatNamesThePlace) {
  const auto text_of = [](int how) {
    return testing::error_text([how] {
      launch(go_wrong, {.kernel = "go_wrong", .block = 64, .shared_bytes = 128}, {}, how);
    });
  };
  const auto expect_says = [&](int how, const std::string& part) {
    const std::string text = text_of(how);
    EXPECT_NE(text.find("kernel go_wrong, block (0, 0, 0)"), std::string::npos) << text;
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  for (int repeat = 0; repeat < 3; ++repeat) {  // a failed launch leaves nothing behind
    expect_says(0, "40 threads have ended");
    expect_says(1, "1 threads wait at __syncwarp");
    expect_says(2, "of shared memory was written; the launch asks for 128");
    expect_says(3, "cp.async at byte 8 of 128");
    expect_says(4, "less than a whole warp");
    expect_says(6, "wait at __shfl_xor_sync");
  }
  launch(go_wrong, {.kernel = "go_wrong", .block = 64, .shared_bytes = 128}, {}, 5);
  EXPECT_NE(testing::error_text([] {
              launch(go_wrong, {.kernel = "go_wrong", .block = 33}, {}, 9);
            }).find("no legal shape"),
            std::string::npos);
}

}  // namespace
}  // namespace rollpack::kernels::cuda::inline emulated
