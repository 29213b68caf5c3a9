#include "tests/bench/rivals/onednn.h"

#include <fmt/format.h>
#include <omp.h>

#include <chrono>
#include <dnnl.hpp>

namespace rollpack::bench {
namespace {

using dnnl::memory;
using Clock = std::chrono::steady_clock;

}  // namespace

struct OneDnnGemm::State {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  dnnl::matmul::primitive_desc description;
  dnnl::matmul product;
  std::vector<memory> weights;
  int num_threads = 1;
};

OneDnnGemm::OneDnnGemm(int64_t rows, int64_t N, int64_t K_in, const std::vector<uint16_t>& weight,
                       int num_weights, int num_threads)
    : state_(std::make_unique<State>()) {
  State& state = *state_;
  state.num_threads = num_threads;
  omp_set_num_threads(num_threads);  // it plans for the number of threads it will have
  const memory::desc in({rows, K_in}, memory::data_type::bf16, memory::format_tag::ab);
  const memory::desc any({K_in, N}, memory::data_type::bf16, memory::format_tag::any);
  const memory::desc out({rows, N}, memory::data_type::f32, memory::format_tag::ab);
  state.description = dnnl::matmul::primitive_desc(dnnl::matmul::desc(in, any, out), state.engine);
  state.product = dnnl::matmul(state.description);
  const memory::desc plain({K_in, N}, memory::data_type::bf16, memory::format_tag::ba);
  memory source(plain, state.engine, const_cast<uint16_t*>(weight.data()));
  for (int i = 0; i < num_weights; ++i) {
    state.weights.emplace_back(state.description.weights_desc(), state.engine);
    dnnl::reorder(source, state.weights.back()).execute(state.stream, source, state.weights.back());
  }
  state.stream.wait();
}

OneDnnGemm::~OneDnnGemm() = default;

double OneDnnGemm::run(const uint16_t* in, float* out) {
  State& state = *state_;
  omp_set_num_threads(state.num_threads);
  memory source(state.description.src_desc(), state.engine, const_cast<uint16_t*>(in));
  memory target(state.description.dst_desc(), state.engine, out);
  const auto start = Clock::now();
  for (memory& weight : state.weights) {
    state.product.execute(
        state.stream, {{DNNL_ARG_SRC, source}, {DNNL_ARG_WEIGHTS, weight}, {DNNL_ARG_DST, target}});
  }
  state.stream.wait();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::string OneDnnGemm::version() {
  const dnnl_version_t* version = dnnl_version();
  return fmt::format("oneDNN {}.{}.{}", version->major, version->minor, version->patch);
}

std::string OneDnnGemm::implementation() const {
  return state_->description.impl_info_str();
}

}  // namespace rollpack::bench
