// The product as it would be if bits did not have to be the same for every number of rows: K in
// slices that threads claim apart, partial sums in memory, added at the end. Here only to show what
// it would gain.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/thread_pool.h"

namespace rollpack::bench {

class SplitKGemm {
 public:
  // Whether this machine has the instructions (AVX-512 BF16).
  static bool is_supported();

  // Packs num_weights matrices of `weight` [N, K_in] bf16; N a multiple of 64, K_in of 4.
  SplitKGemm(int64_t N, int64_t K_in, const std::vector<uint16_t>& weight, int num_weights,
             int num_threads);
  ~SplitKGemm();
  SplitKGemm(const SplitKGemm&) = delete;
  SplitKGemm& operator=(const SplitKGemm&) = delete;

  // out [rows, N] f32 = in [rows, K_in] bf16 x every weight, one after the other.
  // Returns: seconds of all of them together.
  double run(const uint16_t* in, int64_t rows, float* out);

 private:
  void multiply(const uint16_t* in, int64_t rows, const uint16_t* panels, float* out);

  int64_t N_, K_in_;
  int num_weights_;
  kernels::cpu::ThreadPool pool_;
  uint16_t* panels_ = nullptr;  // [weights][N / 64][K_in / 2][64][2], in 2 MiB pages
  int64_t weight_elements_ = 0;
  std::vector<float> partial_;  // [slices - 1][rows][N]
};

}  // namespace rollpack::bench
