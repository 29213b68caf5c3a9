#include "kernels/cpu/cpu_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/float_mode.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/kv_pages.h"
#include "kernels/cpu/panel_products.h"
#include "kernels/cpu/path_check.h"
#include "kernels/cpu/row_ops.h"
#include "kernels/cpu/step_context.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/vocab_head.h"
#include "kernels/cpu/weight_store.h"
#include "kernels/step/check_shape.h"
#include "kernels/step/check_tensor.h"
#include "kernels/step/draft_draws.h"
#include "kernels/step/gather_op.h"
#include "kernels/step/step_queue.h"
#include "kernels/usable_cores.h"

namespace rollpack::kernels {
namespace cpu {
namespace {

void check_options(const BackendOptions& options) {
  if (options.max_num_seqs <= 0 || options.max_num_batched_tokens <= 0 || options.num_threads < 0) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "engine.max_num_seqs, max_num_batched_tokens, num_threads",
                 .value = fmt::format("{}, {}, {}", options.max_num_seqs,
                                      options.max_num_batched_tokens, options.num_threads),
                 .allowed = "positive numbers; 0 threads for all CPUs"});
  }
}

// The best path, or the one asked for, that keeps to the numerics contract on this machine.
PathChoice choose_kernels(const CpuOptions& cpu_options) {
  std::vector<Isa> isas = supported_isas();
  const auto wanted = cpu_options.isa ? std::ranges::find(isas, *cpu_options.isa) : isas.begin();
  if (wanted == isas.end()) {
    std::string names;
    for (const Isa isa : isas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = "isa",
                 .value = std::string(isa_name(*cpu_options.isa)),
                 .allowed = names,
                 .message = "this machine lacks the instructions"});
  }
  std::vector<const KernelTable*> candidates;
  for (auto isa = wanted; isa != isas.end(); ++isa) candidates.push_back(&kernel_table(*isa));
  return choose_path(candidates);
}

bool has_slow_pairs(const KernelTable& kernels, const ModelShape& shape,
                    const CpuOptions& cpu_options) {
  if (shape.dtype != DType::kBF16) return false;
  return cpu_options.widens_products ? *cpu_options.widens_products : widening_pays(kernels);
}

void check_amx(const ModelShape& shape) {
  const auto refuse = [](const char* allowed, const char* message) {
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = "engine.cpu_amx",
                 .value = "true",
                 .allowed = allowed,
                 .message = message});
  };
  if (shape.dtype != DType::kBF16) refuse("false in float32", "its products are of bfloat16");
  if (!amx_is_available()) {
    refuse("false here",
           "this processor has no AMX, or the system does not let this process use it");
  }
  if (!amx_agrees_with_scalar()) {
    refuse("false here", "this processor's AMX sums otherwise than Intel documents");
  }
}

PairPath pair_path(const ModelShape& shape, const BackendOptions& options, bool has_slow_pairs) {
  if (!options.cpu_amx) return has_slow_pairs ? PairPath::kWidened : PairPath::kPairs;
  check_amx(shape);
  return PairPath::kAmx;
}

ThreadPool make_pool(const BackendOptions& options) {
  const int num_threads =
      options.num_threads > 0 ? options.num_threads : usable_cores().num_threads();
  return ThreadPool(num_threads, spread_over_nodes(cpus_by_node(affinity_cpus()), num_threads,
                                                   options.process_index, options.num_processes));
}

template <class Element>
class CpuBackend final : public Backend {
 public:
  CpuBackend(const ModelShape& shape, const BackendOptions& options, const PathChoice& path,
             const CpuOptions& cpu_options)
      : shape_(held_shape(shape, options.at())),
        options_(options),
        communicator_(options.communicator),
        vocabulary_(communicator_ ? vocabulary_shard(shape.V, communicator_->at())
                                  : ShardRange{0, shape.V}),
        cpu_options_(cpu_options),
        kernels_(*path.kernels),
        pool_(make_pool(options)),
        weights_(kernels_, shape.dtype, options.shared_weights),
        pages_(shape_, options.kv_cache_bytes),
        step_(shape_, options, pages_.num_pages()),
        has_slow_pairs_(has_slow_pairs(kernels_, shape, cpu_options)),
        products_(kernels_, pool_.num_threads(), pair_path(shape, options, has_slow_pairs_)),
        attention_(kernels_, pair_kernels(kernels_, has_slow_pairs_), shape_, pages_,
                   pool_.num_threads()),
        head_(kernels_, products_, pool_.num_threads(), VocabExchange(communicator_, shape.V)),
        queue_([this](const StepPlan& plan, StepProgram& program) { return run(plan, program); }) {
    describe(path);
  }

  ~CpuBackend() override {
    queue_.close();
    program_.reset();  // while this is whole: a program may free its buffers here
  }

  const BackendInfo& info() const override { return info_; }

  Buffer alloc(int64_t bytes) override {
    // Whole cache lines, so that no two buffers share one.
    const size_t size = (static_cast<size_t>(std::max<int64_t>(bytes, 1)) + 63) / 64 * 64;
    void* data = bytes >= 0 ? std::aligned_alloc(64, size) : nullptr;
    if (data == nullptr) {
      throw Error({.code = ErrorCode::kResourceExhausted,
                   .field = "alloc",
                   .value = fmt::format("{} bytes", bytes),
                   .message = "the system has no such memory"});
    }
    std::memset(data, 0, size);
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
    info_.memory.weight_bytes = weights_.set_bytes();
    info_.memory.staging_bytes = weights_.set_bytes();
    return id;
  }
  void begin_staging() override { weights_.begin_staging(); }
  void load_weight(WeightId id, int32_t part, const WeightSource& source,
                   ShardRange shard) override {
    with_idle_pool([&](ThreadPool* pool) { weights_.load(id, part, source, shard, pool); });
  }
  void copy_committed_to_staged() override {
    with_idle_pool([&](ThreadPool* pool) { weights_.copy_committed_to_staged(pool); });
  }
  void commit_weights() override {
    weights_.require_complete();
    queue_.drain();  // steps keep the weights they were submitted under
    weights_.commit();
    if (!std::exchange(is_memory_described_, true)) describe_memory();
  }
  void discard_weights() override { weights_.discard(); }
  uint64_t weights_hash() override {
    uint64_t hash = 0;
    with_idle_pool([&](ThreadPool* pool) { hash = weights_.committed_hash(pool); });
    return hash;
  }
  uint64_t staged_weights_hash() override { return weights_.staged_hash(); }
  int export_staged_weights() override { return weights_.export_staged(); }
  void adopt_staged_weights(int fd) override { weights_.adopt_staged(fd); }

  // There is no other place for weights than where they are: level 1 leaves them there. A dropped
  // set has no addresses to come back to, as every commit brings memory of its own.
  void sleep(int level) override {
    queue_.drain();
    if (level > 1) weights_.drop();
    pages_.sleep();
  }
  void wake_up(MemoryTags tags) override {
    if (tags.kv_cache) pages_.wake_up();
  }
  int64_t held_bytes() const override {
    return weights_.held_bytes() + pages_.held_bytes() + buffer_bytes_;
  }

  double communication_s() const override { return communicator_ ? communicator_->seconds() : 0; }

  void set_program(std::shared_ptr<StepProgram> program) override { program_ = std::move(program); }
  StepHandle submit(StepPlan plan) override { return queue_.submit(std::move(plan), program_); }
  bool poll(StepHandle handle) override { return queue_.poll(handle); }
  StepResult wait(StepHandle handle, Deadline deadline) override {
    return queue_.wait(handle, deadline);
  }

  void embed(const EmbedArgs& args) override {
    const PackedMatrix matrix = vocabulary(args.weight, "embed");
    expect_shape(args.out, step_.plan().num_rows(), matrix.K_in, "embed out");
    embed_rows(pool_, step_, matrix, vocabulary_, args.out);
    if (communicator_ == nullptr) return;
    // One rank has each row, all others have zeros: the sum of their bits is the row.
    const auto count = static_cast<size_t>(args.out.num_elements());
    communicator_->all_reduce<Reduction::kSum>(std::span(args.out.as<uint32_t>(), count));
  }
  void rms_norm(const RmsNormArgs& args) override {
    expect_shape(args.out, args.in.rows(), args.in.cols(), "rms_norm out");
    rms_norm_rows<Element>(kernels_, pool_,
                           weights_.vector(args.weight, args.in.cols(), "rms_norm"), args.epsilon,
                           args.in, args.out);
  }
  void linear(const LinearArgs& args) override;
  void rope_append(const RopeAppendArgs& args) override;
  void attention(const AttentionArgs& args) override {
    expect_shape(args.q, step_.plan().num_rows(), shape_.H * shape_.K, "attention q");
    expect_columns(args.out, step_.plan().num_rows(), args.out_begin, shape_.H * shape_.K,
                   communicator_ == nullptr, "attention out");
    attention_.run(pool_, step_, args);
  }
  void gather_head_rows(const GatherHeadRowsArgs& args) override;
  void lm_head(const LmHeadArgs& args) override;
  void gather_columns(const GatherColumnsOpArgs& args) override;

 private:
  void describe(const PathChoice& path);
  void describe_memory();
  StepResult run(const StepPlan& plan, StepProgram& program);
  const float* optional_vector(WeightId id, int64_t size, const char* op) const {
    return id == kNoWeight ? nullptr : weights_.vector(id, size, op);
  }

  // A matrix with a row for every token held: ids of a step are checked against V, not against it.
  PackedMatrix vocabulary(WeightId id, const char* op) const {
    const PackedMatrix matrix = weights_.matrix(id, op);
    if (matrix.is_gated || matrix.columns != vocabulary_.size()) {
      throw Error({.code = ErrorCode::kInvalidArgument,
                   .field = fmt::format("{} weight", op),
                   .value = fmt::format("{} rows", matrix.columns),
                   .allowed = fmt::format("a plain matrix of {} rows", vocabulary_.size())});
    }
    return matrix;
  }

  // Calls work with the pool if no step runs, else with null: work on weights must neither wait for
  // a step nor take its threads.
  template <class Work>
  void with_idle_pool(Work work) {
    const std::unique_lock lock(pool_mutex_, std::try_to_lock);
    const ThreadPool::CallerAtPlace here(pool_);  // weights lie where they are packed
    work(lock.owns_lock() ? &pool_ : nullptr);
  }

  const ModelShape shape_;  // H and G are this rank's
  const BackendOptions options_;
  const std::shared_ptr<Communicator> communicator_;  // none: the model is this rank's alone
  const ShardRange vocabulary_;                       // held here
  const CpuOptions cpu_options_;
  const KernelTable& kernels_;
  BackendInfo info_;
  ThreadPool pool_;
  std::mutex pool_mutex_;  // held by the thread that calls parallel_for
  WeightStore weights_;
  KvPages pages_;
  StepContext step_;
  const bool has_slow_pairs_;
  PanelProducts<Element> products_;
  Attention<Element> attention_;
  VocabHead<Element> head_;
  bool has_head_results_ = false;
  bool is_memory_described_ = false;
  int64_t buffer_bytes_ = 0;
  std::vector<Element> padded_rows_;  // inputs of an odd width, in whole steps
  std::shared_ptr<StepProgram> program_;
  StepQueue queue_;  // last: its thread uses all of the above
};

template <class Element>
void CpuBackend<Element>::describe(const PathChoice& path) {
  info_.name = "cpu";
  info_.description =
      fmt::format("cpu: {}, {} threads", isa_name(kernels_.isa), pool_.num_threads());
  if (products_.widens()) info_.description += ", products of many rows in f32 FMAs";
  if (!path.refused.empty()) {
    info_.description +=
        fmt::format(" ({} refused: its products differ from scalar code here)", path.refused);
  }
  if (options_.cpu_amx) info_.description += ", products by AMX";
  // Neither instruction set nor threads: they change no bit. AMX does.
  info_.fingerprint =
      fmt::format("cpu-v1 {}{}", dtype_name(shape_.dtype), options_.cpu_amx ? " amx-v1" : "");
  info_.kv = {.dtype = shape_.dtype,
              .page_tokens = kPageTokens,
              .page_bytes = pages_.page_bytes(),
              .num_pages = pages_.num_pages()};
  const int64_t element = dtype_bytes(shape_.dtype);
  const ModelShape& s = shape_;
  // Until weights are declared: a model with a tied head and no biases.
  const int64_t layer = (s.H + 2 * s.G) * s.K * s.D + s.H * s.K * s.D + 3 * s.D * s.F;
  const int64_t num_ranks = communicator_ ? communicator_->size() : 1;
  info_.memory.weight_bytes =
      (s.V * s.D + s.L * layer) * element / num_ranks + (2 * s.L + 1) * s.D * 4;
  info_.memory.staging_bytes = info_.memory.weight_bytes;
  info_.memory.kv_bytes = pages_.page_bytes() * pages_.num_pages();
  // A row: residual, its norm, Q K V in f32, rotated Q and attention output, gated F; an input in
  // f32 where products widen it; threads' own.
  int64_t row =
      s.D * (4 + element) + (s.H + 2 * s.G) * s.K * 4 + 2 * s.H * s.K * element + s.F * element;
  if (products_.widens()) row += std::max({s.D, s.F, s.H * s.K}) * 4;
  info_.memory.activation_bytes =
      row * options_.max_num_batched_tokens + attention_.workspace_bytes() * pool_.num_threads();
}

// What the system granted shows only once the memory is used: by then the weights are packed.
template <class Element>
void CpuBackend<Element>::describe_memory() {
  const double share = weights_.huge_page_share();
  info_.description += share > 0.99 ? ", weights in 2 MiB pages"
                                    : fmt::format(
                                          ", {:.0f} % of the weights in 2 MiB pages: the "
                                          "rest streams about 1.6 times slower",
                                          share * 100);
}

template <class Element>
StepResult CpuBackend<Element>::run(const StepPlan& plan, StepProgram& program) {
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
  flush_subnormals();  // this is the driver's thread, and it computes too
  const ThreadPool::CallerAtPlace here(pool_);
  const std::lock_guard lock(pool_mutex_);
  step_.begin(plan);
  has_head_results_ = false;
  copy_pages(pool_, plan, pages_);
  if (cpu_options_.before_rows) cpu_options_.before_rows(plan, pages_);
  try {
    program.run(*this, plan.num_rows(), static_cast<int64_t>(step_.head_rows.size()));
    // Keys and values of a row fail where some rank's heads do.
    if (communicator_ && !step_.row_failed.empty()) {
      communicator_->all_reduce<Reduction::kMax>(std::span(step_.row_failed));
    }
  } catch (...) {
    step_.end();
    if (communicator_) communicator_->abandon();  // others wait for this rank's part
    throw;
  }
  step_.end();
  if (!step_.head_rows.empty() && !has_head_results_) {
    fail_invariant("the step's program did not run lm_head, though rows are sampled or scored");
  }
  find_failed_sequences(plan, step_.row_failed, step_.result);
  return std::move(step_.result);
}

template <class Element>
void CpuBackend<Element>::linear(const LinearArgs& args) {
  const PackedMatrix matrix = weights_.matrix(args.weight, "linear");
  if (matrix.is_gated != (args.epilogue == Epilogue::kGated)) {
    fail_invariant("linear: a gated weight and the gated epilogue go together");
  }
  expect_shape(args.in, args.in.rows(), matrix.K_in, "linear in");
  expect_columns(args.out, args.in.rows(), args.out_begin, matrix.columns, communicator_ == nullptr,
                 "linear out");
  const int64_t bias_size = matrix.columns * (matrix.is_gated ? 2 : 1);
  gemm<Element>(kernels_, pool_, products_, whole_steps<Element>(args.in, padded_rows_),
                {.weight = matrix,
                 .epilogue = args.epilogue,
                 .bias = optional_vector(args.bias, bias_size, "linear"),
                 .out = args.out.as<std::byte>() + args.out_begin * dtype_bytes(args.out.dtype),
                 .out_stride = args.out.cols()});
}

template <class Element>
void CpuBackend<Element>::rope_append(const RopeAppendArgs& args) {
  const int64_t rows = step_.plan().num_rows();
  if (args.layer < 0 || args.layer >= shape_.L) fail_invariant("rope_append: no such layer");
  expect_shape(args.qkv, rows, (shape_.H + 2 * shape_.G) * shape_.K, "rope_append qkv");
  expect_shape(args.q, rows, shape_.H * shape_.K, "rope_append q");
  expect_shape(args.rope_table, args.rope_table.rows(), shape_.K, "rope_append rope_table");
  rope_append_rows<Element>(kernels_, pool_, step_, shape_, pages_, args,
                            {.q_norm = optional_vector(args.q_norm, shape_.K, "rope_append"),
                             .k_norm = optional_vector(args.k_norm, shape_.K, "rope_append")});
}

template <class Element>
void CpuBackend<Element>::gather_head_rows(const GatherHeadRowsArgs& args) {
  const auto rows = static_cast<int64_t>(step_.head_rows.size());
  expect_shape(args.in, step_.plan().num_rows(), args.in.cols(), "gather_head_rows in");
  expect_shape(args.out, rows, args.in.cols(), "gather_head_rows out");
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = step_.head_rows[static_cast<size_t>(i)];
    std::copy_n(args.in.as<float>() + row * args.in.cols(), args.in.cols(),
                args.out.as<float>() + i * args.in.cols());
  }
}

template <class Element>
void CpuBackend<Element>::lm_head(const LmHeadArgs& args) {
  const PackedMatrix matrix = vocabulary(args.weight, "lm_head");
  step_.plan();  // an op outside of a step is an error
  expect_shape(args.in, static_cast<int64_t>(step_.head_rows.size()), matrix.K_in, "lm_head in");
  head_.run(pool_, step_, matrix, whole_steps<Element>(args.in, padded_rows_));
  has_head_results_ = true;
}

template <class Element>
void CpuBackend<Element>::gather_columns(const GatherColumnsOpArgs& args) {
  if (communicator_ == nullptr) return Backend::gather_columns(args);
  gather_tensor(*communicator_, args);
}

}  // namespace
}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(const ModelShape& shape, const BackendOptions& options) {
  return make_cpu_backend(shape, options, {});
}

std::unique_ptr<Backend> make_cpu_backend(const ModelShape& shape, const BackendOptions& options,
                                          const CpuOptions& cpu_options) {
  check_shape(shape, cpu::kMaxHeadWidth);
  cpu::check_options(options);
  const cpu::PathChoice path = cpu::choose_kernels(cpu_options);
  if (shape.dtype == DType::kBF16) {
    return std::make_unique<cpu::CpuBackend<uint16_t>>(shape, options, path, cpu_options);
  }
  return std::make_unique<cpu::CpuBackend<float>>(shape, options, path, cpu_options);
}

}  // namespace rollpack::kernels
