// A transformer of a few thousand weights on the cpu backend, for tests that need whole steps:
// odd sizes everywhere (head width 20, vocabulary 1100, widths no multiple of 16 or 64).
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cpu/cpu_backend.h"

namespace rollpack::kernels::testing {

// splitmix64: the same numbers on every platform.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed) {}
  uint64_t next();
  int32_t below(int32_t end) { return static_cast<int32_t>(next() % static_cast<uint64_t>(end)); }
  float uniform(float scale);  // in [-scale, scale)
  std::vector<float> vector(int64_t count, float scale);

 private:
  uint64_t state_;
};

struct ToyOptions {
  ModelShape shape = {
      .D = 50, .H = 6, .G = 2, .K = 20, .F = 72, .V = 1100, .L = 2, .dtype = DType::kBF16};
  CpuOptions cpu;
  int32_t num_threads = 2;
  int32_t num_pages = 256;
  int32_t window = 0;
  bool has_qk_norm = false;
  bool amx = false;
};

class ToyModel {
 public:
  explicit ToyModel(const ToyOptions& options);
  ~ToyModel();

  Backend& backend() { return *backend_; }
  const ModelShape& shape() const { return options_.shape; }
  StepResult run(StepPlan plan);

 private:
  class Program;
  ToyOptions options_;
  std::unique_ptr<Backend> backend_;
};

// Rows of one sequence; the page table is the one given, whole.
void add_rows(StepPlan& plan, const std::vector<int32_t>& ids, int32_t first_position,
              const std::vector<int32_t>& pages, int32_t slot = -1);
// Scores every row's successor but the last row's, at `temperature`.
void add_scores(StepPlan& plan, int32_t first_row, const std::vector<int32_t>& ids,
                int32_t num_rows, float temperature = 1.0f);
std::vector<int32_t> page_range(int32_t first, int32_t count);
std::vector<int32_t> random_ids(uint64_t seed, int32_t count, int64_t V);

// All numbers of a result as bits, to compare whole results.
std::vector<uint32_t> bits_of(const HeadResult& result);
std::vector<uint32_t> bits_of(const std::vector<HeadResult>& results);

// Waits at most a minute: no test may hang.
Deadline soon();

// Text of the rollpack::Error that `call` throws; fails where it throws none.
std::string error_text(const std::function<void()>& call);

}  // namespace rollpack::kernels::testing
