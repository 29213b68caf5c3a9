#include "kernels/reference/reference_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/reference/ops.h"
#include "kernels/reference/token_sampler.h"
#include "kernels/step/check_plan.h"
#include "kernels/step/check_shape.h"
#include "kernels/step/draft_draws.h"
#include "kernels/step/step_queue.h"

namespace rollpack::kernels {
namespace reference {
namespace {

constexpr int32_t kPageTokens = 16;

void check_options(const BackendOptions& options) {
  if (options.communicator && options.communicator->size() > 1) {
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = "engine.tensor_model_parallel_size",
                 .value = fmt::to_string(options.communicator->size()),
                 .allowed = "1 with engine.backend: reference"});
  }
  if (options.max_num_seqs <= 0 || options.max_num_batched_tokens <= 0) {
    throw Error(
        {.code = ErrorCode::kInvalidArgument,
         .field = "engine.max_num_seqs, max_num_batched_tokens",
         .value = fmt::format("{}, {}", options.max_num_seqs, options.max_num_batched_tokens),
         .allowed = "positive numbers"});
  }
}

int32_t pages_in(const ModelShape& shape, const BackendOptions& options) {
  const int64_t page_bytes = KvPages::page_bytes(shape, kPageTokens);
  const int64_t num_pages = options.kv_cache_bytes / page_bytes;
  if (num_pages < 1) {
    throw Error({.code = ErrorCode::kResourceExhausted,
                 .field = "engine.kv_cache_memory",
                 .value = fmt::format("{} bytes", options.kv_cache_bytes),
                 .allowed = fmt::format("at least {} bytes", page_bytes),
                 .message = fmt::format("one page of {} tokens does not fit", kPageTokens)});
  }
  return static_cast<int32_t>(std::min<int64_t>(num_pages, INT32_MAX / kPageTokens - 1));
}

[[noreturn]] void refuse(std::string call, std::string reason) {
  throw Error(
      {.code = ErrorCode::kUnsupported, .field = std::move(call), .message = std::move(reason)});
}

class ReferenceBackend final : public Backend {
 public:
  ReferenceBackend(const ModelShape& shape, const BackendOptions& options)
      : shape_(shape),
        options_(options),
        num_pages_(pages_in(shape, options)),
        weights_(shape.dtype),
        pages_(shape, kPageTokens, num_pages_),
        slots_(static_cast<size_t>(options.max_num_seqs)),
        sampler_(shape.V),
        scores_(static_cast<size_t>(num_pages_) * kPageTokens),
        queue_([this](const StepPlan& plan, StepProgram& program) { return run(plan, program); }) {
    const int64_t page_bytes = KvPages::page_bytes(shape, kPageTokens);
    info_.name = "reference";
    info_.description = "reference: f64, plain loops, 1 thread";
    info_.fingerprint = fmt::format("reference-1-{}", dtype_name(shape.dtype));
    info_.kv = {shape.dtype, kPageTokens, page_bytes, num_pages_};
    info_.memory.kv_bytes = page_bytes * (num_pages_ + 1);
    info_.memory.activation_bytes =
        static_cast<int64_t>(scores_.size() + 3 * static_cast<size_t>(shape.V)) * 8;
  }

  ~ReferenceBackend() override {
    queue_.close();
    program_.reset();  // while this is whole: a program frees its buffers here
  }

  const BackendInfo& info() const override { return info_; }

  Buffer alloc(int64_t bytes) override {
    void* data =
        bytes >= 0 ? std::calloc(static_cast<size_t>(std::max<int64_t>(bytes, 1)), 1) : nullptr;
    if (!data) {
      throw Error({.code = ErrorCode::kResourceExhausted,
                   .field = "alloc",
                   .value = fmt::format("{} bytes", bytes),
                   .message = "the system has no such memory"});
    }
    buffer_bytes_ += bytes;
    return {data, bytes};
  }
  void free(Buffer buffer) override {
    queue_.drain();  // a step in flight may still use it
    buffer_bytes_ -= buffer.bytes;
    std::free(buffer.data);
  }
  void upload(Buffer target, const void* source, int64_t bytes) override {
    queue_.drain();
    if (bytes > target.bytes) fail_invariant("upload: more bytes than the buffer has");
    std::memcpy(target.data, source, static_cast<size_t>(bytes));
  }
  void download(void* target, Buffer source, int64_t bytes) override {
    queue_.drain();
    if (bytes > source.bytes) fail_invariant("download: more bytes than the buffer has");
    std::memcpy(target, source.data, static_cast<size_t>(bytes));
  }
  void sync() override { queue_.drain(); }

  WeightId declare_weight(const WeightSpec& spec) override {
    const WeightId id = weights_.declare(spec);
    int64_t rows = 0;
    for (const int64_t part : spec.part_rows) rows += part;
    const DType dtype = spec.kind == WeightKind::kVector ? DType::kF32 : shape_.dtype;
    info_.memory.weight_bytes += rows * spec.cols * dtype_bytes(dtype);
    info_.memory.staging_bytes = info_.memory.weight_bytes;
    return id;
  }
  void begin_staging() override { weights_.begin(); }
  void load_weight(WeightId id, int32_t part, const WeightSource& source,
                   ShardRange shard) override {
    weights_.load(id, part, source, shard);
  }
  void copy_committed_to_staged() override { weights_.copy_committed(); }
  void commit_weights() override {
    queue_.drain();  // submitted steps keep the weights they were submitted under
    weights_.commit();
  }
  void discard_weights() override { weights_.discard(); }
  uint64_t weights_hash() override { return weights_.hash(); }
  uint64_t staged_weights_hash() override { return weights_.staged_hash(); }
  int export_staged_weights() override {
    refuse("engine.share_weights", "the reference backend keeps its weights in private memory");
  }
  void adopt_staged_weights(int) override {
    refuse("engine.share_weights", "the reference backend keeps its weights in private memory");
  }
  void sleep(int level) override {
    queue_.drain();
    if (level > 1) weights_.drop();
    pages_.sleep();
  }
  void wake_up(MemoryTags tags) override {
    if (tags.kv_cache) pages_.wake_up();
  }
  int64_t held_bytes() const override {
    return (weights_.has_committed() ? info_.memory.weight_bytes : 0) + pages_.held_bytes() +
           buffer_bytes_;
  }

  void set_program(std::shared_ptr<StepProgram> program) override { program_ = std::move(program); }
  StepHandle submit(StepPlan plan) override { return queue_.submit(std::move(plan), program_); }
  bool poll(StepHandle handle) override { return queue_.poll(handle); }
  StepResult wait(StepHandle handle, Deadline deadline) override {
    return queue_.wait(handle, deadline);
  }

  void embed(const EmbedArgs& args) override {
    reference::embed(running(), weights_.committed(args.weight), args.out);
  }
  void rms_norm(const RmsNormArgs& args) override {
    reference::rms_norm(weights_.committed(args.weight), args);
  }
  void linear(const LinearArgs& args) override {
    reference::linear(weights_.committed(args.weight), find(args.bias), args);
  }
  void rope_append(const RopeAppendArgs& args) override {
    reference::rope_append(running(), shape_, find(args.q_norm), find(args.k_norm), args, pages_);
  }
  void attention(const AttentionArgs& args) override {
    reference::attention(running(), shape_, args, pages_, scores_);
  }
  void gather_head_rows(const GatherHeadRowsArgs& args) override {
    reference::gather_head_rows(running(), args);
  }
  void lm_head(const LmHeadArgs& args) override;

 private:
  StepResult run(const StepPlan& plan, StepProgram& program);
  StepState& running() {
    if (!step_) fail_invariant("an op of the backend was called outside of a step");
    return *step_;
  }
  const Weight* find(WeightId id) { return id == kNoWeight ? nullptr : &weights_.committed(id); }

  ModelShape shape_;
  BackendOptions options_;
  int32_t num_pages_;
  BackendInfo info_;
  WeightStore weights_;
  KvPages pages_;
  std::vector<Slot> slots_;
  TokenSampler sampler_;
  std::vector<double> scores_;
  int64_t buffer_bytes_ = 0;
  std::shared_ptr<StepProgram> program_;
  StepState* step_ = nullptr;  // set while the program runs
  StepQueue queue_;            // last: its thread uses all of the above
};

StepResult ReferenceBackend::run(const StepPlan& plan, StepProgram& program) {
  if (!weights_.has_committed()) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "step",
                 .message = "no weights are committed yet"});
  }
  if (pages_.is_asleep()) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "step",
                 .message = "the KV pages sleep; wake_up first"});
  }
  check_plan(plan,
             {.V = shape_.V,
              .max_rows = options_.max_num_batched_tokens,
              .num_pages = num_pages_,
              .page_tokens = kPageTokens,
              .num_slots = options_.max_num_seqs},
             [this](int32_t index) -> SlotStatus {
               const Slot& slot = slots_[static_cast<size_t>(index)];
               return {.is_set = slot.is_set, .has_pending = slot.token != kPendingToken};
             });
  StepState step = begin_step(plan, slots_, pages_);
  step_ = &step;
  try {
    program.run(*this, plan.num_rows(), static_cast<int64_t>(step.head_rows.size()));
  } catch (...) {
    step_ = nullptr;
    throw;
  }
  step_ = nullptr;
  if (!step.head_rows.empty() && !step.has_head_results) {
    fail_invariant("the step's program did not run lm_head, though rows are sampled or scored");
  }
  find_failed_sequences(plan, step.row_failed, step.result);
  return std::move(step.result);
}

void ReferenceBackend::lm_head(const LmHeadArgs& args) {
  StepState& step = running();
  const StepPlan& plan = *step.plan;
  step.result.samples.resize(plan.samples.size());
  step.result.scores.resize(plan.scores.size());
  for (size_t i = 0; i < step.head_rows.size(); ++i) {
    const int32_t row = step.head_rows[i];
    vocabulary_logits(weights_.committed(args.weight), args.in, static_cast<int64_t>(i),
                      sampler_.logits());
    for (size_t s = 0; s < plan.samples.size(); ++s) {
      if (plan.samples[s].row != row) continue;
      // Rows ascend, and so do the draws of a slot: the one before has its result.
      Slot& slot = slots_[static_cast<size_t>(plan.samples[s].slot)];
      if (slot.is_finished || !is_draw_accepted(plan, step.result.samples, s)) {
        step.result.samples[s] = {.slot = plan.samples[s].slot, .is_rejected = true};
        continue;
      }
      HeadResult& result = step.result.samples[s];
      result = sampler_.sample(slot, plan.wants_entropy);
      slot.is_finished = !result.is_finite || result.finish != SlotFinish::kRunning;
    }
    for (size_t s = 0; s < plan.scores.size(); ++s) {
      const ScoreRow& score = plan.scores[s];
      if (score.row != row) continue;
      const int32_t position = plan.positions[static_cast<size_t>(row)] + 1;
      step.result.scores[s] = sampler_.score(score.token, position, score.temperature);
    }
  }
  step.has_head_results = true;
}

}  // namespace
}  // namespace reference

std::unique_ptr<Backend> make_reference_backend(const ModelShape& shape,
                                                const BackendOptions& options) {
  check_shape(shape);
  reference::check_options(options);
  return std::make_unique<reference::ReferenceBackend>(shape, options);
}

}  // namespace rollpack::kernels
