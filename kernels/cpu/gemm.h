// Products of activations with packed weights: one driver over the micro-kernels. Threads claim
// (panel, block of rows) pairs; no sum over k is ever split, so neither threads nor the number of
// rows change a bit.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/packing.h"
#include "kernels/cpu/panel_products.h"
#include "kernels/cpu/row_tiles.h"
#include "kernels/cpu/thread_pool.h"

namespace rollpack::kernels::cpu {

// Returns a view of `in`, copied into `scratch` (which keeps its capacity) if its rows do not end
// on a whole step.
template <class Element>
InputRows<Element> whole_steps(const Tensor& in, std::vector<Element>& scratch);

struct GemmArgs {
  PackedMatrix weight;
  Epilogue epilogue = Epilogue::kNone;
  const float* bias = nullptr;  // [N], or none
  void* out = nullptr;          // [rows, N] f32, gated: [rows, N] compute dtype
  int64_t out_stride = 0;       // elements from row to row of out
};

template <class Element>
void gemm(const KernelTable& kernels, ThreadPool& pool, PanelProducts<Element>& products,
          const InputRows<Element>& in, const GemmArgs& args);

}  // namespace rollpack::kernels::cpu
