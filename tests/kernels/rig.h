// What every backend test needs: a backend with weights and buffers, plans in a line, seeded
// numbers, and the arithmetic of rounding bounds.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/backend.h"
#include "kernels/registry.h"

namespace rollpack::kernels::testing {

using Ops = std::function<void(Backend&)>;

// Unit roundoffs of the stored types, and what f32 arithmetic may lose to flushed subnormals.
inline constexpr double kUnitF32 = 0x1p-24;
inline constexpr double kUnitBF16 = 0x1p-8;
inline constexpr double kFlush = 0x1p-126;
// exp within 1 unit in the last place (kernels/cpu/polynomial.h): two unit roundoffs.
inline constexpr double kExpError = 2 * kUnitF32;

inline double unit_of(DType dtype) {
  return dtype == DType::kBF16 ? kUnitBF16 : kUnitF32;
}
// gamma_n of Higham: the relative error of n roundings that follow each other.
inline double gamma_of(double n) {
  return n * kUnitF32 / (1 - n * kUnitF32);
}

// Seeded numbers (splitmix64), the same on every platform.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint64_t next();
  int32_t below(int32_t end) { return static_cast<int32_t>(next() % static_cast<uint64_t>(end)); }
  // Uniform in [-scale, scale].
  float uniform(float scale = 1.0f);
  std::vector<float> vector(int64_t count, float scale = 1.0f);
  std::vector<int32_t> ids(int64_t count, int64_t V);
  std::vector<int32_t> permutation(int32_t count);

 private:
  uint64_t state_;
};

// `values` as memory of `dtype` holds them.
std::vector<float> rounded(std::vector<float> values, DType dtype);

// A shape in which only what a test names matters.
ModelShape small_shape(DType dtype);

struct RigOptions {
  int32_t num_threads = 2;
  int32_t max_num_seqs = 64;
  int32_t max_num_batched_tokens = 1024;
  int32_t num_pages = 96;
  bool enforce_eager = false;
  // Instead of the backend of that name.
  std::function<std::unique_ptr<Backend>(const ModelShape&, const BackendOptions&)> make;
};

// A backend, its weights and its buffers. Weights are committed before the first step.
class Rig {
 public:
  Rig(const std::string& name, const ModelShape& shape, RigOptions options = {});
  ~Rig();
  Rig(const Rig&) = delete;
  Rig& operator=(const Rig&) = delete;

  Backend& backend() { return *backend_; }
  const ModelShape& shape() const { return shape_; }

  // Declares a weight and keeps its values ([part_rows, cols] a part) for commit().
  WeightId weight(WeightKind kind, std::vector<std::vector<float>> parts, int64_t cols);
  void set_weight(WeightId id, std::vector<std::vector<float>> parts);
  // Moves every weight, as the compute dtype holds it, up or down by `relative` of itself; `signs`
  // draws which way.
  void perturb_weights(double relative, uint64_t signs);
  void stage();   // begin_staging and load all weights as they were set last
  void commit();  // stage and commit

  Tensor tensor(DType dtype, int64_t rows, int64_t cols, const std::vector<float>& values = {});
  std::vector<float> read(const Tensor& tensor);

  // Runs one step whose program calls `ops`, or the program set last.
  StepResult run(StepPlan plan, const Ops& ops);
  StepResult run(StepPlan plan);

 private:
  ModelShape shape_;
  std::unique_ptr<Backend> backend_;
  std::vector<WeightSpec> specs_;
  std::vector<std::vector<std::vector<float>>> values_;
  std::vector<Buffer> buffers_;
  bool is_committed_ = false;
};

// Waits at most a minute: no test may hang.
Deadline soon();

// The results of the plans, each submitted while the one before is under way.
std::vector<StepResult> run_ahead(Backend& backend, const std::vector<StepPlan>& plans);

// Pages [first, first + count).
std::vector<int32_t> page_range(int32_t first, int32_t count);
// Adds rows `ids` at positions from `first_position` as one sequence over `pages`.
void add_sequence(StepPlan& plan, const std::vector<int32_t>& ids, int32_t first_position,
                  const std::vector<int32_t>& pages, int32_t slot = -1);
// A plan of `rows` rows of one sequence from position 0 over pages 0, 1, ...
StepPlan plan_of_rows(int64_t rows);

// Fails naming the first element where |got - want| > bound.
void expect_within(const std::vector<float>& got, const std::vector<float>& want,
                   const std::vector<double>& bound, const std::string& what);
// Fails naming the first element whose bits differ.
void expect_same_bits(const std::vector<float>& got, const std::vector<float>& want,
                      const std::string& what);
// Token, numbers and flags of two results, bit for bit.
void expect_same_result(const HeadResult& got, const HeadResult& want, const std::string& what);

// Text of the rollpack::Error that `call` throws; fails where it throws none.
std::string error_text(const std::function<void()>& call);

// The CUDA backend with its kernels emulated on the host.
inline constexpr std::string_view kEmulatedCuda = "cuda_emulated";

// The backends of this build and the emulated one.
std::vector<std::string> tested_backends();
std::unique_ptr<Backend> make_tested_backend(std::string_view name, const ModelShape& shape,
                                             const BackendOptions& options);

// BackendOptions::device_link of emulated devices: ranks then exchange by what stands in for NCCL
// (cuda/fake_nccl.cc), and have to be made at once.
std::vector<std::byte> make_fake_link();

// The widest head that a backend takes.
int64_t max_head_width(std::string_view name);

// All of them, for INSTANTIATE_TEST_SUITE_P.
inline auto all_backends() {
  return ::testing::ValuesIn(tested_backends());
}

// Emulated kernels take a thousand times longer than compiled ones: their tests take few of many
// cases, all of them with ROLLPACK_FULL=1.
bool takes_all_cases(std::string_view backend);
// All cases, or `few` of them at even distances, the last among them.
template <class Case>
std::vector<Case> cases_of(std::string_view backend, std::vector<Case> all, size_t few) {
  if (takes_all_cases(backend) || few >= all.size()) return all;
  std::vector<Case> taken;
  for (size_t i = 1; i <= few; ++i) taken.push_back(all[all.size() * i / few - 1]);
  return taken;
}
// The same of the numbers from `first` to `last`.
std::vector<int32_t> numbers_of(std::string_view backend, int32_t first, int32_t last, size_t few);

class BackendTest : public ::testing::TestWithParam<std::string> {};

}  // namespace rollpack::kernels::testing
