#include "kernels/profile/profiled_backend.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <unordered_set>
#include <utility>

namespace rollpack::kernels {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// "layers.3.qkv" -> "qkv": layers are summed.
std::string without_layer(const std::string& name) {
  const size_t dot = name.rfind('.');
  return dot == std::string::npos ? name : name.substr(dot + 1);
}

// Pages that hold a key some row sees, each once. Windows are not looked at.
int64_t count_pages(const StepPlan& plan, int32_t page_tokens) {
  std::unordered_set<int32_t> pages;
  for (const StepSequence& sequence : plan.sequences) {
    int32_t last = kPadPosition;
    for (int32_t i = 0; i < sequence.num_rows; ++i) {
      last = std::max(last, plan.positions[static_cast<size_t>(sequence.row_begin + i)]);
    }
    if (last == kPadPosition) continue;
    const auto first = plan.page_tables.begin() + sequence.page_table_begin;
    pages.insert(first, first + std::min(last / page_tokens + 1, sequence.num_pages));
  }
  return static_cast<int64_t>(pages.size());
}

}  // namespace

// The program as the inner backend runs it: its ops come back through the profile.
class ProfiledBackend::ProfiledProgram final : public StepProgram {
 public:
  ProfiledProgram(ProfiledBackend& outer, std::shared_ptr<StepProgram> program)
      : outer_(outer), program_(std::move(program)) {}

  void run(Backend&, int64_t num_rows, int64_t num_head_rows) override {
    const auto start = Clock::now();
    program_->run(outer_, num_rows, num_head_rows);
    const std::lock_guard lock(outer_.mutex_);
    ++outer_.profile_.num_steps;
    outer_.profile_.program_s += seconds_since(start);
    outer_.steps_.pop_front();
  }

 private:
  ProfiledBackend& outer_;
  const std::shared_ptr<StepProgram> program_;
};

ProfiledBackend::ProfiledBackend(std::unique_ptr<Backend> inner, const ModelShape& shape)
    : ForwardingBackend(std::move(inner)), shape_(shape) {}

ProfiledBackend::~ProfiledBackend() {
  inner().sync();                // steps use the members, which go before the inner backend does
  inner().set_program(nullptr);  // while this is whole: a program may free its buffers here
}

StepProfile ProfiledBackend::take() {
  const std::lock_guard lock(mutex_);
  return std::exchange(profile_, {});
}

WeightId ProfiledBackend::declare_weight(const WeightSpec& spec) {
  const WeightId id = inner().declare_weight(spec);
  if (static_cast<size_t>(id) >= weights_.size()) weights_.resize(static_cast<size_t>(id) + 1);
  int64_t rows = std::accumulate(spec.part_rows.begin(), spec.part_rows.end(), int64_t{0});
  if (!spec.shards.empty()) rows = 0;
  for (const ShardRange& shard : spec.shards) rows += shard.size();
  weights_[static_cast<size_t>(id)] = {.name = without_layer(spec.name),
                                       .num_elements = static_cast<double>(rows * spec.cols)};
  return id;
}

void ProfiledBackend::set_program(std::shared_ptr<StepProgram> program) {
  inner().set_program(std::make_shared<ProfiledProgram>(*this, std::move(program)));
}

StepHandle ProfiledBackend::submit(StepPlan plan) {
  StepRows rows{.positions = plan.positions,
                .num_pages = count_pages(plan, inner().info().kv.page_tokens)};
  {
    const std::lock_guard lock(mutex_);
    steps_.push_back(std::move(rows));  // before the step can start
  }
  try {
    return inner().submit(std::move(plan));
  } catch (...) {
    const std::lock_guard lock(mutex_);
    steps_.pop_back();
    throw;
  }
}

template <class Call>
void ProfiledBackend::timed(const std::string& name, const Cost& cost, Call call) {
  const auto start = Clock::now();
  call();
  const double seconds = seconds_since(start);
  const std::lock_guard lock(mutex_);
  OpProfile& op = profile_.op(name);
  ++op.num_calls;
  op.num_rows += cost.num_rows;
  op.seconds += seconds;
  op.flops += cost.flops;
  op.bytes += cost.bytes;
}

double ProfiledBackend::element_bytes() const {
  return static_cast<double>(dtype_bytes(shape_.dtype));
}

double ProfiledBackend::visible_pairs(int32_t window) {
  const std::lock_guard lock(mutex_);
  int64_t pairs = 0;
  for (const int32_t position : steps_.front().positions) {
    const int32_t num_keys = position + 1;  // 0 for a pad
    pairs += window > 0 ? std::min(window, num_keys) : num_keys;
  }
  return static_cast<double>(pairs);
}

void ProfiledBackend::embed(const EmbedArgs& args) {
  const auto elements = static_cast<double>(args.out.num_elements());
  timed("embed", {.num_rows = args.out.rows(), .bytes = elements * (element_bytes() + 4)},
        [&] { inner().embed(args); });
}

void ProfiledBackend::rms_norm(const RmsNormArgs& args) {
  timed("rms_norm",
        {.num_rows = args.in.rows(),
         .bytes = static_cast<double>(args.in.bytes() + args.out.bytes())},
        [&] { inner().rms_norm(args); });
}

void ProfiledBackend::linear(const LinearArgs& args) {
  const Weight& weight = weights_[static_cast<size_t>(args.weight)];
  timed("linear " + weight.name,
        {.num_rows = args.in.rows(),
         .flops = 2 * weight.num_elements * static_cast<double>(args.in.rows()),
         .bytes = weight.num_elements * element_bytes()},
        [&] { inner().linear(args); });
}

void ProfiledBackend::rope_append(const RopeAppendArgs& args) {
  const auto cache = static_cast<double>(args.qkv.rows() * 2 * shape_.G * shape_.K);
  timed("rope_append",
        {.num_rows = args.qkv.rows(),
         .bytes = static_cast<double>(args.qkv.bytes() + args.q.bytes()) + cache * element_bytes()},
        [&] { inner().rope_append(args); });
}

void ProfiledBackend::attention(const AttentionArgs& args) {
  int64_t num_pages = 0;
  {
    const std::lock_guard lock(mutex_);
    num_pages = steps_.front().num_pages;
  }
  const auto L = static_cast<double>(shape_.L);
  const double cache = static_cast<double>(num_pages * inner().info().kv.page_bytes) / L;
  timed("attention",
        {.num_rows = args.q.rows(),
         .flops = 4 * static_cast<double>(shape_.H * shape_.K) * visible_pairs(args.window),
         .bytes = cache + static_cast<double>(args.q.bytes() + args.out.bytes())},
        [&] { inner().attention(args); });
}

void ProfiledBackend::gather_head_rows(const GatherHeadRowsArgs& args) {
  timed("gather_head_rows",
        {.num_rows = args.out.rows(), .bytes = 2 * static_cast<double>(args.out.bytes())},
        [&] { inner().gather_head_rows(args); });
}

void ProfiledBackend::lm_head(const LmHeadArgs& args) {
  const double elements = weights_[static_cast<size_t>(args.weight)].num_elements;
  timed("lm_head",
        {.num_rows = args.in.rows(),
         .flops = 2 * elements * static_cast<double>(args.in.rows()),
         .bytes = elements * element_bytes()},
        [&] { inner().lm_head(args); });
}

void ProfiledBackend::gather_columns(const GatherColumnsOpArgs& args) {
  timed("gather_columns",
        {.num_rows = args.tensor.rows(), .bytes = static_cast<double>(args.tensor.bytes())},
        [&] { inner().gather_columns(args); });
}

}  // namespace rollpack::kernels
