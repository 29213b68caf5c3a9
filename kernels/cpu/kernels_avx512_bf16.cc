// The micro-kernels for AVX-512 with BF16 products (Zen 4, Sapphire Rapids and later).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/kernel_sets.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/polynomial.h"

// Everything above is compiled for the baseline. What the pragma covers has internal linkage, so no
// function built for this instruction set can stand in for one that other files use.
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace rollpack::kernels::cpu {
namespace {
namespace avx512_bf16 {

// clang-format off: each needs the one before
#include "kernels/cpu/lanes_avx512.h"
#include "kernels/cpu/lanes_avx512_bf16.h"
#include "kernels/cpu/product_bodies.h"
#include "kernels/cpu/kernel_bodies.h"
#include "kernels/cpu/attention_bodies.h"
#include "kernels/cpu/vocab_bodies.h"
#include "kernels/cpu/words_avx512.h"
#include "kernels/cpu/pack_bodies.h"
#include "kernels/cpu/make_table.h"
// clang-format on

constexpr KernelTable kTable = make_table(Isa::kAvx512Bf16);

}  // namespace avx512_bf16
}  // namespace

const KernelTable& avx512_bf16_kernels() {
  return avx512_bf16::kTable;
}

}  // namespace rollpack::kernels::cpu

#pragma GCC pop_options
