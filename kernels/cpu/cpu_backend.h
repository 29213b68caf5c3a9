// The CPU implementation of Backend: bf16 or f32 on x86-64, the same bits on every instruction set;
// by AMX, where BackendOptions::cpu_amx asks for it, other bits.
// Numerics, layouts and recipes: kernels/cpu/README.md.
#pragma once

#include <functional>
#include <memory>
#include <optional>

#include "kernels/backend.h"
#include "kernels/cpu/isa.h"

namespace rollpack::kernels {

namespace cpu {
class KvPages;
}

struct CpuOptions {
  // Instruction set of the micro-kernels, one of cpu::supported_isas(); none: the best of them.
  std::optional<cpu::Isa> isa;
  // Whether products of many rows run on operands widened to f32 (panel_products.h); none: where
  // that is found to be faster at construction. Changes no bit.
  std::optional<bool> widens_products;
  // Called in every step after its page copies and before its rows, for tests that fill what no row
  // may read.
  std::function<void(const StepPlan& plan, const cpu::KvPages& pages)> before_rows = {};
};

// Errors: unsupported for a dtype, head width or instruction set it cannot run, AMX included;
// invalid_argument for sizes that are not positive; resource_exhausted naming the bytes of a page.
std::unique_ptr<Backend> make_cpu_backend(const ModelShape& shape, const BackendOptions& options);
std::unique_ptr<Backend> make_cpu_backend(const ModelShape& shape, const BackendOptions& options,
                                          const CpuOptions& cpu_options);

}  // namespace rollpack::kernels
