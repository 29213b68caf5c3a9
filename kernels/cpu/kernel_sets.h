// The tables of the instruction sets, one file each; kernel_table() chooses among them.
#pragma once

namespace rollpack::kernels::cpu {

struct KernelTable;

const KernelTable& portable_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512_bf16_kernels();

}  // namespace rollpack::kernels::cpu
