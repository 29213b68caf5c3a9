#include "kernels/cpu/kernel_table.h"

#include "kernels/cpu/kernel_sets.h"

namespace rollpack::kernels::cpu {

const KernelTable& kernel_table(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16: return avx512_bf16_kernels();
    case Isa::kAvx512: return avx512_kernels();
    case Isa::kAvx2: return avx2_kernels();
    case Isa::kPortable: break;
  }
  return portable_kernels();
}

}  // namespace rollpack::kernels::cpu
