// The micro-kernels in plain C++: for x86-64 without AVX2, and the oracle of the vector paths.
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/cpu/kernel_sets.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/polynomial.h"

namespace rollpack::kernels::cpu {
namespace {
namespace portable {

#include "kernels/cpu/lanes_portable.h"
// clang-format off: each needs the one before
#include "kernels/cpu/product_bodies.h"
#include "kernels/cpu/kernel_bodies.h"
#include "kernels/cpu/attention_bodies.h"
#include "kernels/cpu/vocab_bodies.h"
#include "kernels/cpu/words_portable.h"
#include "kernels/cpu/pack_bodies.h"
#include "kernels/cpu/make_table.h"
// clang-format on

constexpr KernelTable kTable = make_table(Isa::kPortable);

}  // namespace portable
}  // namespace

const KernelTable& portable_kernels() { return portable::kTable; }

}  // namespace rollpack::kernels::cpu
