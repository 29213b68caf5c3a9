#include "toy_model.h"

#include <bit>
#include <cmath>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::kernels::testing {
namespace {

constexpr int32_t kMaxRows = 1024;
constexpr int32_t kMaxPositions = 2048;

}  // namespace

uint64_t Numbers::next() {
  uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

float Numbers::uniform(float scale) {
  return (static_cast<float>(next() >> 40) * 0x1p-23f - 1.0f) * scale;
}

std::vector<float> Numbers::vector(int64_t count, float scale) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = uniform(scale);
  return values;
}

class ToyModel::Program final : public StepProgram {
 public:
  Program(Backend& backend, const ToyOptions& options) : backend_(backend), options_(options) {
    declare();
    load();
    const ModelShape& s = options_.shape;
    x_ = alloc(DType::kF32, s.D);
    h_ = alloc(s.dtype, s.D);
    qkv_ = alloc(DType::kF32, (s.H + 2 * s.G) * s.K);
    q_ = alloc(s.dtype, s.H * s.K);
    a_ = alloc(s.dtype, s.H * s.K);
    f_ = alloc(s.dtype, s.F);
    head_ = alloc(DType::kF32, s.D);
    head_normed_ = alloc(s.dtype, s.D);
    upload_rope_table();
  }
  ~Program() override {
    for (const Buffer& buffer : buffers_) backend_.free(buffer);
  }

  void run(Backend& backend, int64_t rows, int64_t head_rows) override {
    const auto first = [](Tensor tensor, int64_t n) {
      tensor.shape[0] = n;
      return tensor;
    };
    const Tensor x = first(x_, rows), h = first(h_, rows), a = first(a_, rows);
    backend.embed({.weight = embedding_, .out = x});
    for (int32_t l = 0; l < options_.shape.L; ++l) {
      const Layer& layer = layers_[static_cast<size_t>(l)];
      backend.rms_norm({.weight = layer.norm1, .in = x, .out = h});
      backend.linear({.weight = layer.qkv, .bias = layer.bias, .in = h, .out = first(qkv_, rows)});
      backend.rope_append({.layer = l,
                           .qkv = first(qkv_, rows),
                           .rope_table = rope_,
                           .q_norm = layer.q_norm,
                           .k_norm = layer.k_norm,
                           .q = first(q_, rows)});
      backend.attention({.layer = l, .window = options_.window, .q = first(q_, rows), .out = a});
      backend.linear({.weight = layer.o, .epilogue = Epilogue::kResidual, .in = a, .out = x});
      backend.rms_norm({.weight = layer.norm2, .in = x, .out = h});
      backend.linear(
          {.weight = layer.gate_up, .epilogue = Epilogue::kGated, .in = h, .out = first(f_, rows)});
      backend.linear(
          {.weight = layer.down, .epilogue = Epilogue::kResidual, .in = first(f_, rows), .out = x});
    }
    if (head_rows == 0) return;
    backend.gather_head_rows({.in = x, .out = first(head_, head_rows)});
    backend.rms_norm(
        {.weight = norm_, .in = first(head_, head_rows), .out = first(head_normed_, head_rows)});
    backend.lm_head({.weight = embedding_, .in = first(head_normed_, head_rows)});
  }

 private:
  struct Layer {
    WeightId norm1, qkv, bias, q_norm, k_norm, o, norm2, gate_up, down;
  };

  WeightId declare(WeightKind kind, std::vector<int64_t> rows, int64_t cols) {
    specs_.push_back({.name = "weight " + std::to_string(specs_.size()),
                      .kind = kind,
                      .part_rows = std::move(rows),
                      .cols = cols});
    return backend_.declare_weight(specs_.back());
  }

  void declare() {
    const ModelShape& s = options_.shape;
    embedding_ = declare(WeightKind::kEmbedding, {s.V}, s.D);
    for (int64_t l = 0; l < s.L; ++l) {
      Layer layer;
      layer.norm1 = declare(WeightKind::kVector, {s.D}, 1);
      layer.qkv = declare(WeightKind::kLinear, {s.H * s.K, s.G * s.K, s.G * s.K}, s.D);
      layer.bias = declare(WeightKind::kVector, {s.H * s.K, s.G * s.K, s.G * s.K}, 1);
      layer.q_norm = layer.k_norm = kNoWeight;
      if (options_.has_qk_norm) {
        layer.q_norm = declare(WeightKind::kVector, {s.K}, 1);
        layer.k_norm = declare(WeightKind::kVector, {s.K}, 1);
      }
      layer.o = declare(WeightKind::kLinear, {s.D}, s.H * s.K);
      layer.norm2 = declare(WeightKind::kVector, {s.D}, 1);
      layer.gate_up = declare(WeightKind::kGated, {s.F, s.F}, s.D);
      layer.down = declare(WeightKind::kLinear, {s.D}, s.F);
      layers_.push_back(layer);
    }
    norm_ = declare(WeightKind::kVector, {s.D}, 1);
  }

  void load() {
    Numbers numbers(7);
    backend_.begin_staging();
    for (size_t id = 0; id < specs_.size(); ++id) {
      for (size_t part = 0; part < specs_[id].part_rows.size(); ++part) {
        const int64_t rows = specs_[id].part_rows[part];
        const int64_t cols = specs_[id].cols;
        const auto values = numbers.vector(rows * cols, cols == 1 ? 1.0f : 0.35f);
        backend_.load_weight(static_cast<WeightId>(id), static_cast<int32_t>(part),
                             {values.data(), DType::kF32, {rows, cols}}, {0, rows});
      }
    }
    backend_.commit_weights();
  }

  void upload_rope_table() {
    const int64_t K = options_.shape.K;
    std::vector<float> table(static_cast<size_t>(kMaxPositions * K));
    for (int64_t p = 0; p < kMaxPositions; ++p) {
      for (int64_t i = 0; i < K / 2; ++i) {
        const double angle =
            static_cast<double>(p) *
            std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(K));
        table[static_cast<size_t>(p * K + i)] = static_cast<float>(std::cos(angle));
        table[static_cast<size_t>(p * K + K / 2 + i)] = static_cast<float>(std::sin(angle));
      }
    }
    rope_ = alloc(DType::kF32, K, kMaxPositions);
    backend_.upload({rope_.data, rope_.bytes()}, table.data(), rope_.bytes());
  }

  Tensor alloc(DType dtype, int64_t cols, int64_t rows = kMaxRows) {
    Tensor tensor{.dtype = dtype, .shape = {rows, cols}};
    buffers_.push_back(backend_.alloc(tensor.bytes()));
    tensor.data = buffers_.back().data;
    return tensor;
  }

  Backend& backend_;
  const ToyOptions options_;
  std::vector<WeightSpec> specs_;
  std::vector<Layer> layers_;
  WeightId embedding_ = kNoWeight, norm_ = kNoWeight;
  std::vector<Buffer> buffers_;
  Tensor x_, h_, qkv_, q_, a_, f_, head_, head_normed_, rope_;
};

ToyModel::ToyModel(const ToyOptions& options) : options_(options) {
  BackendOptions backend_options{.num_threads = options.num_threads,
                                 .kv_cache_bytes = int64_t{1} << 30,
                                 .max_num_seqs = 64,
                                 .max_num_batched_tokens = kMaxRows,
                                 .cpu_amx = options.amx};
  const int64_t page_bytes =
      make_cpu_backend(options.shape, backend_options, options.cpu)->info().kv.page_bytes;
  backend_options.kv_cache_bytes = page_bytes * options.num_pages;
  backend_ = make_cpu_backend(options.shape, backend_options, options.cpu);
  backend_->set_program(std::make_shared<Program>(*backend_, options_));
}

ToyModel::~ToyModel() = default;

StepResult ToyModel::run(StepPlan plan) {
  return backend_->wait(backend_->submit(std::move(plan)), soon());
}

void add_rows(StepPlan& plan, const std::vector<int32_t>& ids, int32_t first_position,
              const std::vector<int32_t>& pages, int32_t slot) {
  plan.sequences.push_back({.slot = slot,
                            .row_begin = static_cast<int32_t>(plan.input_ids.size()),
                            .num_rows = static_cast<int32_t>(ids.size()),
                            .page_table_begin = static_cast<int32_t>(plan.page_tables.size()),
                            .num_pages = static_cast<int32_t>(pages.size())});
  plan.page_tables.insert(plan.page_tables.end(), pages.begin(), pages.end());
  for (size_t i = 0; i < ids.size(); ++i) {
    plan.input_ids.push_back(ids[i]);
    plan.positions.push_back(first_position + static_cast<int32_t>(i));
  }
}

void add_scores(StepPlan& plan, int32_t first_row, const std::vector<int32_t>& ids,
                int32_t num_rows, float temperature) {
  for (int32_t row = 0; row < num_rows; ++row) {
    plan.scores.push_back({.row = first_row + row,
                           .token = ids[static_cast<size_t>(row + 1)],
                           .temperature = temperature});
  }
}

std::vector<int32_t> page_range(int32_t first, int32_t count) {
  std::vector<int32_t> pages;
  for (int32_t i = 0; i < count; ++i) pages.push_back(first + i);
  return pages;
}

std::vector<int32_t> random_ids(uint64_t seed, int32_t count, int64_t V) {
  Numbers numbers(seed);
  std::vector<int32_t> ids;
  for (int32_t i = 0; i < count; ++i) ids.push_back(numbers.below(static_cast<int32_t>(V)));
  return ids;
}

std::vector<uint32_t> bits_of(const HeadResult& result) {
  return {static_cast<uint32_t>(result.token),
          static_cast<uint32_t>(result.position),
          std::bit_cast<uint32_t>(result.logprob),
          std::bit_cast<uint32_t>(result.scaled_logprob),
          std::bit_cast<uint32_t>(result.support_logmass),
          std::bit_cast<uint32_t>(result.entropy),
          static_cast<uint32_t>(result.finish),
          static_cast<uint32_t>(result.is_finite)};
}

std::vector<uint32_t> bits_of(const std::vector<HeadResult>& results) {
  std::vector<uint32_t> bits;
  for (const HeadResult& result : results) {
    for (const uint32_t word : bits_of(result)) bits.push_back(word);
  }
  return bits;
}

Deadline soon() {
  return std::chrono::steady_clock::now() + std::chrono::minutes(1);
}

std::string error_text(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "no error was thrown";
  return "";
}

}  // namespace rollpack::kernels::testing
