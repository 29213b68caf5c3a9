// A cpu backend with random weights and buffers, whose steps run the ops that a benchmark gives and
// say how long these took: without the hand-over of the step, which is no part of an op.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/cpu_backend.h"

namespace rollpack::bench {

// Qwen2.5-0.5B, the shape of the headline numbers.
inline constexpr kernels::ModelShape kQwenShape = {
    .D = 896, .H = 14, .G = 2, .K = 64, .F = 4864, .V = 151936, .L = 24};

struct RigOptions {
  kernels::ModelShape shape = kQwenShape;
  int num_threads = 2;
  std::optional<kernels::cpu::Isa> isa;  // none: the best of this machine
  int32_t num_pages = 64;
  int32_t max_rows = 2048;  // of one step
  int32_t max_num_seqs = 256;
};

// The best instruction set of this machine, where none is asked for.
kernels::cpu::Isa isa_of(const RigOptions& options);

// A cpu backend with exactly options.num_pages KV pages.
std::unique_ptr<kernels::Backend> make_backend(const RigOptions& options);

// Values in [-scale, scale), the same in every call.
std::vector<uint16_t> random_bf16(int64_t count, float scale);

// Stages random_bf16 of 1 / sqrt(cols) for every part of every declared weight, and commits them.
void load_random_weights(kernels::Backend& backend, const std::vector<kernels::WeightSpec>& specs);

class OpRig {
 public:
  using Ops = std::function<void(kernels::Backend&)>;

  explicit OpRig(const RigOptions& options);
  ~OpRig();
  OpRig(const OpRig&) = delete;
  OpRig& operator=(const OpRig&) = delete;

  const RigOptions& options() const { return options_; }
  kernels::Backend& backend() { return *backend_; }

  // Weights first, then commit(), then steps.
  kernels::WeightId weight(kernels::WeightKind kind, std::vector<int64_t> part_rows, int64_t cols);
  void commit();
  // Random values in [-1, 1]; freed with the rig.
  kernels::Tensor tensor(DType dtype, int64_t rows, int64_t cols);

  // Runs a step whose program is `ops`. Returns: seconds from its first op to the end of its last.
  double run(kernels::StepPlan plan, const Ops& ops);
  const kernels::StepResult& result() const { return result_; }

 private:
  RigOptions options_;
  std::unique_ptr<kernels::Backend> backend_;
  std::vector<kernels::WeightSpec> specs_;
  std::vector<kernels::Buffer> buffers_;
  kernels::StepResult result_;
};

// `rows` rows of one sequence from position 0, without a sample.
kernels::StepPlan plan_of_rows(int64_t rows);

// Adds `num_rows` rows of a sequence from `first_position` on over `pages`.
void add_sequence(kernels::StepPlan& plan, int32_t num_rows, int32_t first_position,
                  const std::vector<int32_t>& pages, int32_t slot = -1);

// Pages [first, first + count).
std::vector<int32_t> page_range(int32_t first, int32_t count);

}  // namespace rollpack::bench
