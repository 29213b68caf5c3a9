#include "rollout/tensor_parallel/leader_backend.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <numeric>
#include <utility>

#include <fmt/format.h>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"
#include "rollout/tensor_parallel/plain_bytes.h"
#include "rollout/tensor_parallel/plan_codec.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;
using kernels::ShardRange;
using kernels::WeightId;

// Packing a tensor or reading a whole checkpoint from a cold disk takes minutes; longer than this,
// a rank is stuck. Rank 0's leases are shorter wherever they apply.
constexpr auto kCallTimeout = 30min;
// A follower takes plans up between steps, and two may be under way.
constexpr auto kPlanTimeout = 10min;
// Bytes of a tensor that travel at a time: well below what a frame may have.
constexpr int64_t kPieceBytes = int64_t{4} << 20;

bridge::Deadline after(std::chrono::steady_clock::duration time) {
  return std::chrono::steady_clock::now() + time;
}

[[noreturn]] void refuse_sharing() {
  throw Error({.code = ErrorCode::kUnsupported,
               .field = "engine.share_weights",
               .allowed = "off where engine.tensor_model_parallel_size is not 1",
               .message = "ranks that hold different parts of the weights cannot share a copy"});
}

}  // namespace

LeaderBackend::LeaderBackend(std::unique_ptr<kernels::Backend> inner,
                             std::shared_ptr<FollowerLinks> followers, bridge::Deadline deadline)
    : ForwardingBackend(std::move(inner)), followers_(std::move(followers)) {
  num_pages_ = this->inner().info().kv.num_pages;
  ready_.resize(static_cast<size_t>(followers_->size()));
  for (int32_t rank = 1; rank < followers_->size(); ++rank) {
    FollowerReady& ready = ready_[static_cast<size_t>(rank)];
    ready = followers_->wait_ready(rank, deadline);
    num_pages_ = std::min(num_pages_, ready.num_pages);
    const std::string& own = this->inner().info().fingerprint;
    if (ready.fingerprint == own) continue;
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = fmt::format("backend of rank {} of a replica", rank),
                 .value = ready.fingerprint,
                 .allowed = own,
                 .message = "all ranks of a job must give the same bits"});
  }
  refresh_info();
}

LeaderBackend::~LeaderBackend() {
  inner().sync();
  inner().set_program(nullptr);  // while this is whole: a program may free its buffers here
}

void LeaderBackend::refresh_info() {
  info_ = inner().info();
  info_.kv.num_pages = num_pages_;
  info_.description += fmt::format(", 1 of {} ranks that hold the model", followers_->size());
}

template <class Own>
std::vector<uint64_t> LeaderBackend::on_all(Request request, const Own& own,
                                            std::span<const uint8_t> body) {
  const std::lock_guard lock(call_mutex_);
  followers_->send_all(request, body, after(kCallTimeout));
  std::exception_ptr failure;
  try {
    own();
  } catch (...) {
    failure = std::current_exception();
  }
  // All answers are taken, whatever they are: the next call's come after them.
  std::vector<uint64_t> answers;
  for (int32_t rank = 1; rank < followers_->size(); ++rank) {
    try {
      answers.push_back(followers_->receive(rank, after(kCallTimeout)));
    } catch (...) {
      if (!failure) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
  return answers;
}

void LeaderBackend::load_checkpoints(Replica& replica) {
  is_loading_files_ = true;
  try {
    on_all(Request::kLoadCheckpoint, [&] { replica.load_checkpoint(); });
  } catch (...) {
    is_loading_files_ = false;
    throw;
  }
  is_loading_files_ = false;
}

WeightId LeaderBackend::declare_weight(const kernels::WeightSpec& spec) {
  const WeightId id = inner().declare_weight(spec);
  is_vector_.resize(static_cast<size_t>(id) + 1);
  is_vector_[static_cast<size_t>(id)] = spec.kind == kernels::WeightKind::kVector;
  refresh_info();
  return id;
}

void LeaderBackend::begin_staging() {
  if (is_loading_files_) return inner().begin_staging();
  on_all(Request::kBeginStaging, [&] { inner().begin_staging(); });
}

// Sends a follower the rows that it holds. A source that fails leaves it without an order.
void LeaderBackend::send_share(int32_t rank, WeightId id, int32_t part,
                               const kernels::WeightSource& source) {
  const auto& shards = ready_[static_cast<size_t>(rank)].shards.at(static_cast<size_t>(id));
  const bool is_vector = is_vector_[static_cast<size_t>(id)];
  const ShardRange wanted = shards.empty()
                                ? ShardRange{0, is_vector ? source.num_elements() : source.rows}
                                : shards.at(static_cast<size_t>(part));
  // A vector is one row, and small: it travels whole.
  const ShardRange rows = is_vector ? ShardRange{0, source.rows} : wanted;
  const int64_t at_once = std::max<int64_t>(1, kPieceBytes / source.row_bytes());
  std::vector<std::byte> scratch;
  for (int64_t row = rows.begin; row < rows.end; row += at_once) {
    const int64_t end = std::min(row + at_once, rows.end);
    const auto* bytes = reinterpret_cast<const uint8_t*>(source.read_rows(row, end, scratch));
    std::vector<uint8_t> piece = {row == rows.begin};
    piece.insert(piece.end(), bytes, bytes + (end - row) * source.row_bytes());
    followers_->send(rank, Request::kTensorBytes, piece, after(kCallTimeout));
  }
  std::vector<uint8_t> body;
  PlainWriter writer(body);
  writer.value(TensorOrder{.weight = id,
                           .part = part,
                           .dtype = source.dtype,
                           .rows = source.rows,
                           .cols = source.cols,
                           .sent = rows,
                           .shard = wanted});
  followers_->send(rank, Request::kLoad, body, after(kCallTimeout));
}

void LeaderBackend::load_weight(WeightId id, int32_t part, const kernels::WeightSource& source,
                                ShardRange shard) {
  if (is_loading_files_) return inner().load_weight(id, part, source, shard);
  const std::lock_guard lock(call_mutex_);
  std::exception_ptr failure;
  int32_t end_rank = 1;  // of those that answer
  try {
    for (; end_rank < followers_->size(); ++end_rank) send_share(end_rank, id, part, source);
    inner().load_weight(id, part, source, shard);
  } catch (...) {
    failure = std::current_exception();
  }
  for (int32_t rank = 1; rank < end_rank; ++rank) {
    try {
      followers_->receive(rank, after(kCallTimeout));
    } catch (...) {
      if (!failure) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

void LeaderBackend::copy_committed_to_staged() {
  on_all(Request::kCopyCommitted, [&] { inner().copy_committed_to_staged(); });
}

void LeaderBackend::commit_weights() {
  keep_held_bytes(on_all(Request::kCommit, [&] { inner().commit_weights(); }));
  refresh_info();
}

void LeaderBackend::discard_weights() {
  on_all(Request::kDiscard, [&] { inner().discard_weights(); });
}

template <class Hash>
uint64_t LeaderBackend::combined(Request request, const Hash& own) {
  uint64_t first = 0;
  std::vector<uint64_t> hashes = on_all(request, [&] { first = own(); });
  hashes.insert(hashes.begin(), first);
  return hash64(std::as_bytes(std::span(hashes)));
}

uint64_t LeaderBackend::weights_hash() {
  return combined(Request::kCommittedHash, [&] { return inner().weights_hash(); });
}

uint64_t LeaderBackend::staged_weights_hash() {
  return combined(Request::kStagedHash, [&] { return inner().staged_weights_hash(); });
}

int LeaderBackend::export_staged_weights() {
  refuse_sharing();
}

void LeaderBackend::adopt_staged_weights(int) {
  refuse_sharing();
}

void LeaderBackend::sleep(int level) {
  const std::array body{static_cast<uint8_t>(level)};
  keep_held_bytes(on_all(
      Request::kSleep, [&] { inner().sleep(level); }, body));
}

void LeaderBackend::wake_up(kernels::MemoryTags tags) {
  const std::array body{byte_of(tags)};
  keep_held_bytes(on_all(
      Request::kWakeUp, [&] { inner().wake_up(tags); }, body));
}

void LeaderBackend::keep_held_bytes(const std::vector<uint64_t>& answers) {
  followers_held_bytes_ =
      static_cast<int64_t>(std::accumulate(answers.begin(), answers.end(), uint64_t{0}));
}

int64_t LeaderBackend::held_bytes() const {
  return ForwardingBackend::held_bytes() + followers_held_bytes_;
}

kernels::StepHandle LeaderBackend::submit(kernels::StepPlan plan) {
  std::vector<uint8_t> body;
  encode_plan(plan, body);
  // Here first: a plan that this rank refuses must not reach the others.
  const kernels::StepHandle handle = inner().submit(std::move(plan));
  try {
    followers_->send_all(Request::kPlan, body, after(kPlanTimeout));
  } catch (...) {
    followers_->give_up();
    throw;
  }
  return handle;
}

kernels::StepResult LeaderBackend::wait(kernels::StepHandle handle, kernels::Deadline deadline) {
  try {
    return inner().wait(handle, deadline);
  } catch (const Error& error) {
    // Late is the wait alone, and the step goes on.
    if (error.info.code != ErrorCode::kDeadlineExceeded) followers_->give_up();
    throw;
  }
}

}  // namespace rollpack::rollout
