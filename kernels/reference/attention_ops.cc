// rope_append and attention: the two ops that know positions and pages.
#include <algorithm>
#include <cmath>

#include "kernels/reference/ops.h"
#include "kernels/reference/stored.h"

namespace rollpack::kernels::reference {
namespace {

// Normalises one head where `norm` is given, then rotates pairs (i, i + K / 2) by `table`, the row
// of cosines and sines of its position; no table, no rotation. `head` is [K] f64.
void norm_and_rotate(std::vector<double>& head, const Weight* norm, double epsilon,
                     const float* table) {
  const size_t K = head.size();
  if (norm) {
    double squares = 0;
    for (const double x : head) squares += x * x;
    const double scale = std::sqrt(squares / static_cast<double>(K) + epsilon);
    for (size_t k = 0; k < K; ++k) {
      head[k] = head[k] / scale * norm->vector_element(static_cast<int64_t>(k));
    }
  }
  if (!table) return;
  for (size_t k = 0; k < K / 2; ++k) {
    const double low = head[k], high = head[k + K / 2];
    const double cosine = table[k], sine = table[k + K / 2];
    head[k] = low * cosine - high * sine;
    head[k + K / 2] = high * cosine + low * sine;
  }
}

// Writes `head` and returns true, or writes zeros where a number is not finite once rounded.
template <class Number>
bool write_finite(const std::vector<double>& head, Number* target) {
  bool is_finite = true;
  for (size_t k = 0; k < head.size(); ++k) {
    write_number(target[k], head[k]);
    is_finite = is_finite && std::isfinite(read_number(target[k]));
  }
  if (!is_finite) std::fill_n(target, head.size(), Number{});
  return is_finite;
}

}  // namespace

void rope_append(StepState& step, const ModelShape& shape, const Weight* q_norm,
                 const Weight* k_norm, const RopeAppendArgs& args, KvPages& pages) {
  const auto H = shape.H, G = shape.G, K = shape.K;
  std::vector<double> head(static_cast<size_t>(K));
  for (size_t t = 0; t < step.rows.size(); ++t) {
    const StepRow& row = step.rows[t];
    const bool is_pad = row.position == kPadPosition;
    if (!is_pad && row.position >= args.rope_table.rows()) {
      fail_invariant("rope_append: the rope table ends before a row's position");
    }
    const float* table = is_pad ? nullptr : args.rope_table.as<float>() + row.position * K;
    const int32_t page =
        is_pad ? pages.scratch_page() : step.page_of(row, row.position, pages.page_tokens());
    const int32_t offset = is_pad ? 0 : row.position % pages.page_tokens();
    const float* in = args.qkv.as<float>() + static_cast<int64_t>(t) * (H + 2 * G) * K;
    for (int64_t h = 0; h < H + 2 * G; ++h) {
      std::copy_n(in + h * K, K, head.begin());
      const bool is_query = h < H;
      const bool is_value = h >= H + G;
      if (!is_value) norm_and_rotate(head, is_query ? q_norm : k_norm, args.norm_epsilon, table);
      if (is_query) {
        visit_numbers(args.q.dtype, args.q.data, [&](auto* q) {
          q += (static_cast<int64_t>(t) * H + h) * K;
          for (int64_t k = 0; k < K; ++k) write_number(q[k], head[static_cast<size_t>(k)]);
        });
        continue;
      }
      void* target = is_value ? pages.values(args.layer, page, offset, h - H - G)
                              : pages.keys(args.layer, page, offset, h - H);
      visit_numbers(pages.dtype(), target, [&](auto* numbers) {
        const bool is_finite = write_finite(head, numbers);
        if (!is_finite && !is_pad) step.row_failed[t] = 1;
      });
    }
  }
}

void attention(const StepState& step, const ModelShape& shape, const AttentionArgs& args,
               KvPages& pages, std::vector<double>& scores) {
  const auto H = shape.H, G = shape.G, K = shape.K;
  const int32_t page_tokens = pages.page_tokens();
  const double scale = 1.0 / std::sqrt(static_cast<double>(K));
  std::vector<double> sums(static_cast<size_t>(K));

  // One row and head; Number is the compute dtype, that of q, out and the pages alike.
  const auto attend = [&]<class Number>(const StepRow& row, int64_t kv_head, const Number* q,
                                        Number* out) {
    const int32_t end = row.position + 1;  // 0 for a pad: no key, output 0
    const int32_t begin = args.window > 0 ? std::max(0, end - args.window) : 0;
    double max = -HUGE_VAL;
    for (int32_t j = begin; j < end; ++j) {
      const int32_t page = step.page_of(row, j, page_tokens);
      const auto* key =
          static_cast<const Number*>(pages.keys(args.layer, page, j % page_tokens, kv_head));
      double score = 0;
      for (int64_t k = 0; k < K; ++k) score += read_number(q[k]) * read_number(key[k]);
      scores[static_cast<size_t>(j)] = score * scale;
      max = std::max(max, score * scale);
    }
    double total = 0;
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int32_t j = begin; j < end; ++j) {
      const int32_t page = step.page_of(row, j, page_tokens);
      const auto* value =
          static_cast<const Number*>(pages.values(args.layer, page, j % page_tokens, kv_head));
      const double p = std::exp(scores[static_cast<size_t>(j)] - max);
      total += p;
      for (int64_t k = 0; k < K; ++k) sums[static_cast<size_t>(k)] += p * read_number(value[k]);
    }
    for (int64_t k = 0; k < K; ++k) {
      write_number(out[k], begin < end ? sums[static_cast<size_t>(k)] / total : 0.0);
    }
  };

  if (args.q.dtype != pages.dtype() || args.out.dtype != pages.dtype()) {
    fail_invariant("attention: q and out must have the compute dtype");
  }
  visit_numbers(args.q.dtype, args.q.data, [&](auto* q) {
    auto* out = static_cast<decltype(q)>(args.out.data);
    for (size_t t = 0; t < step.rows.size(); ++t) {
      for (int64_t h = 0; h < H; ++h) {
        const int64_t at = (static_cast<int64_t>(t) * H + h) * K;
        attend(step.rows[t], h / (H / G), q + at, out + at);
      }
    }
  });
}

}  // namespace rollpack::kernels::reference
