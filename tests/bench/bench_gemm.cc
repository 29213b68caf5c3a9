// Products of the CPU backend's driver with weights that are never in a cache: a step multiplies
// with 400 MB of them, one after the other. In turn with each step, oneDNN and a split-K variant do
// the same, so that "invariance costs nothing" is a number of the same seconds.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "tests/bench/benchmarks.h"
#include "tests/bench/op_rig.h"
#include "tests/bench/report.h"
#include "tests/bench/rivals/split_k.h"
#ifdef ROLLPACK_BENCH_ONEDNN
#include "tests/bench/rivals/onednn.h"
#endif

namespace rollpack::bench {
namespace {

using kernels::Backend;
using kernels::Epilogue;
using kernels::Tensor;
using kernels::WeightId;
using kernels::WeightKind;
using kernels::cpu::Isa;

constexpr int64_t kCycledBytes = 400'000'000;
constexpr int32_t kMaxRows = 256;

// Each implementation has threads of its own, which spin for a while after their last task: on the
// cores that the next one needs.
void let_other_pools_sleep() {
  if (!is_smoke()) std::this_thread::sleep_for(std::chrono::milliseconds(20));
}

// One product of a layer; gated: N is of gate and up each.
struct Product {
  std::string name;
  int64_t N = 0, K_in = 0;
  Epilogue epilogue = Epilogue::kNone;

  bool is_gated() const { return epilogue == Epilogue::kGated; }
  int64_t weight_columns() const { return is_gated() ? 2 * N : N; }
};

const Product kTarget = {"4864x896", 4864, 896, Epilogue::kNone};

struct GemmCase {
  Product product;
  Isa isa = Isa::kPortable;
  DType dtype = DType::kBF16;
  int num_threads = 2;

  bool operator==(const GemmCase& other) const {
    return product.name == other.product.name && isa == other.isa && dtype == other.dtype &&
           num_threads == other.num_threads;
  }
};

// The weights of one case; the benchmarks of a case differ in rows only and follow each other.
class GemmRig {
 public:
  explicit GemmRig(const GemmCase& c) : rig_(rig_options(c)), case_(c) {
    const Product& product = c.product;
    const int64_t bytes = product.weight_columns() * product.K_in * dtype_bytes(c.dtype);
    num_weights_ = is_smoke() ? 2 : static_cast<int>((kCycledBytes + bytes - 1) / bytes);
    for (int i = 0; i < num_weights_; ++i) {
      weights_.push_back(product.is_gated()
                             ? rig_.weight(WeightKind::kGated, {product.N, product.N}, product.K_in)
                             : rig_.weight(WeightKind::kLinear, {product.N}, product.K_in));
    }
    rig_.commit();
    in_ = rig_.tensor(c.dtype, kMaxRows, product.K_in);
    out_ = rig_.tensor(product.is_gated() ? c.dtype : DType::kF32, kMaxRows, product.N);
  }

  // Seconds of one product, the mean over a cycle of weights.
  double run(int64_t rows) {
    let_other_pools_sleep();
    Tensor in = in_, out = out_;
    in.shape[0] = out.shape[0] = rows;
    const double seconds = rig_.run(plan_of_rows(rows), [&](Backend& backend) {
      for (const WeightId weight : weights_) {
        backend.linear(
            {.weight = weight, .epilogue = case_.product.epilogue, .in = in, .out = out});
      }
    });
    return seconds / num_weights_;
  }

  const GemmCase& gemm_case() const { return case_; }
  int num_weights() const { return num_weights_; }
  const uint16_t* in() const { return in_.as<uint16_t>(); }
  float* out() const { return out_.as<float>(); }

 private:
  static RigOptions rig_options(const GemmCase& c) {
    RigOptions options{.num_threads = c.num_threads, .isa = c.isa, .max_rows = kMaxRows};
    options.shape.dtype = c.dtype;
    options.shape.L = 1;
    return options;
  }

  OpRig rig_;
  GemmCase case_;
  int num_weights_ = 0;
  std::vector<WeightId> weights_;
  Tensor in_, out_;
};

std::unique_ptr<GemmRig> current_rig;

GemmRig& rig_of(const GemmCase& c) {
  if (current_rig == nullptr || !(current_rig->gemm_case() == c)) {
    current_rig.reset();  // first: two would be 800 MB
    current_rig = std::make_unique<GemmRig>(c);
  }
  return *current_rig;
}

// The other implementations of one shape, on the weights that the rig has.
class Rivals {
 public:
  Rivals(const GemmRig& rig, int64_t rows) : rig_(rig), rows_(rows) {
    const GemmCase& c = rig.gemm_case();
    const int64_t N = c.product.N, K_in = c.product.K_in;
    const std::vector<uint16_t> weight =
        random_bf16(N * K_in, 1.0f / std::sqrt(static_cast<float>(K_in)));
    if (SplitKGemm::is_supported()) {
      split_k_ = std::make_unique<SplitKGemm>(N, K_in, weight, rig.num_weights(), c.num_threads);
    }
#ifdef ROLLPACK_BENCH_ONEDNN
    one_dnn_ =
        std::make_unique<OneDnnGemm>(rows, N, K_in, weight, rig.num_weights(), c.num_threads);
#endif
  }

  // Name of an implementation whose product is not `want` [rows, N], or "".
  std::string wrong_one(const std::vector<float>& want) {
    if (split_k_) {
      split_k_->run(rig_.in(), rows_, rig_.out());
      if (!is_close(want)) return "split-K";
    }
#ifdef ROLLPACK_BENCH_ONEDNN
    one_dnn_->run(rig_.in(), rig_.out());
    if (!is_close(want)) return OneDnnGemm::version();
#endif
    return "";
  }

  void run() {
    ++num_runs_;
    let_other_pools_sleep();
    if (split_k_) split_k_s_ += split_k_->run(rig_.in(), rows_, rig_.out()) / rig_.num_weights();
#ifdef ROLLPACK_BENCH_ONEDNN
    let_other_pools_sleep();
    one_dnn_s_ += one_dnn_->run(rig_.in(), rig_.out()) / rig_.num_weights();
#endif
  }

  void report(benchmark::State& state) const {
    if (split_k_) set_rival(state, "split-K", split_k_s_ / num_runs_);
#ifdef ROLLPACK_BENCH_ONEDNN
    set_rival(state, OneDnnGemm::version(), one_dnn_s_ / num_runs_);
#endif
  }

 private:
  // Two sums of K_in products below 1 / sqrt(K_in), each rounded K_in times, in any order.
  bool is_close(const std::vector<float>& want) const {
    const auto K_in = static_cast<float>(rig_.gemm_case().product.K_in);
    const float bound = 2 * K_in * 0x1p-24f * std::sqrt(K_in);
    for (size_t i = 0; i < want.size(); ++i) {
      if (!(std::abs(rig_.out()[i] - want[i]) <= bound)) return false;
    }
    return true;
  }

  const GemmRig& rig_;
  const int64_t rows_;
  int num_runs_ = 0;
  std::unique_ptr<SplitKGemm> split_k_;
  double split_k_s_ = 0;
#ifdef ROLLPACK_BENCH_ONEDNN
  std::unique_ptr<OneDnnGemm> one_dnn_;
  double one_dnn_s_ = 0;
#endif
};

void run_gemm(benchmark::State& state, GemmCase c, bool has_rivals) {
  const int64_t rows = state.range(0);
  c.num_threads = static_cast<int>(state.range(1));
  const double weights = static_cast<double>(c.product.weight_columns() * c.product.K_in);
  set_work(state, {.flops = 2 * static_cast<double>(rows) * weights,
                   .bytes = weights * static_cast<double>(dtype_bytes(c.dtype)),
                   .peak = peak_of(c.isa, c.dtype),
                   .num_threads = c.num_threads});
  GemmRig& rig = rig_of(c);
  std::optional<Rivals> rivals;
  if (has_rivals) {
    rivals.emplace(rig, rows);
    rig.run(rows);
    const std::string wrong = rivals->wrong_one({rig.out(), rig.out() + rows * c.product.N});
    if (!wrong.empty()) return state.SkipWithError((wrong + " gives another product").c_str());
  }
  for (auto _ : state) {
    state.SetIterationTime(rig.run(rows));
    if (rivals) rivals->run();
  }
  if (rivals) rivals->report(state);
}

void add(const GemmCase& c, bool has_rivals, const std::vector<int64_t>& rows,
         const std::vector<int64_t>& threads) {
  const std::string name = fmt::format("gemm/{}/{}/{}", kernels::cpu::isa_name(c.isa),
                                       c.dtype == DType::kBF16 ? "bf16" : "f32", c.product.name);
  auto* const added = benchmark::RegisterBenchmark(name.c_str(), run_gemm, c, has_rivals);
  added->ArgNames({"rows", "threads"})->UseManualTime();
  // Threads outside: a rig serves all rows of one number of threads.
  for (const int64_t num_threads : threads) {
    for (const int64_t num_rows : rows) added->Args({num_rows, num_threads});
  }
  // An iteration is a cycle of weights, though its time is that of one product.
  if (!is_smoke()) added->Iterations(3)->Repetitions(5);
}

}  // namespace

void add_gemm_benchmarks() {
  const std::vector<Isa> isas = kernels::cpu::supported_isas();
  for (const Isa isa : isas) {
    if (isa == Isa::kPortable && isas.size() > 1) continue;  // nobody waits for it
    const bool is_best = isa == isas.front();
    for (const DType dtype : {DType::kBF16, DType::kF32}) {
      const bool is_target = is_best && dtype == DType::kBF16;
      std::vector<int64_t> rows = {1, 4, 16, 64, 256}, threads = {2};
      if (is_target) rows = {1, 2, 4, 16, 64, 67, 128, 256}, threads = {2, 1};
      if (is_smoke()) rows = {1, 67}, threads = {2};
      add({.product = kTarget, .isa = isa, .dtype = dtype}, is_target, rows, threads);
    }
  }
  const std::vector<Product> products = {{"qkv", 1152, 896, Epilogue::kNone},
                                         {"o", 896, 896, Epilogue::kResidual},
                                         {"gate_up", 4864, 896, Epilogue::kGated},
                                         {"down", 896, 4864, Epilogue::kResidual}};
  for (const Product& product : products) {
    add({.product = product, .isa = isas.front()}, false,
        is_smoke() ? std::vector<int64_t>{16} : std::vector<int64_t>{1, 16, 128}, {2});
  }
}

}  // namespace rollpack::bench
