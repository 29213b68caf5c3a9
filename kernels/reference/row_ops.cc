// Ops that see one row at a time: embed, norm, linear, gather, logits.
#include <cmath>
#include <cstring>

#include "kernels/reference/ops.h"
#include "kernels/reference/stored.h"

namespace rollpack::kernels::reference {
namespace {

template <class A, class B>
double dot(const A* a, const B* b, int64_t count) {
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += read_number(a[k]) * read_number(b[k]);
  return sum;
}

double silu(double x) {
  return x / (1.0 + std::exp(-x));
}

// One output row from one input row; `Out` is f32, or the compute dtype for kGated.
template <class In, class Out>
void linear_row(const Weight& weight, const Weight* bias, Epilogue epilogue, const In* in,
                Out* out) {
  const int64_t cols = weight.spec.cols;
  const auto chain = [&](const WeightPart& part, int64_t n, int64_t bias_index) {
    const double sum = dot(in, reinterpret_cast<const In*>(part.numbers.data()) + n * cols, cols);
    return bias ? sum + bias->vector_element(bias_index) : sum;
  };
  if (epilogue == Epilogue::kGated) {
    const int64_t rows = weight.parts[0].num_rows();
    for (int64_t n = 0; n < rows; ++n) {
      const double gate = chain(weight.parts[0], n, n);
      const double up = chain(weight.parts[1], n, rows + n);
      write_number(out[n], silu(gate) * up);
    }
    return;
  }
  int64_t column = 0;
  for (const WeightPart& part : weight.parts) {
    for (int64_t n = 0; n < part.num_rows(); ++n, ++column) {
      const double sum = chain(part, n, column);
      write_number(out[column],
                   epilogue == Epilogue::kResidual ? read_number(out[column]) + sum : sum);
    }
  }
}

void check_linear(const Weight& weight, const Weight* bias, const LinearArgs& args) {
  const bool is_gated = args.epilogue == Epilogue::kGated;
  const bool is_kind =
      is_gated ? weight.spec.kind == WeightKind::kGated : weight.spec.kind == WeightKind::kLinear;
  const int64_t columns = is_gated ? weight.num_rows() / 2 : weight.num_rows();
  if (!is_kind || args.in.cols() != weight.spec.cols || args.in.dtype != weight.dtype ||
      args.out.cols() != columns || args.in.rows() != args.out.rows() ||
      (is_gated ? args.out.dtype != weight.dtype : args.out.dtype != DType::kF32) ||
      (bias && bias->num_rows() != weight.num_rows())) {
    fail_invariant("linear: shapes or dtypes do not fit weight " + weight.spec.name);
  }
}

}  // namespace

void embed(const StepState& step, const Weight& weight, const Tensor& out) {
  const int64_t D = weight.spec.cols;
  const void* table = weight.parts[0].numbers.data();
  visit_numbers(weight.dtype, table, [&](const auto* numbers) {
    for (size_t t = 0; t < step.rows.size(); ++t) {
      float* row = out.as<float>() + static_cast<int64_t>(t) * D;
      for (int64_t d = 0; d < D; ++d) {
        write_number(row[d], read_number(numbers[step.rows[t].token * D + d]));
      }
    }
  });
}

void rms_norm(const Weight& weight, const RmsNormArgs& args) {
  const int64_t D = args.in.cols();
  visit_numbers(args.out.dtype, args.out.data, [&](auto* out) {
    for (int64_t t = 0; t < args.in.rows(); ++t) {
      const float* in = args.in.as<float>() + t * D;
      const double scale = std::sqrt(dot(in, in, D) / static_cast<double>(D) + args.epsilon);
      for (int64_t d = 0; d < D; ++d) {
        write_number(out[t * D + d], in[d] / scale * weight.vector_element(d));
      }
    }
  });
}

void linear(const Weight& weight, const Weight* bias, const LinearArgs& args) {
  check_linear(weight, bias, args);
  const void* source = args.in.data;
  visit_numbers(args.in.dtype, source, [&](const auto* in) {
    visit_numbers(args.out.dtype, args.out.data, [&](auto* out) {
      for (int64_t t = 0; t < args.in.rows(); ++t) {
        linear_row(weight, bias, args.epilogue, in + t * args.in.cols(), out + t * args.out.cols());
      }
    });
  });
}

void gather_head_rows(const StepState& step, const GatherHeadRowsArgs& args) {
  const int64_t D = args.in.cols();
  for (size_t i = 0; i < step.head_rows.size(); ++i) {
    std::memcpy(args.out.as<float>() + static_cast<int64_t>(i) * D,
                args.in.as<float>() + step.head_rows[i] * D, static_cast<size_t>(D) * 4);
  }
}

void vocabulary_logits(const Weight& weight, const Tensor& in, int64_t row,
                       std::vector<double>& logits) {
  const int64_t D = weight.spec.cols;
  const void* table = weight.parts[0].numbers.data();
  const void* source = in.data;
  visit_numbers(weight.dtype, table, [&](const auto* numbers) {
    visit_numbers(in.dtype, source, [&](const auto* rows) {
      for (size_t v = 0; v < logits.size(); ++v) {
        logits[v] = dot(rows + row * D, numbers + static_cast<int64_t>(v) * D, D);
      }
    });
  });
}

}  // namespace rollpack::kernels::reference
