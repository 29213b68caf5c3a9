#include "kernels/cpu/row_ops.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "kernels/base/error.h"

namespace rollpack::kernels::cpu {
namespace {

// Rows of one task: claiming it costs some 0.1 us, as much as a row of a norm.
constexpr int64_t kRowsPerTask = 8;

// Calls body(begin, end) for all rows, some rows a task.
template <class Body>
void for_row_ranges(ThreadPool& pool, int64_t num_rows, Body&& body) {
  // Few rows are still shared out among the threads.
  const int64_t per_task =
      std::clamp<int64_t>(num_rows / (2 * pool.num_threads()), 1, kRowsPerTask);
  pool.parallel_for((num_rows + per_task - 1) / per_task, [&](int64_t task, int) {
    body(task * per_task, std::min((task + 1) * per_task, num_rows));
  });
}

// Calls body(row) for every row.
template <class Body>
void for_rows(ThreadPool& pool, int64_t num_rows, Body&& body) {
  for_row_ranges(pool, num_rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

template <class Element>
class RopeRow {
 public:
  RopeRow(const KernelTable& kernels, StepContext& step, const ModelShape& shape,
          const KvPages& pages, const RopeAppendArgs& args, const RopeAppendInputs& inputs)
      : kernels_(kernels),
        of_(kernels.of<Element>()),
        step_(step),
        shape_(shape),
        pages_(pages),
        args_(args),
        inputs_(inputs) {}

  // What a row writes to comes to this core while the row before it is computed.
  void run(int64_t begin, int64_t end) const {
    prefetch(begin);
    for (int64_t row = begin; row < end; ++row) {
      if (row + 1 < end) prefetch(row + 1);
      run(row);
    }
  }

 private:
  void prefetch(int64_t row) const {
    const int32_t position = step_.plan().positions[static_cast<size_t>(row)];
    if (position == kPadPosition) return;
    for (int64_t g = 0; g < shape_.G; ++g) {
      pages_.prefetch(step_.page_of(row), args_.layer, g, position % kPageTokens);
    }
  }

  void run(int64_t row) const {
    const int64_t K = shape_.K;
    Element* q = args_.q.as<Element>() + row * shape_.H * K;
    const int32_t position = step_.plan().positions[static_cast<size_t>(row)];
    if (position == kPadPosition) {
      std::fill_n(q, shape_.H * K, Element{});
      return;
    }
    const float* in = args_.qkv.as<float>() + row * (shape_.H + 2 * shape_.G) * K;
    const float* table = args_.rope_table.as<float>() + position * K;
    for (int64_t h = 0; h < shape_.H; ++h) {
      transform(in + h * K, inputs_.q_norm, table, q + h * K);
    }
    append(row, position, in + shape_.H * K, table);
  }

  bool transform(const float* in, const float* norm, const float* table, Element* out) const {
    float normed[kMaxHeadWidth];
    if (norm != nullptr) {
      kernels_.f32.rms_norm(in, norm, shape_.K, args_.norm_epsilon, normed);
      in = normed;
    }
    return of_.rotate_head(in, table, shape_.K, out);
  }

  // K and V heads of a row into its page slot. Two tokens of a pair share 4 bytes of a page, so the
  // writes are of single elements: the neighbour may be another thread's row.
  void append(int64_t row, int32_t position, const float* in, const float* table) const {
    const int64_t K = shape_.K;
    const int32_t page = step_.page_of(row);
    const int32_t slot = position % kPageTokens;
    const float* v_in = in + shape_.G * K;
    Element k[kMaxHeadWidth], v[kMaxHeadWidth];
    bool is_row_finite = true;
    for (int64_t g = 0; g < shape_.G; ++g) {
      is_row_finite =
          transform(in + g * K, inputs_.k_norm, table, k) && of_.round_row(v_in + g * K, K, v);
      if (!is_row_finite) break;
      pages_.write(page, args_.layer, g, slot, k, v);
    }
    if (is_row_finite) return;
    step_.fail_row(row);
    std::fill_n(k, K, Element{});
    std::fill_n(v, K, Element{});
    for (int64_t g = 0; g < shape_.G; ++g) pages_.write(page, args_.layer, g, slot, k, v);
  }

  const KernelTable& kernels_;
  const ElementKernels<Element>& of_;
  StepContext& step_;
  const ModelShape& shape_;
  const KvPages& pages_;
  const RopeAppendArgs& args_;
  const RopeAppendInputs& inputs_;
};

}  // namespace

void embed_rows(ThreadPool& pool, const StepContext& step, const PackedMatrix& embedding,
                ShardRange held, const Tensor& out) {
  for_rows(pool, out.rows(), [&](int64_t row) {
    const int32_t token = step.token(row);
    float* const values = out.as<float>() + row * out.cols();
    if (token >= held.begin && token < held.end) {
      gather_column(embedding, token - held.begin, values);
    } else {
      std::fill_n(values, out.cols(), 0.0f);
    }
  });
}

template <class Element>
void rms_norm_rows(const KernelTable& kernels, ThreadPool& pool, const float* weight, float epsilon,
                   const Tensor& in, const Tensor& out) {
  const int64_t n = in.cols();
  for_rows(pool, in.rows(), [&](int64_t row) {
    kernels.of<Element>().rms_norm(in.as<float>() + row * n, weight, n, epsilon,
                                   out.as<Element>() + row * n);
  });
}

template <class Element>
void rope_append_rows(const KernelTable& kernels, ThreadPool& pool, StepContext& step,
                      const ModelShape& shape, const KvPages& pages, const RopeAppendArgs& args,
                      const RopeAppendInputs& inputs) {
  const std::vector<int32_t>& positions = step.plan().positions;
  const auto highest = std::max_element(positions.begin(), positions.end());
  if (highest != positions.end() && *highest >= args.rope_table.rows()) {
    throw Error(
        {.code = ErrorCode::kInvalidArgument,
         .field = "plan.positions",
         .value = std::to_string(*highest),
         .allowed = fmt::format("below {}, the rows of the rope table", args.rope_table.rows())});
  }
  const RopeRow<Element> rope(kernels, step, shape, pages, args, inputs);
  for_row_ranges(pool, static_cast<int64_t>(positions.size()),
                 [&](int64_t begin, int64_t end) { rope.run(begin, end); });
}

void copy_pages(ThreadPool& pool, const StepPlan& plan, const KvPages& pages) {
  if (plan.page_copies.empty()) return;
  // Threads take blocks of all pages, not pages: a copy may read what the one before it wrote.
  pool.parallel_for(pages.num_blocks(), [&](int64_t block, int) {
    for (const PageCopy& copy : plan.page_copies) {
      if (copy.source != copy.target) pages.copy_block(block, copy);
    }
  });
}

template void rms_norm_rows<uint16_t>(const KernelTable&, ThreadPool&, const float*, float,
                                      const Tensor&, const Tensor&);
template void rms_norm_rows<float>(const KernelTable&, ThreadPool&, const float*, float,
                                   const Tensor&, const Tensor&);
template void rope_append_rows<uint16_t>(const KernelTable&, ThreadPool&, StepContext&,
                                         const ModelShape&, const KvPages&, const RopeAppendArgs&,
                                         const RopeAppendInputs&);
template void rope_append_rows<float>(const KernelTable&, ThreadPool&, StepContext&,
                                      const ModelShape&, const KvPages&, const RopeAppendArgs&,
                                      const RopeAppendInputs&);

}  // namespace rollpack::kernels::cpu
