// The instruction sets that kernels are built for, and which of them this machine can run.
#pragma once

#include <string_view>
#include <vector>

namespace rollpack::kernels::cpu {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// "portable", "avx2", "avx512" or "avx512_bf16".
std::string_view isa_name(Isa isa);

// Those this machine and its operating system support, best first; kPortable is always the last.
std::vector<Isa> supported_isas();

}  // namespace rollpack::kernels::cpu
