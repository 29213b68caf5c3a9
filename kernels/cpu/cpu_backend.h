// The CPU implementation of Backend: bf16 or f32 on x86-64, the same bits on every instruction set.
// Numerics, layouts and recipes: kernels/cpu/README.md.
#pragma once

#include <memory>
#include <optional>

#include "kernels/backend.h"
#include "kernels/cpu/isa.h"

namespace rollpack::kernels {

struct CpuOptions {
  // Instruction set of the micro-kernels, one of cpu::supported_isas(); none: the best of them.
  std::optional<cpu::Isa> isa;
};

// Errors: unsupported for a dtype, head width or instruction set it cannot run; invalid_argument
// for sizes that are not positive; resource_exhausted naming the bytes of a page.
std::unique_ptr<Backend> make_cpu_backend(const ModelShape& shape, const BackendOptions& options);
std::unique_ptr<Backend> make_cpu_backend(const ModelShape& shape, const BackendOptions& options,
                                          const CpuOptions& cpu_options);

}  // namespace rollpack::kernels
