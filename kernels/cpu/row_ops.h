// Ops whose rows are independent and small: embedding, RMS norm, rotation and KV append. Threads
// claim rows.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/kv_pages.h"
#include "kernels/cpu/packing.h"
#include "kernels/cpu/step_context.h"
#include "kernels/cpu/thread_pool.h"

namespace rollpack::kernels::cpu {

// out[t] = packed column token(t), as f32; 0 where token(t) is not one of `held`, whose columns
// `embedding` has.
void embed_rows(ThreadPool& pool, const StepContext& step, const PackedMatrix& embedding,
                ShardRange held, const Tensor& out);

template <class Element>
void rms_norm_rows(const KernelTable& kernels, ThreadPool& pool, const float* weight, float epsilon,
                   const Tensor& in, const Tensor& out);

// What rope_append needs besides its Args: norm weights found, or null.
struct RopeAppendInputs {
  const float* q_norm = nullptr;  // [K]
  const float* k_norm = nullptr;
};

template <class Element>
void rope_append_rows(const KernelTable& kernels, ThreadPool& pool, StepContext& step,
                      const ModelShape& shape, const KvPages& pages, const RopeAppendArgs& args,
                      const RopeAppendInputs& inputs);

// The plan's page copies, in order.
void copy_pages(ThreadPool& pool, const StepPlan& plan, const KvPages& pages);

}  // namespace rollpack::kernels::cpu
