#include "kernels/cuda/cuda_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/decode_graphs.h"
#include "kernels/cuda/device_link.h"
#include "kernels/cuda/graph_buckets.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/lm_head.h"
#include "kernels/cuda/memory_plan.h"
#include "kernels/cuda/step_context.h"
#include "kernels/cuda/weight_store.h"
#include "kernels/step/check_shape.h"
#include "kernels/step/check_tensor.h"
#include "kernels/step/gather_op.h"
#include "kernels/step/step_queue.h"

namespace rollpack::kernels {
namespace cuda {
namespace {

// A step takes milliseconds; one that takes this long never ends.
constexpr std::chrono::minutes kStepLimit{2};

Deadline step_deadline() {
  return std::chrono::steady_clock::now() + kStepLimit;
}

void check_options(const BackendOptions& options) {
  if (options.max_num_seqs <= 0 || options.max_num_batched_tokens <= 0) {
    throw Error(
        {.code = ErrorCode::kInvalidArgument,
         .field = "engine.max_num_seqs, max_num_batched_tokens",
         .value = fmt::format("{}, {}", options.max_num_seqs, options.max_num_batched_tokens),
         .allowed = "positive numbers"});
  }
}

// What ranks exchange is no part of a graph yet.
BackendOptions without_useless_graphs(BackendOptions options) {
  if (options.at().size > 1) options.enforce_eager = true;
  return options;
}

void* column(const Tensor& tensor, int64_t index) {
  return tensor.as<std::byte>() + index * dtype_bytes(tensor.dtype);
}

[[noreturn]] void refuse(std::string call, std::string reason) {
  throw Error(
      {.code = ErrorCode::kUnsupported, .field = std::move(call), .message = std::move(reason)});
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::unique_ptr<Device> device, const ModelShape& shape,
              const BackendOptions& options, const OpenNccl& open_nccl)
      : shape_(held_shape(shape, options.at())),
        options_(without_useless_graphs(options)),
        vocabulary_(vocabulary_part(shape, options.at())),
        device_(std::move(device)),
        kernels_(device_->kernels()),
        memory_(plan_memory(shape, options_, estimated_weight_bytes(shape, options.at()),
                            {device_->info().total_bytes, device_->free_bytes()})),
        stream_(*device_),
        copies_(*device_),
        ranks_(options.at().size > 1 ? link_devices(*device_, stream_, options.communicator,
                                                    options.device_link, open_nccl)
                                     : nullptr),
        weights_(*device_, shape.dtype, memory_.staging > 0),
        pages_(*device_, memory_.kv_cache, "engine.kv_cache_memory"),
        cache_{.data = pages_.as<>(),
               .num_pages = memory_.num_pages,
               .G = static_cast<int32_t>(shape_.G),
               .K = static_cast<int32_t>(shape_.K),
               .row_stride = kv_row_stride(shape_)},
        step_(*device_, shape_, options_, cache_),
        linear_workspace_(*device_, kLinearWorkspaceBytes, "partial sums"),
        attention_workspace_(*device_, attention_workspace_bytes(shape_), "attention"),
        head_workspace_(*device_, lm_head_workspace_bytes(shape_, options_), "the head"),
        graphs_(*device_, graph_buckets(options_), memory_.graphs),
        queue_(StepQueue::DeviceRun{
            .begin = [this](const StepPlan& plan, StepProgram& program) { begin(plan, program); },
            .end = [this] { return end(); }}) {
    describe();
  }

  ~CudaBackend() override {
    queue_.close();
    graphs_.clear();
    program_.reset();  // while this is whole: a program may free its buffers here
  }

  const BackendInfo& info() const override { return info_; }

  Buffer alloc(int64_t bytes) override {
    device_->bind_thread();
    const Buffer buffer{device_->alloc(bytes, "alloc"), bytes};
    buffer_bytes_ += bytes;
    return buffer;
  }
  void free(Buffer buffer) override {
    queue_.drain();  // a step in flight may still use it
    buffer_bytes_ -= buffer.bytes;
    device_->bind_thread();
    device_->free(buffer.data);
  }
  void upload(Buffer target, const void* source, int64_t bytes) override {
    queue_.drain();
    if (bytes > target.bytes) fail_invariant("upload: more bytes than the buffer has");
    device_->bind_thread();
    device_->copy_to_device(copies_, target.data, source, bytes);
    device_->wait(copies_, step_deadline());
  }
  void download(void* target, Buffer source, int64_t bytes) override {
    queue_.drain();
    if (bytes > source.bytes) fail_invariant("download: more bytes than the buffer has");
    device_->bind_thread();
    device_->copy_to_host(copies_, target, source.data, bytes);
    device_->wait(copies_, step_deadline());
  }
  void sync() override { queue_.drain(); }

  WeightId declare_weight(const WeightSpec& spec) override {
    const WeightId id = weights_.declare(spec);
    info_.memory.weight_bytes = weights_.set_bytes();
    info_.memory.staging_bytes = weights_.set_bytes();
    return id;
  }
  void begin_staging() override {
    device_->bind_thread();
    weights_.begin_staging();
  }
  void load_weight(WeightId id, int32_t part, const WeightSource& source,
                   ShardRange shard) override {
    device_->bind_thread();
    weights_.load(id, part, source, shard);
  }
  void copy_committed_to_staged() override {
    device_->bind_thread();
    weights_.copy_committed_to_staged();
  }
  void commit_weights() override {
    weights_.require_complete();
    queue_.drain();  // steps keep the weights they were submitted under
    device_->bind_thread();
    weights_.commit();
    capture_graphs();
  }
  void discard_weights() override { weights_.discard(); }
  uint64_t weights_hash() override {
    device_->bind_thread();
    return weights_.committed_hash();
  }
  uint64_t staged_weights_hash() override {
    device_->bind_thread();
    return weights_.staged_hash();
  }
  int export_staged_weights() override {
    refuse("engine.share_weights", "the cuda backend keeps its weights in its device's memory");
  }
  void adopt_staged_weights(int) override {
    refuse("engine.share_weights", "the cuda backend keeps its weights in its device's memory");
  }

  void sleep(int level) override {
    queue_.drain();
    device_->bind_thread();
    weights_.sleep(/*keeps_copy=*/level == 1);
    pages_.give_back();
  }
  void wake_up(MemoryTags tags) override {
    device_->bind_thread();
    if (tags.weights) weights_.wake_up();
    if (tags.kv_cache) pages_.take();
  }
  int64_t held_bytes() const override {
    return weights_.held_bytes() + pages_.held_bytes() + memory_.workspaces + memory_.steps +
           graphs_.bytes() + buffer_bytes_;
  }

  double communication_s() const override { return ranks_ ? ranks_->seconds() : 0; }

  void set_program(std::shared_ptr<StepProgram> program) override {
    if (!graphs_.is_empty()) {
      queue_.drain();  // steps of the old program may be graphs
      device_->bind_thread();
      graphs_.clear();
      describe();
    }
    are_graphs_tried_ = false;
    program_ = std::move(program);
    if (program_ && weights_.has_committed()) capture_graphs();
  }
  StepHandle submit(StepPlan plan) override { return queue_.submit(std::move(plan), program_); }
  bool poll(StepHandle handle) override { return queue_.poll(handle); }
  StepResult wait(StepHandle handle, Deadline deadline) override {
    return queue_.wait(handle, deadline);
  }

  void embed(const EmbedArgs& args) override;
  void rms_norm(const RmsNormArgs& args) override;
  void linear(const LinearArgs& args) override;
  void rope_append(const RopeAppendArgs& args) override;
  void attention(const AttentionArgs& args) override;
  void gather_head_rows(const GatherHeadRowsArgs& args) override;
  void lm_head(const LmHeadArgs& args) override;
  void gather_columns(const GatherColumnsOpArgs& args) override;

 private:
  void describe();
  void begin(const StepPlan& plan, StepProgram& program);
  void enqueue(StepProgram& program);
  std::optional<StepResult> end();
  void capture_graphs();
  // A step has failed here, whose parts other ranks wait for. What all ranks refuse alike is no
  // such step.
  void leave_others() {
    if (ranks_ != nullptr) ranks_->abandon();
  }
  StepAddresses addresses() const {
    return {step_.rows(), step_.head(), step_.attention_work(), step_.head_queries()};
  }
  void check_layer(int32_t layer, const char* op) const;
  const float* optional_vector(WeightId id, int64_t size, const char* op) const {
    return id == kNoWeight ? nullptr : weights_.vector(id, size, op);
  }

  // A matrix with a row for every token held: ids of a step are checked against V, not against it.
  DeviceMatrix vocabulary(WeightId id, const char* op) const {
    const DeviceMatrix matrix = weights_.matrix(id, op);
    if (matrix.is_gated || matrix.N != vocabulary_.held.size()) {
      throw Error({.code = ErrorCode::kInvalidArgument,
                   .field = fmt::format("{} weight", op),
                   .value = fmt::format("{} rows", matrix.N),
                   .allowed = fmt::format("a plain matrix of {} rows", vocabulary_.held.size())});
    }
    return matrix;
  }

  const ModelShape shape_;  // H and G are this rank's
  const BackendOptions options_;
  const VocabularyPart vocabulary_;
  std::unique_ptr<Device> device_;
  const KernelSet& kernels_;
  BackendInfo info_;
  const DeviceMemoryPlan memory_;
  OwnStream stream_;                                 // of steps
  OwnStream copies_;                                 // of upload and download
  const std::unique_ptr<DeviceCommunicator> ranks_;  // that hold the model with this one, or null
  WeightStore weights_;
  DeviceRange pages_;
  int64_t buffer_bytes_ = 0;
  const KvCache cache_;
  StepContext step_;
  DeviceMemory linear_workspace_, attention_workspace_, head_workspace_;
  DecodeGraphs graphs_;
  bool are_graphs_tried_ = false;  // of the program
  // A step that goes further is enqueued kernel by kernel, for rope_append to refuse it.
  int64_t num_graph_positions_ = 0;
  bool has_head_results_ = false;
  uint64_t step_number_ = 0;
  Deadline step_due_;  // of the oldest step handed over
  std::shared_ptr<StepProgram> program_;
  StepQueue queue_;  // last: its thread uses all of the above
};

void CudaBackend::describe() {
  info_.name = "cuda";
  info_.description = fmt::format("cuda: {}, weights are staged {}", device_->info().description,
                                  memory_.staging > 0 ? "on the device" : "on the host");
  info_.fingerprint =
      fmt::format("cuda-v1 {} {}", device_->info().fingerprint, dtype_name(shape_.dtype));
  info_.kv = {.dtype = shape_.dtype,
              .page_tokens = kPageTokens,
              .page_bytes = kv_page_bytes(shape_),
              .num_pages = memory_.num_pages};
  info_.memory = {.weight_bytes = memory_.weights,
                  .staging_bytes = memory_.weights,
                  .kv_bytes = memory_.kv_cache,
                  .activation_bytes =
                      memory_.activations + memory_.workspaces + memory_.steps + memory_.graphs};
  info_.row_buckets = graphs_.buckets();
  if (ranks_ != nullptr) {
    info_.description += fmt::format(
        ", columns of other ranks {}, without graphs of decoding steps", ranks_->description());
  } else if (!graphs_.is_empty()) {
    info_.description += ", " + graphs_.description();
  } else if (are_graphs_tried_) {
    info_.description += ", no room for graphs of decoding steps";
  }
  info_.max_steps_under_way = kMaxStepsUnderWay;
}

// Errors of the device say which step's kernels it was.
Error of_step(const Error& error, uint64_t number) {
  if (error.info.field.rfind("device", 0) != 0) return error;
  ErrorInfo info = error.info;
  info.field = fmt::format("step {}, {}", number, info.field);
  return Error(std::move(info));
}

void CudaBackend::begin(const StepPlan& plan, StepProgram& program) {
  ++step_number_;
  if (!weights_.has_committed()) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "step",
                 .message = "no weights are committed yet"});
  }
  if (weights_.is_asleep() || !pages_.has_memory()) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "step",
                 .message = "weights or KV pages sleep; wake_up first"});
  }
  if (!step_.has_step()) step_due_ = step_deadline();
  try {
    device_->bind_thread();
    const int32_t graph_rows = graphs_.rows_of(plan);
    step_.begin(stream_, plan, graph_rows);
    if (graph_rows > 0 && step_.is_in_place() && step_.highest_position() < num_graph_positions_) {
      graphs_.launch(stream_, step_.place(), addresses());
      program.on_replay();
    } else {
      enqueue(program);
    }
    step_.hand_over(stream_, step_number_);
  } catch (const Error& error) {
    // A plan that is wrong all ranks refuse; where one alone fails, its exchanges would meet those
    // of another step.
    if (error.info.code != ErrorCode::kInvalidArgument) leave_others();
    step_.abandon(stream_, step_deadline());
    throw of_step(error, step_number_);
  } catch (...) {
    leave_others();
    step_.abandon(stream_, step_deadline());
    throw;
  }
}

void CudaBackend::enqueue(StepProgram& program) {
  has_head_results_ = false;
  program.run(*this, step_.num_rows(), step_.head().num_rows);
  // Keys and values of a row fail where some rank's heads do.
  if (ranks_ != nullptr && step_.num_rows() > 0) {
    ranks_->all_reduce<Reduction::kMax>(
        std::span(step_.rows().row_failed, static_cast<size_t>(step_.num_rows())));
  }
  if (step_.head().num_rows > 0 && !has_head_results_) {
    fail_invariant("the step's program did not run lm_head, though rows are sampled or scored");
  }
}

// Once a program, when weights are there too; both stay where they are until the program changes,
// over sleep too.
void CudaBackend::capture_graphs() {
  if (options_.enforce_eager || are_graphs_tried_ || !program_ || !program_->is_replayable()) {
    return;
  }
  are_graphs_tried_ = true;
  queue_.drain();
  device_->bind_thread();
  num_graph_positions_ = std::numeric_limits<int64_t>::max();
  const auto capture = [this](size_t place, int32_t rows) {
    step_.begin_capture(place, rows);
    try {
      enqueue(*program_);
    } catch (...) {
      step_.end_capture();
      throw;
    }
    step_.end_capture();
    return addresses();
  };
  try {
    graphs_.capture(stream_, capture);
  } catch (const Error& error) {
    // Others on the device have taken the room: steps are the same kernel by kernel.
    if (error.info.code != ErrorCode::kResourceExhausted) throw;
  }
  describe();
}

std::optional<StepResult> CudaBackend::end() {
  const uint64_t number = step_.number();
  std::optional<StepResult> result;
  try {
    result = step_.take_result();
    if (result) {
      if (ranks_ != nullptr) ranks_->require_unbroken();
      step_due_ = step_deadline();
      return result;
    }
    if (ranks_ != nullptr) ranks_->check(step_due_ - kStepLimit);
    if (std::chrono::steady_clock::now() > step_due_) {
      throw Error(
          {.code = ErrorCode::kUnavailable,
           .field = "device, work on a stream",
           .message = fmt::format("it has not ended after {} minutes", kStepLimit.count())});
    }
    return result;
  } catch (const Error& error) {
    leave_others();
    if (!result) step_.forget_step();
    throw of_step(error, number);
  }
}

void CudaBackend::check_layer(int32_t layer, const char* op) const {
  if (layer < 0 || layer >= shape_.L) fail_invariant(fmt::format("{}: no layer {}", op, layer));
}

void CudaBackend::embed(const EmbedArgs& args) {
  const DeviceMatrix matrix = vocabulary(args.weight, "embed");
  expect_shape(args.out, step_.num_rows(), matrix.K_in, "embed out");
  kernels_.embed(stream_, {.rows = step_.rows(),
                           .slots = step_.slots(),
                           .weight = matrix,
                           .first_token = vocabulary_.held.begin,
                           .dtype = shape_.dtype,
                           .out = args.out.as<float>()});
  if (ranks_ == nullptr) return;
  // One rank has each row, all others have zeros: the sum of their bits is the row.
  const auto count = static_cast<size_t>(args.out.num_elements());
  ranks_->all_reduce<Reduction::kSum>(std::span(args.out.as<uint32_t>(), count));
}

void CudaBackend::rms_norm(const RmsNormArgs& args) {
  step_.num_rows();
  expect_shape(args.out, args.in.rows(), args.in.cols(), "rms_norm out");
  kernels_.rms_norm(stream_, {.num_rows = args.in.rows(),
                              .width = args.in.cols(),
                              .epsilon = args.epsilon,
                              .weight = weights_.vector(args.weight, args.in.cols(), "rms_norm"),
                              .in = args.in.as<float>(),
                              .out = args.out.data,
                              .dtype = shape_.dtype});
}

void CudaBackend::linear(const LinearArgs& args) {
  step_.num_rows();
  const DeviceMatrix matrix = weights_.matrix(args.weight, "linear");
  if (matrix.is_gated != (args.epilogue == Epilogue::kGated)) {
    fail_invariant("linear: a gated weight and the gated epilogue go together");
  }
  expect_shape(args.in, args.in.rows(), matrix.K_in, "linear in");
  expect_columns(args.out, args.in.rows(), args.out_begin, matrix.N, ranks_ == nullptr,
                 "linear out");
  const int64_t bias_size = matrix.N * (matrix.is_gated ? 2 : 1);
  kernels_.linear(stream_, {.weight = matrix,
                            .slices = weights_.slices(args.weight),
                            .epilogue = args.epilogue,
                            .dtype = shape_.dtype,
                            .num_rows = args.in.rows(),
                            .bias = optional_vector(args.bias, bias_size, "linear"),
                            .in = args.in.data,
                            .out = column(args.out, args.out_begin),
                            .out_stride = args.out.cols(),
                            .workspace = linear_workspace_.as<>()});
}

void CudaBackend::rope_append(const RopeAppendArgs& args) {
  const int64_t rows = step_.num_rows();
  check_layer(args.layer, "rope_append");
  expect_shape(args.qkv, rows, (shape_.H + 2 * shape_.G) * shape_.K, "rope_append qkv");
  expect_shape(args.q, rows, shape_.H * shape_.K, "rope_append q");
  expect_shape(args.rope_table, args.rope_table.rows(), shape_.K, "rope_append rope_table");
  if (step_.highest_position() >= args.rope_table.rows()) {
    throw Error(
        {.code = ErrorCode::kInvalidArgument,
         .field = "plan.positions",
         .value = std::to_string(step_.highest_position()),
         .allowed = fmt::format("below {}, the rows of the rope table", args.rope_table.rows())});
  }
  num_graph_positions_ = std::min(num_graph_positions_, args.rope_table.rows());
  kernels_.rope_append(stream_, {.rows = step_.rows(),
                                 .cache = cache_,
                                 .layer = args.layer,
                                 .H = static_cast<int32_t>(shape_.H),
                                 .qkv = args.qkv.as<float>(),
                                 .rope_table = args.rope_table.as<float>(),
                                 .q_norm = optional_vector(args.q_norm, shape_.K, "rope_append"),
                                 .k_norm = optional_vector(args.k_norm, shape_.K, "rope_append"),
                                 .norm_epsilon = args.norm_epsilon,
                                 .q = args.q.data,
                                 .dtype = shape_.dtype});
}

void CudaBackend::attention(const AttentionArgs& args) {
  check_layer(args.layer, "attention");
  expect_shape(args.q, step_.num_rows(), shape_.H * shape_.K, "attention q");
  expect_columns(args.out, step_.num_rows(), args.out_begin, shape_.H * shape_.K, ranks_ == nullptr,
                 "attention out");
  kernels_.attention(stream_, {.rows = step_.rows(),
                               .cache = cache_,
                               .work = step_.attention_work(),
                               .layer = args.layer,
                               .window = args.window,
                               .H = static_cast<int32_t>(shape_.H),
                               .dtype = shape_.dtype,
                               .q = args.q.data,
                               .out = column(args.out, args.out_begin),
                               .out_stride = args.out.cols(),
                               .workspace = attention_workspace_.as<>(),
                               .max_shared_bytes = device_->info().max_shared_bytes});
}

void CudaBackend::gather_head_rows(const GatherHeadRowsArgs& args) {
  expect_shape(args.in, step_.num_rows(), args.in.cols(), "gather_head_rows in");
  expect_shape(args.out, step_.head().num_rows, args.in.cols(), "gather_head_rows out");
  kernels_.gather_rows(stream_, {.head = step_.head(),
                                 .width = args.in.cols(),
                                 .in = args.in.as<float>(),
                                 .out = args.out.as<float>()});
}

void CudaBackend::lm_head(const LmHeadArgs& args) {
  const DeviceMatrix matrix = vocabulary(args.weight, "lm_head");
  step_.num_rows();  // an op outside of a step is an error
  expect_shape(args.in, step_.head().num_rows, matrix.K_in, "lm_head in");
  kernels_.lm_head(stream_, {.rows = step_.rows(),
                             .head = step_.head(),
                             .slots = step_.slots(),
                             .weight = matrix,
                             .part = vocabulary_,
                             .ranks = ranks_.get(),
                             .dtype = shape_.dtype,
                             .in = args.in.data,
                             .workspace = head_workspace_.as<>(),
                             .max_rows = lm_head_group_rows(options_),
                             .queries = step_.head_queries(),
                             .groups = step_.head_groups()});
  has_head_results_ = true;
}

void CudaBackend::gather_columns(const GatherColumnsOpArgs& args) {
  if (ranks_ == nullptr) return Backend::gather_columns(args);
  gather_tensor(*ranks_, args);
}

}  // namespace
}  // namespace cuda

std::unique_ptr<Backend> make_cuda_backend(std::unique_ptr<cuda::Device> device,
                                           const ModelShape& shape, const BackendOptions& options,
                                           const cuda::OpenNccl& open_nccl) {
  check_shape(shape, cuda::kMaxHeadWidth);
  cuda::check_options(options);
  return std::make_unique<cuda::CudaBackend>(std::move(device), shape, options, open_nccl);
}

}  // namespace rollpack::kernels
