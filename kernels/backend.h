// The abstract device: memory, opaque weights, the ops of a transformer step, and the step queue.
// Every implementation (reference, cpu, later cuda) keeps one promise:
//
//   Rows do not influence each other's bits. What an op writes for a row depends on that row (and,
//   in attention, on the keys its sequence may see) alone: never on the other rows of the step,
//   their number or order, on page placement, or on the number of threads.
//
// How a step runs: the engine hands a StepPlan to submit(); the backend makes the plan visible to
// its ops (row metadata in backend memory), then runs the StepProgram, which calls the ops below in
// order. Ops take a struct of named members, write into memory that the caller owns, and never
// allocate. The forward pass is therefore written once, over this interface.
//
// Threading: all calls from one thread at a time, except the ops, which only the program calls.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/communicator/communicator.h"
#include "kernels/shards.h"
#include "kernels/step_plan.h"
#include "kernels/tensor.h"
#include "kernels/weight_source.h"

namespace rollpack::kernels {

// What a backend must know of a model to lay out its memory. Lengths in tokens.
struct ModelShape {
  int64_t D = 0, H = 0, G = 0, K = 0, F = 0, V = 0, L = 0;
  DType dtype = DType::kBF16;  // compute: kBF16 or kF32
};

struct BackendOptions {
  int32_t num_threads = 0;  // 0: what usable_cores() advises
  // Of the equal processes that compute on the same CPUs, all of them and which this one is: where
  // memory has nodes, their threads are spread over those.
  int32_t num_processes = 1;
  int32_t process_index = 0;
  // Of the processes on this machine that each compute on a device of their own, which this one is.
  int32_t rank_on_node = 0;
  int64_t kv_cache_bytes = 0;
  int32_t max_num_seqs = 256;             // sequence slots
  int32_t max_num_batched_tokens = 2048;  // token rows of one step
  bool shared_weights = false;            // stage weights in memory that other processes can map
  // A device launches every kernel of every step, instead of graphs captured at start.
  bool enforce_eager = false;
  // On the CPU, products of bf16 weights by Intel's AMX: bits of their own.
  bool cpu_amx = false;
  // Of the ranks that hold one model together (kernels/shards.h), all of which are given the same
  // plans; none: this backend holds a whole one.
  std::shared_ptr<Communicator> communicator;
  // What one of them has made with make_device_link() (registry.h), so that their devices reach
  // each other; empty: through host memory.
  std::vector<std::byte> device_link;

  ReplicaRank at() const { return communicator ? communicator->at() : ReplicaRank{}; }
};

// The backend's own layout of KV pages; the engine only counts them.
struct KvLayout {
  DType dtype = DType::kBF16;
  int32_t page_tokens = 16;  // divides 256, the attention chunk
  int64_t page_bytes = 0;    // K and V of page_tokens tokens, all layers
  int32_t num_pages = 0;     // pages the engine may name: [0, num_pages)
};

// Bytes this backend holds or will hold for a model and options, before anything is allocated.
struct MemoryPlan {
  int64_t weight_bytes = 0;   // one packed copy
  int64_t staging_bytes = 0;  // a second copy while an update is staged
  int64_t kv_bytes = 0;
  int64_t activation_bytes = 0;
};

struct BackendInfo {
  std::string name;  // "cpu", "reference"
  // e.g. "cpu: avx512_bf16, 2 threads, weights in 2 MiB pages", the last part from the first commit
  std::string description;
  std::string fingerprint;  // two backends with equal fingerprints give equal bits
  KvLayout kv;
  MemoryPlan memory;
  // Row counts, ascending, to which the backend itself fills up steps that only decode, so that it
  // can enqueue them as a whole; empty: it does not.
  std::vector<int32_t> row_buckets;
  // Steps that it profits from having in flight: 2 where it computes while the host does something
  // else, so that the next step is planned meanwhile.
  int32_t max_steps_under_way = 1;
};

// Parts of a backend's memory that sleep and wake on their own.
struct MemoryTags {
  bool weights = false;
  bool kv_cache = false;
};

// Memory of the backend; on the CPU `data` is an ordinary pointer.
struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
};

// ---- weights ------------------------------------------------------------------------------------

enum class WeightKind : uint8_t {
  kLinear,     // [N, K_in] used by linear(); parts are stacked along N (Q, K, V)
  kGated,      // gate and up, of equal N; linear() with Epilogue::kGated gives N / 2 columns
  kEmbedding,  // [V, D] used by embed(), and by lm_head() when the head is tied
  kLmHead,     // [V, D] used by lm_head() only
  kVector,     // [1, N] rounded to the compute dtype, held as f32 (norms, biases), stacked
};

struct WeightSpec {
  std::string name;  // for errors, e.g. "layers.3.qkv"
  WeightKind kind = WeightKind::kLinear;
  std::vector<int64_t> part_rows;  // rows (kVector: elements) of each part, full and unsharded
  int64_t cols = 0;                // 1 for kVector
  std::vector<ShardRange> shards;  // rows of each part that this rank holds; empty: all of them
};

using WeightId = int32_t;
inline constexpr WeightId kNoWeight = -1;

// ---- ops ----------------------------------------------------------------------------------------

// out[t] = row input_ids[t] of the embedding (the slot's token where it is pending), from
// whichever rank holds it.
struct EmbedArgs {
  WeightId weight = kNoWeight;
  Tensor out;  // [T, D] f32, the residual stream
};

// out = in / sqrt(mean(in^2) + epsilon) * weight, rounded once to out's dtype.
// Numerics: one fixed lane tree a row; sqrt and division, no reciprocal approximations.
// Source: Zhang and Sennrich, "Root mean square layer normalization", NeurIPS 2019.
struct RmsNormArgs {
  WeightId weight = kNoWeight;  // kVector [D]
  float epsilon = 1e-6f;
  Tensor in;   // [rows, D] f32
  Tensor out;  // [rows, D] compute dtype
};

enum class Epilogue : uint8_t {
  kNone,      // out = acc (+ bias)
  kGated,     // out[n] = silu(gate[n]) * up[n], rounded once; weight must be kGated
  kResidual,  // out += acc (+ bias)
};

// acc[t][n] = sum over k ascending of in[t][k] * weight[n][k], one f32 chain an element. N counts
// the rows of the weight that this rank holds; out may be wider: gather_columns() fills the rest.
struct LinearArgs {
  WeightId weight = kNoWeight;
  WeightId bias = kNoWeight;  // kVector [N]; added to the finished sum, before the epilogue
  Epilogue epilogue = Epilogue::kNone;
  Tensor in;   // [rows, K_in] compute dtype
  Tensor out;  // [rows, N] f32 for kNone and kResidual; [rows, N / 2] compute dtype for kGated
  int64_t out_begin = 0;  // column of out that the first of the weight goes to
};

// Splits qkv into heads, normalises Q and K heads where asked (Qwen3), rotates Q and K by position,
// writes K and V into the step's pages and Q out. Rotation pairs are (i, i + K / 2). H and G are
// this rank's.
// Errors: a non-finite K or V row marks its sequence failed and writes zeros.
// Source: Su et al., "RoFormer", arXiv:2104.09864, in the half-split form of Llama.
struct RopeAppendArgs {
  int32_t layer = 0;
  Tensor qkv;                   // [T, (H + 2 G) K] f32: Q heads, then K heads, then V heads
  Tensor rope_table;            // [positions, K] f32: cos in [0, K / 2), sin in [K / 2, K)
  WeightId q_norm = kNoWeight;  // kVector [K], or none
  WeightId k_norm = kNoWeight;
  float norm_epsilon = 1e-6f;
  Tensor q;  // [T, H K] compute dtype
};

// Causal attention of the step's rows over their page tables.
// Numerics: keys in chunks of 256 at absolute positions, chunks merged left to right; see
// kernels/README.md. A pad row's output is 0.
struct AttentionArgs {
  int32_t layer = 0;
  int32_t window = 0;     // key j is visible to row i iff i - j < window; 0: all keys
  Tensor q;               // [T, H K] compute dtype
  Tensor out;             // [T, H K] compute dtype; on several ranks as wide as the heads of all
  int64_t out_begin = 0;  // column of out that this rank's first head goes to
};

// Completes a tensor of which each rank of the replica has written its own columns.
struct GatherColumnsOpArgs {
  Tensor tensor;                    // [rows, cols]
  std::span<const int64_t> starts;  // [ranks + 1] columns: of each rank, and the end
};

// Copies the distinct rows that the plan samples or scores, ascending, to the front of out.
struct GatherHeadRowsArgs {
  Tensor in;   // [T, D] f32
  Tensor out;  // [num_head_rows, D] f32
};

// Logits of the gathered rows against the vocabulary, and from them, without keeping the logits,
// the sampled tokens, logprobs and entropies of the step; they become the StepResult.
// Numerics and sampling order: kernels/README.md.
struct LmHeadArgs {
  WeightId weight = kNoWeight;  // kLmHead or a tied kEmbedding
  Tensor in;                    // [num_head_rows, D] compute dtype, after the final norm
};

// ---- steps --------------------------------------------------------------------------------------

// Number of the step in submission order, from 1. Later handles complete later.
using StepHandle = uint64_t;

using Deadline = std::chrono::steady_clock::time_point;

class Backend;

// The forward pass: enqueues the ops of one step.
class StepProgram {
 public:
  virtual ~StepProgram() = default;
  virtual void run(Backend& backend, int64_t num_rows, int64_t num_head_rows) = 0;

  // Whether what run() enqueues depends on its arguments alone, and stays valid as long as the
  // program does: a backend may then run it once for row counts of its choice, up to the most rows
  // of a step, and enqueue the same again for steps of as many.
  virtual bool is_replayable() const { return false; }
  // Instead of run(): what it would enqueue was enqueued again.
  virtual void on_replay() {}
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const BackendInfo& info() const = 0;

  // Memory. alloc zero-fills; upload and download return when the copy is done.
  virtual Buffer alloc(int64_t bytes) = 0;
  virtual void free(Buffer buffer) = 0;
  virtual void upload(Buffer target, const void* source, int64_t bytes) = 0;
  virtual void download(void* target, Buffer source, int64_t bytes) = 0;
  virtual void sync() = 0;

  // Weights. Declare all, then stage, load and commit as often as weights change. Staged weights
  // are a shadow set: steps keep using the committed one, bit-unchanged, until commit_weights(),
  // which takes effect between two steps. Ids stay valid for ever.
  virtual WeightId declare_weight(const WeightSpec& spec) = 0;
  virtual void begin_staging() = 0;
  // Packs `source` ([part_rows, cols], any float dtype, the full part) into the staged set,
  // rounding to the compute dtype; only rows `shard` of it are read and kept, which are those of
  // the weight's spec where that names some.
  // Errors: those of the source; the part counts as not loaded then.
  virtual void load_weight(WeightId id, int32_t part, const WeightSource& source,
                           ShardRange shard) = 0;
  void load_weight(WeightId id, int32_t part, const ConstTensor& tensor, ShardRange shard) {
    load_weight(id, part, TensorSource(tensor), shard);
  }
  // Starts the staged set as a copy of the committed one, for updates of some tensors only.
  virtual void copy_committed_to_staged() = 0;
  virtual void commit_weights() = 0;
  virtual void discard_weights() = 0;
  // 64-bit hash of the committed packed weights, as the ops really use them. Read from memory once
  // a set: what staged_weights_hash() found goes with the set that it was asked for.
  virtual uint64_t weights_hash() = 0;
  // What weights_hash() will say once the staged set is committed. Alone of the calls about weights
  // this one and export_staged_weights() may run beside steps, on a thread of their own; no other
  // call about weights meanwhile.
  // Errors: failed_precondition when nothing is staged, or not all of it.
  virtual uint64_t staged_weights_hash() = 0;
  // Sharing a staged set between the processes of a node: the one that packed it exports a sealed
  // descriptor (the backend keeps ownership), the others adopt it as their staged set.
  virtual int export_staged_weights() = 0;
  virtual void adopt_staged_weights(int fd) = 0;

  // Gives memory back to the system until wake_up(), while no step is under way and nothing is
  // staged. Level 1 drops KV pages and keeps the weights where they cost no device memory (on the
  // CPU: where they are); level 2 drops both, after which no weights are committed until a whole
  // set is. What sleeps already stays as it is. Steps are failed_precondition while anything
  // sleeps. Errors: failed_precondition where level 2 finds a set staged; resource_exhausted where
  // the weights that level 1 keeps fit nowhere.
  virtual void sleep(int level) = 0;
  // Takes it again, at the same addresses where anything depends on them; pages hold zeros, weights
  // what level 1 has kept. What is awake stays as it is.
  // Errors: resource_exhausted where others have taken the memory meanwhile: it sleeps on.
  virtual void wake_up(MemoryTags tags) = 0;
  // Bytes of weights, KV pages and buffers that this backend has of its own now; adopted weights
  // are another's.
  virtual int64_t held_bytes() const = 0;
  // Time that steps have spent exchanging with the other ranks that hold the model, and waiting for
  // them, seconds so far. Any thread.
  virtual double communication_s() const { return 0; }

  // Steps. submit never blocks and takes at most two steps in flight (failed_precondition beyond);
  // it owns the plan until the step is done. wait returns the result or throws: the step's own
  // error, or deadline_exceeded with the step still running. Pages and slots named by a step may
  // be used again by any later step: steps run in order.
  virtual void set_program(std::shared_ptr<StepProgram> program) = 0;
  virtual StepHandle submit(StepPlan plan) = 0;
  virtual bool poll(StepHandle handle) = 0;
  virtual StepResult wait(StepHandle handle, Deadline deadline) = 0;

  // Ops; see the Args structs. Called by the program only.
  virtual void embed(const EmbedArgs& args) = 0;
  virtual void rms_norm(const RmsNormArgs& args) = 0;
  virtual void linear(const LinearArgs& args) = 0;
  virtual void rope_append(const RopeAppendArgs& args) = 0;
  virtual void attention(const AttentionArgs& args) = 0;
  virtual void gather_head_rows(const GatherHeadRowsArgs& args) = 0;
  virtual void lm_head(const LmHeadArgs& args) = 0;
  // Where the model is held by several ranks only.
  virtual void gather_columns(const GatherColumnsOpArgs&) {
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = "engine.tensor_model_parallel_size",
                 .message = "this backend does not share a model with other ranks"});
  }
};

}  // namespace rollpack::kernels
