#include "tests/bench/gpu/decode_steps.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdio>
#include <memory>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/registry.h"
#include "rollout/model/transformer.h"
#include "rollout/model/weights.h"
#include "tests/bench/made_model.h"

namespace rollpack::bench {
namespace {

using namespace kernels;
using Clock = std::chrono::steady_clock;

constexpr int32_t kNumRuns = 5;
constexpr auto kLongestStep = std::chrono::minutes(2);

// A model of made weights that decodes over pages nobody has written: they cost as much as any.
class Decoder {
 public:
  Decoder(const std::string& backend, const DecodeSizes& sizes, bool enforce_eager)
      : sizes_(sizes),
        max_rows_(std::ranges::max(sizes.rows)),
        num_positions_(sizes.context + sizes.num_steps + 1),
        pages_each_((num_positions_ + kPageTokens - 1) / kPageTokens) {
    BackendOptions options{.kv_cache_bytes = int64_t{1} << 24,
                           .max_num_seqs = max_rows_,
                           .max_num_batched_tokens = max_rows_,
                           .enforce_eager = enforce_eager};
    const KvLayout kv = make_backend(backend, sizes.model, options)->info().kv;
    options.kv_cache_bytes = kv.page_bytes * pages_each_ * max_rows_;
    backend_ = make_backend(backend, sizes.model, options);
    const rollout::ModelConfig config = config_of(sizes.model, num_positions_);
    weights_ = std::make_unique<rollout::ModelWeights>(config, *backend_);
    backend_->set_program(std::make_shared<rollout::Transformer>(
        config, *weights_, *backend_, sizes.model.dtype, max_rows_, num_positions_));
    weights_->load_dummy();
    backend_->commit_weights();
  }
  // The program frees its buffers at the backend.
  ~Decoder() { backend_->set_program(nullptr); }

  bool has_graph(int32_t rows) const {
    const std::vector<int32_t>& buckets = backend_->info().row_buckets;
    return !buckets.empty() && buckets.back() >= rows;
  }

  // Draws the first tokens, then times num_steps steps, as many under way as the backend profits
  // from. All results, the first step's included.
  double seconds_of_steps(int32_t rows, std::vector<StepResult>& results) {
    results = {backend_->wait(backend_->submit(plan(rows, 0)), Clock::now() + kLongestStep)};
    const auto under_way = static_cast<size_t>(backend_->info().max_steps_under_way);
    std::vector<StepHandle> handles;
    const auto begin = Clock::now();
    for (int32_t step = 1; step <= sizes_.num_steps; ++step) {
      handles.push_back(backend_->submit(plan(rows, step)));
      if (handles.size() >= under_way) wait_for(handles[handles.size() - under_way], results);
    }
    const size_t left = std::min(under_way - 1, handles.size());
    for (size_t i = handles.size() - left; i < handles.size(); ++i) wait_for(handles[i], results);
    return std::chrono::duration<double>(Clock::now() - begin).count();
  }

  int64_t weight_bytes() const { return backend_->info().memory.weight_bytes; }

 private:
  static constexpr int32_t kPageTokens = 16;  // of every backend

  void wait_for(StepHandle handle, std::vector<StepResult>& results) {
    results.push_back(backend_->wait(handle, Clock::now() + kLongestStep));
  }

  StepPlan plan(int32_t rows, int32_t step) const {
    StepPlan plan;
    for (int32_t row = 0; row < rows; ++row) {
      plan.input_ids.push_back(step == 0 ? row % 100 : kPendingToken);
      plan.positions.push_back(sizes_.context + step);
      plan.sequences.push_back({.slot = row,
                                .row_begin = row,
                                .num_rows = 1,
                                .page_table_begin = row * pages_each_,
                                .num_pages = pages_each_});
      for (int32_t page = 0; page < pages_each_; ++page) {
        plan.page_tables.push_back(row * pages_each_ + page);
      }
      if (step == 0) {
        plan.slot_inits.push_back({.slot = row,
                                   .seed = 7,
                                   .sample_index = static_cast<uint32_t>(row),
                                   .next_position = sizes_.context + 1,
                                   .end_position = num_positions_ + 1});
      }
      plan.samples.push_back({row, row});
    }
    return plan;
  }

  const DecodeSizes& sizes_;
  const int32_t max_rows_, num_positions_, pages_each_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<rollout::ModelWeights> weights_;
};

void expect_same(const std::vector<StepResult>& got, const std::vector<StepResult>& want) {
  for (size_t step = 0; step < want.size(); ++step) {
    const auto is_same = [](const HeadResult& one, const HeadResult& other) {
      return one.token == other.token && one.is_finite && !one.is_rejected &&
             std::bit_cast<uint32_t>(one.logprob) == std::bit_cast<uint32_t>(other.logprob);
    };
    if (!std::ranges::equal(got[step].samples, want[step].samples, is_same)) {
      fail_invariant(
          fmt::format("step {} of {} rows draws other tokens as a graph than kernel by "
                      "kernel",
                      step, want[step].samples.size()));
    }
  }
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

}  // namespace

void run_decode_steps(const std::string& backend, const DecodeSizes& sizes) {
  Decoder graphs(backend, sizes, false), eager(backend, sizes, true);
  for (const int32_t rows : sizes.rows) {
    std::vector<double> graph_s, eager_s;
    for (int32_t run = 0; run < kNumRuns; ++run) {
      std::vector<StepResult> got, want;
      graph_s.push_back(graphs.seconds_of_steps(rows, got) / sizes.num_steps);
      eager_s.push_back(eager.seconds_of_steps(rows, want) / sizes.num_steps);
      expect_same(got, want);
    }
    const double least_s = sizes.bytes_per_second > 0
                               ? static_cast<double>(graphs.weight_bytes()) / sizes.bytes_per_second
                               : 0;
    fmt::print(
        "{{\"op\": \"decode step, {} rows\", \"is_graph\": {}, \"us\": {:.1f}, \"us_eager\": "
        "{:.1f}, \"share\": {:.3f}, \"share_eager\": {:.3f}}}\n",
        rows, graphs.has_graph(rows), median(graph_s) * 1e6, median(eager_s) * 1e6,
        least_s / median(graph_s), least_s / median(eager_s));
    std::fflush(stdout);
  }
}

}  // namespace rollpack::bench
