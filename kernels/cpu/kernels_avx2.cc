// The micro-kernels for AVX2 and FMA.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/kernel_sets.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/polynomial.h"

// Everything above is compiled for the baseline. What the pragma covers has internal linkage, so no
// function built for this instruction set can stand in for one that other files use.
#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace rollpack::kernels::cpu {
namespace {
namespace avx2 {

#include "kernels/cpu/lanes_avx2.h"
// clang-format off: each needs the one before
#include "kernels/cpu/product_bodies.h"
#include "kernels/cpu/kernel_bodies.h"
#include "kernels/cpu/attention_bodies.h"
#include "kernels/cpu/vocab_bodies.h"
#include "kernels/cpu/words_avx2.h"
#include "kernels/cpu/pack_bodies.h"
#include "kernels/cpu/make_table.h"
// clang-format on

constexpr KernelTable kTable = make_table(Isa::kAvx2);

}  // namespace avx2
}  // namespace

const KernelTable& avx2_kernels() { return avx2::kTable; }

}  // namespace rollpack::kernels::cpu

#pragma GCC pop_options
