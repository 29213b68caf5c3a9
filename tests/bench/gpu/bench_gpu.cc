// Ops of the CUDA backend at the shape of an 8B model and whole steps of a 0.5B one, through the
// Backend interface, as shares of what the device can do at most, measured in the same run. One
// JSON object a line, as it goes.
//
//   bench_gpu            all of it, some minutes
//   bench_gpu --probe    whether a device can be used: one line; exit code 3 and the reason if not
//   bench_gpu --smoke    small sizes on whichever backend can run, without limits: does it work?
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/registry.h"
#include "tests/bench/gpu/decode_steps.h"
#ifdef ROLLPACK_BENCH_DEVICE
#include "tests/bench/gpu/device_limits.h"
#endif

namespace rollpack::bench {
namespace {

using namespace kernels;
using Ops = std::function<void(Backend&)>;

constexpr int kNoDevice = 3;

#ifndef ROLLPACK_BENCH_DEVICE
struct DeviceLimits {
  double bf16_flops = 0, bytes_per_second = 0;
};
#endif

// Uniform bf16 numbers of about +-0.03 that repeat every 64 KiB: as costly as any.
class NoiseSource final : public WeightSource {
 public:
  NoiseSource(int64_t rows, int64_t cols) : WeightSource(DType::kBF16, rows, cols) {}

  const std::byte* read_rows(int64_t begin, int64_t end,
                             std::vector<std::byte>& scratch) const override {
    scratch.resize(static_cast<size_t>((end - begin) * row_bytes()));
    for (size_t i = 0; i < scratch.size(); i += 2) {
      const auto word = static_cast<uint32_t>((i % 65536) * 2654435761u + 12345u);
      const auto bits = static_cast<uint16_t>((word >> 16 & 0x807fu) | 0x3c80u);
      std::memcpy(scratch.data() + i, &bits, 2);
    }
    return scratch.data();
  }
};

class OpsProgram final : public StepProgram {
 public:
  explicit OpsProgram(Ops ops) : ops_(std::move(ops)) {}
  void run(Backend& backend, int64_t, int64_t) override { ops_(backend); }

 private:
  Ops ops_;
};

struct Sizes {
  ModelShape model;
  std::vector<int64_t> rows;       // of products and of the head
  std::vector<int32_t> sequences;  // that decode
  int32_t context = 0;             // tokens before each of them
  int32_t repeats = 0;             // of an op in a step
};

// What an op has to do at least.
struct Work {
  double flops = 0, bytes = 0;
};

class Bench {
 public:
  Bench(const std::string& name, const Sizes& sizes, const DeviceLimits& limits)
      : sizes_(sizes), limits_(limits), max_rows_(std::ranges::max(sizes.rows)) {
    const ModelShape& shape = sizes.model;
    const int64_t pages = pages_of(sizes.context + 1) * std::ranges::max(sizes.sequences) + 1;
    BackendOptions options{.kv_cache_bytes = int64_t{1} << 24,
                           .max_num_batched_tokens = static_cast<int32_t>(max_rows_)};
    const int64_t page_bytes = make_backend(name, shape, options)->info().kv.page_bytes;
    options.kv_cache_bytes = pages * page_bytes;
    backend_ = make_backend(name, shape, options);
    square_ = declare(WeightKind::kLinear, shape.D, shape.D);
    up_ = declare(WeightKind::kLinear, shape.F, shape.D);
    down_ = declare(WeightKind::kLinear, shape.D, shape.F);
    head_ = declare(WeightKind::kLmHead, shape.V, shape.D);
    backend_->begin_staging();
    for (const auto& [id, rows, cols] : declared_) {
      backend_->load_weight(id, 0, NoiseSource(rows, cols), {0, rows});
    }
    backend_->commit_weights();
    in_ = tensor(DType::kBF16, max_rows_, std::max(shape.F, shape.H * shape.K));
    out_ = tensor(DType::kF32, max_rows_, std::max(shape.F, shape.H * shape.K));
  }
  ~Bench() {
    backend_->set_program(nullptr);
    for (const Buffer& buffer : buffers_) backend_->free(buffer);
  }

  void run() {
    for (const int64_t rows : sizes_.rows) {
      linear("linear D x D", square_, rows, sizes_.model.D, sizes_.model.D);
      linear("linear F x D", up_, rows, sizes_.model.F, sizes_.model.D);
      linear("linear D x F", down_, rows, sizes_.model.D, sizes_.model.F);
    }
    for (const int32_t count : sizes_.sequences) decode(count);
    for (const int64_t rows : sizes_.rows) {
      if (rows > 256) continue;
      head("head", rows, {});
      head("head, top_p 0.9", rows, {.top_p = 0.9f});
    }
  }

 private:
  struct Declared {
    WeightId id;
    int64_t rows, cols;
  };

  static int64_t pages_of(int64_t tokens) { return (tokens + 15) / 16; }

  WeightId declare(WeightKind kind, int64_t rows, int64_t cols) {
    const WeightId id = backend_->declare_weight({.name = fmt::format("w{}", declared_.size()),
                                                  .kind = kind,
                                                  .part_rows = {rows},
                                                  .cols = cols});
    declared_.push_back({id, rows, cols});
    return id;
  }

  Tensor tensor(DType dtype, int64_t rows, int64_t cols) {
    Tensor tensor{.dtype = dtype, .shape = {rows, cols}};
    buffers_.push_back(backend_->alloc(tensor.bytes()));
    tensor.data = buffers_.back().data;
    return tensor;
  }

  static Tensor part(Tensor tensor, int64_t rows, int64_t cols) {
    tensor.shape = {rows, cols};
    return tensor;
  }

  double step_seconds(const StepPlan& plan, const Ops& ops, int32_t repeats) {
    backend_->set_program(std::make_shared<OpsProgram>([&](Backend& backend) {
      for (int32_t i = 0; i < repeats; ++i) ops(backend);
    }));
    const auto begin = std::chrono::steady_clock::now();
    backend_->wait(backend_->submit(plan), begin + std::chrono::minutes(2));
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  // One op: the difference of a long and a short step, so that what a step costs by itself is not
  // counted; the median of five.
  void report(const std::string& what, const StepPlan& plan, const Ops& ops, const Work& work) {
    const int32_t few = std::max(sizes_.repeats / 10, 1), many = few + sizes_.repeats;
    step_seconds(plan, ops, few);
    std::vector<double> seconds;
    for (int32_t run = 0; run < 5; ++run) {
      const double long_step = step_seconds(plan, ops, many);
      seconds.push_back((long_step - step_seconds(plan, ops, few)) / sizes_.repeats);
    }
    std::ranges::sort(seconds);
    const double median = seconds[2];
    double share = 0;  // of whichever limit binds
    if (limits_.bf16_flops > 0) {
      share =
          std::max(work.flops / limits_.bf16_flops, work.bytes / limits_.bytes_per_second) / median;
    }
    fmt::print(
        "{{\"op\": \"{}\", \"us\": {:.2f}, \"us_min\": {:.2f}, \"us_max\": {:.2f}, \"tflops\": "
        "{:.2f}, \"gb_per_s\": {:.1f}, \"share\": {:.3f}}}\n",
        what, median * 1e6, seconds.front() * 1e6, seconds.back() * 1e6, work.flops / median / 1e12,
        work.bytes / median / 1e9, share);
    std::fflush(stdout);
  }

  StepPlan plan_of_rows(int64_t rows) const {
    StepPlan plan;
    plan.input_ids.assign(static_cast<size_t>(rows), 0);
    plan.positions.assign(static_cast<size_t>(rows), kPadPosition);  // nothing is attended to
    plan.sequences = {{.num_rows = static_cast<int32_t>(rows)}};
    return plan;
  }

  void linear(const char* what, WeightId weight, int64_t rows, int64_t N, int64_t K_in) {
    const Tensor in = part(in_, rows, K_in), out = part(out_, rows, N);
    report(fmt::format("{}, {} rows", what, rows), plan_of_rows(rows),
           [=](Backend& backend) { backend.linear({.weight = weight, .in = in, .out = out}); },
           {.flops = 2.0 * static_cast<double>(rows * N * K_in),
            .bytes = 2.0 * static_cast<double>(N * K_in)});
  }

  // `count` sequences with pages of their own, one row each.
  void decode(int32_t count) {
    const ModelShape& shape = sizes_.model;
    StepPlan plan;
    const auto pages = static_cast<int32_t>(pages_of(sizes_.context + 1));
    for (int32_t s = 0; s < count; ++s) {
      plan.input_ids.push_back(0);
      plan.positions.push_back(sizes_.context);
      plan.sequences.push_back(
          {.row_begin = s, .num_rows = 1, .page_table_begin = s * pages, .num_pages = pages});
      for (int32_t p = 0; p < pages; ++p) plan.page_tables.push_back(s * pages + p);
    }
    const Tensor q = part(in_, count, shape.H * shape.K);
    Tensor out = part(out_, count, shape.H * shape.K);
    out.dtype = DType::kBF16;
    const double keys = static_cast<double>(count) * (sizes_.context + 1);
    report(fmt::format("attention, {} sequences of {} tokens", count, sizes_.context), plan,
           [=](Backend& backend) { backend.attention({.layer = 0, .q = q, .out = out}); },
           {.flops = 4.0 * keys * static_cast<double>(shape.H * shape.K),
            .bytes = 4.0 * keys * static_cast<double>(shape.G * shape.K)});
  }

  void head(const char* what, int64_t rows, const SamplingParams& sampling) {
    const ModelShape& shape = sizes_.model;
    StepPlan plan = plan_of_rows(rows);
    for (int32_t row = 0; row < static_cast<int32_t>(rows); ++row) {
      plan.slot_inits.push_back({.slot = row,
                                 .sampling = sampling,
                                 .sample_index = static_cast<uint32_t>(row),
                                 .next_position = 1,
                                 .end_position = INT32_MAX});
      plan.samples.push_back({row, row});
    }
    const Tensor in = part(in_, rows, shape.D);
    report(fmt::format("{}, {} rows", what, rows), plan,
           [=, this](Backend& backend) { backend.lm_head({.weight = head_, .in = in}); },
           {.flops = 2.0 * static_cast<double>(rows * shape.V * shape.D),
            .bytes = 2.0 * static_cast<double>(shape.V * shape.D)});
  }

  const Sizes sizes_;
  const DeviceLimits limits_;
  const int64_t max_rows_;
  std::unique_ptr<Backend> backend_;
  std::vector<Declared> declared_;
  std::vector<Buffer> buffers_;
  WeightId square_ = kNoWeight, up_ = kNoWeight, down_ = kNoWeight, head_ = kNoWeight;
  Tensor in_, out_;
};

// Llama 3 8B, one layer of KV.
const Sizes kLarge = {
    .model = {.D = 4096, .H = 32, .G = 8, .K = 128, .F = 14336, .V = 128256, .L = 1},
    .rows = {1, 16, 64, 256, 512, 2048},
    .sequences = {1, 16, 64, 256},
    .context = 2047,
    .repeats = 50};
const Sizes kSmoke = {.model = {.D = 64, .H = 4, .G = 2, .K = 32, .F = 128, .V = 3000, .L = 1},
                      .rows = {1, 5},
                      .sequences = {1, 3},
                      .context = 40,
                      .repeats = 2};

// Qwen2.5-0.5B: its kernels are so short that enqueuing them one by one takes longer.
const DecodeSizes kDecoding = {
    .model = {.D = 896, .H = 14, .G = 2, .K = 64, .F = 4864, .V = 151936, .L = 24},
    .rows = {1, 8, 32, 64, 256},
    .context = 511,
    .num_steps = 100};
const DecodeSizes kSmokeDecoding = {
    .model = {.D = 64, .H = 4, .G = 2, .K = 32, .F = 128, .V = 3000, .L = 2},
    .rows = {1, 5},
    .context = 40,
    .num_steps = 3};

int run(const std::vector<std::string_view>& args) {
  const auto has = [&](std::string_view name) {
    return std::ranges::find(args, name) != args.end();
  };
  const BackendChoice choice = choose_backend("auto");
  if (has("--smoke")) {
    Bench(choice.name, kSmoke, {}).run();
    run_decode_steps(choice.name, kSmokeDecoding);
    return 0;
  }
  if (choice.name != "cuda") {
    fmt::print("skipped: {}\n",
               choice.passed_over.empty() ? "built without CUDA" : choice.passed_over);
    return kNoDevice;
  }
  const auto backend = make_backend("cuda", kSmoke.model, {.kv_cache_bytes = int64_t{1} << 24});
  fmt::print("{{\"backend\": \"{}\", \"fingerprint\": \"{}\"}}\n", backend->info().description,
             backend->info().fingerprint);
  std::fflush(stdout);
  if (has("--probe")) return 0;
  DeviceLimits limits;
#ifdef ROLLPACK_BENCH_DEVICE
  limits = measure_device_limits();
#endif
  fmt::print("{{\"bf16_tflops\": {:.1f}, \"read_gb_per_s\": {:.1f}}}\n", limits.bf16_flops / 1e12,
             limits.bytes_per_second / 1e9);
  std::fflush(stdout);
  DecodeSizes decoding = kDecoding;
  decoding.bytes_per_second = limits.bytes_per_second;
  run_decode_steps("cuda", decoding);  // first: what follows takes long
  Bench("cuda", kLarge, limits).run();
  return 0;
}

}  // namespace
}  // namespace rollpack::bench

int main(int argc, char** argv) {
  try {
    return rollpack::bench::run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench_gpu: {}\n", error.what());
    return 1;
  }
}
