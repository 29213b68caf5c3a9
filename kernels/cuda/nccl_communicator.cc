#include "kernels/cuda/nccl_communicator.h"

#include <fmt/format.h>

#include <algorithm>
#include <span>
#include <thread>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/cuda/column_moves.h"

namespace rollpack::kernels::cuda {
namespace {

using Clock = std::chrono::steady_clock;

// A state is asked for again and again, after a while with pauses.
constexpr std::chrono::microseconds kEagerTime{200};
constexpr std::chrono::microseconds kPause{50};
// NCCL looks at the whole machine first, and loads its kernels.
constexpr std::chrono::milliseconds kShortestInit{60000};
// Padded parts begin at whole vectors of the kernel that moves columns.
constexpr int64_t kPartAlignment = 16;

NcclType type_of(Number number) {
  switch (number) {
    case Number::kU8:
      return NcclType::kU8;
    case Number::kI32:
      return NcclType::kI32;
    case Number::kI64:
      return NcclType::kI64;
    case Number::kU32:
      return NcclType::kU32;
    case Number::kU64:
      return NcclType::kU64;
    case Number::kF32:
      return NcclType::kF32;
    case Number::kF64:
      return NcclType::kF64;
  }
  fail_invariant("a number of no type");
}

NcclOp op_of(const AllReduceArgs& args) {
  if (args.reduction == Reduction::kMax) return NcclOp::kMax;
  if (args.reduction == Reduction::kMin) return NcclOp::kMin;
  if (args.number == Number::kF32 || args.number == Number::kF64) {
    fail_invariant("a sum of floats would depend on the number of ranks");
  }
  return NcclOp::kSum;
}

}  // namespace

// Measures a call now and then and takes it for all since the one before: an event more on either
// side of every call would cost as much as a small gather.
template <class Call>
void NcclCommunicator::timed(const Call& call) {
  constexpr int64_t kPeriod = 7;  // in turn all four gathers of a layer
  if (is_measuring_ && device_.has_passed(end_)) {
    is_measuring_ = false;
    const double measured = device_.seconds_between(begin_, end_);
    seconds_.store(seconds() + static_cast<double>(num_measured_) * measured,
                   std::memory_order_relaxed);
  }
  const bool is_measured = ++num_calls_ % kPeriod == 0 && !is_measuring_;
  if (is_measured) device_.record(begin_, stream_);
  call();
  if (!is_measured) return;
  device_.record(end_, stream_);
  is_measuring_ = true;
  num_measured_ = std::exchange(num_calls_, 0);
}

NcclCommunicator::NcclCommunicator(Device& device, Stream stream,
                                   std::shared_ptr<Communicator> host, NcclOptions options)
    : device_(device),
      stream_(stream),
      host_(std::move(host)),
      options_(std::move(options)),
      begin_(device, /*is_timed=*/true),
      end_(device, /*is_timed=*/true),
      workspace_(device, kExchangeBytes, "what ranks exchange") {
  if (size() > kMaxGatherRanks) {
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = "engine.tensor_model_parallel_size",
                 .value = std::to_string(size()),
                 .allowed = fmt::format("at most {} on devices", kMaxGatherRanks)});
  }
  host_->barrier();  // names who does not come, as NCCL would not
  NcclConfig config;
  const NcclResult result =
      options_.library->comm_init_rank_config(&comm_, size(), options_.id, rank(), &config);
  try {
    settle(result, "ncclCommInitRankConfig", std::max(host_->timeout(), kShortestInit));
  } catch (...) {
    abort();
    throw;
  }
}

NcclCommunicator::~NcclCommunicator() {
  abort();  // steps have ended: it only gives back what the communicator has
}

std::string NcclCommunicator::description() const {
  return fmt::format("by {}", options_.library->version_text());
}

void NcclCommunicator::settle(NcclResult result, const char* call,
                              std::chrono::milliseconds limit) {
  const Clock::time_point begin = Clock::now();
  while (result == NcclResult::kInProgress) {
    const NcclResult asked = options_.library->comm_get_async_error(comm_, &result);
    if (asked != NcclResult::kSuccess) result = asked;
    if (result != NcclResult::kInProgress) break;
    if (const int32_t lost = host_->find_lost_rank(); lost >= 0) fail_lost(call, lost);
    const auto taken = Clock::now() - begin;
    if (taken > limit) fail_late(call, limit);
    // It is mostly taken at once.
    if (taken < kEagerTime)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(kPause);
  }
  if (result != NcclResult::kSuccess) fail(call, options_.library->text_of(result, comm_));
}

void NcclCommunicator::require_whole(const char* call) const {
  if (comm_ != nullptr) return;
  throw Error({.code = ErrorCode::kFailedPrecondition,
               .field = call,
               .message = "an earlier call between the ranks of this replica has failed"});
}

void NcclCommunicator::gather_columns(const GatherColumnsArgs& args) {
  require_whole("gather_columns");
  int64_t widest = 0;
  for (size_t peer = 0; peer + 1 < args.starts.size(); ++peer) {
    widest = std::max(widest, args.starts[peer + 1] - args.starts[peer]);
  }
  if (args.rows == 0 || widest == 0) return;
  timed([&] { gather_parts(args, widest); });
}

void NcclCommunicator::gather_parts(const GatherColumnsArgs& args, int64_t widest) {
  const int64_t pitch = (widest + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
  if (pitch * size() > workspace_.bytes()) {
    fail_invariant("gather_columns: a row longer than the workspace");
  }
  const int64_t at_once = std::min(workspace_.bytes() / (pitch * size()), args.rows);
  const auto own = static_cast<size_t>(rank());
  MoveColumnsInputs pack{.num_parts = 1,
                         .starts = {0, args.starts[own + 1] - args.starts[own]},
                         .source_stride = args.in_stride,
                         .target_stride = pitch};
  MoveColumnsInputs place{.num_parts = size(),
                          .source = workspace_.as<>(),
                          .source_stride = pitch,
                          .target_stride = args.out_stride};
  std::ranges::copy(args.starts, place.starts);
  for (int64_t row = 0; row < args.rows; row += at_once) {
    const int64_t count = std::min(at_once, args.rows - row), part = count * pitch;
    pack.num_rows = place.num_rows = count;
    pack.source = static_cast<const std::byte*>(args.in) + row * args.in_stride;
    pack.target = workspace_.as<>() + rank() * part;
    device_.kernels().move_columns(stream_, pack);
    settle(options_.library->all_gather(pack.target, workspace_.as<>(), static_cast<size_t>(part),
                                        NcclType::kU8, comm_, stream_.handle),
           "ncclAllGather", host_->timeout());
    place.source_part = part;
    place.target = static_cast<std::byte*>(args.out) + row * args.out_stride;
    device_.kernels().move_columns(stream_, place);
  }
}

void NcclCommunicator::broadcast(std::span<std::byte> values, int32_t root) {
  require_whole("broadcast");
  if (values.empty()) return;
  timed([&] {
    settle(options_.library->broadcast(values.data(), values.data(), values.size(), NcclType::kU8,
                                       root, comm_, stream_.handle),
           "ncclBroadcast", host_->timeout());
  });
}

void NcclCommunicator::barrier() {
  require_whole("barrier");
  host_->barrier();
}

void NcclCommunicator::reduce(const AllReduceArgs& args) {
  require_whole("all_reduce");
  const NcclOp op = op_of(args);
  if (args.count == 0) return;
  timed([&] {
    settle(options_.library->all_reduce(args.values, args.values, static_cast<size_t>(args.count),
                                        type_of(args.number), op, comm_, stream_.handle),
           "ncclAllReduce", host_->timeout());
  });
}

void NcclCommunicator::require_unbroken() {
  constexpr const char* kWork = "exchange between devices";
  require_whole(kWork);
  NcclResult state = NcclResult::kSuccess;
  const NcclResult asked = options_.library->comm_get_async_error(comm_, &state);
  if (asked != NcclResult::kSuccess) state = asked;
  if (state != NcclResult::kSuccess && state != NcclResult::kInProgress) {
    fail(kWork, options_.library->text_of(state, comm_));
  }
  if (const int32_t lost = host_->find_lost_rank(); lost >= 0) fail_lost(kWork, lost);
}

void NcclCommunicator::check(Clock::time_point since) {
  require_unbroken();
  if (Clock::now() - since > host_->timeout()) {
    fail_late("exchange between devices", host_->timeout());
  }
}

void NcclCommunicator::abandon() {
  host_->abandon();
  abort();
}

void NcclCommunicator::abort() {
  if (comm_ != nullptr) options_.library->comm_abort(std::exchange(comm_, nullptr));
}

void NcclCommunicator::fail(const std::string& call, const std::string& reason) {
  abandon();
  throw Error({.code = ErrorCode::kUnavailable, .field = call, .message = reason});
}

void NcclCommunicator::fail_late(const std::string& call, std::chrono::milliseconds limit) {
  ErrorInfo info{.code = ErrorCode::kUnavailable,
                 .field = call,
                 .message = fmt::format("it has not ended in {} ms", limit.count())};
  try {
    // Ranks that are there have met the same, and come here.
    host_->barrier();
  } catch (const Error& missing) {
    info.value = missing.info.value;
  }
  abandon();
  throw Error(std::move(info));
}

void NcclCommunicator::fail_lost(const std::string& call, int32_t lost) {
  abandon();
  throw Error({.code = ErrorCode::kUnavailable,
               .field = call,
               .value = fmt::format("rank {} of {} ranks of this replica is missing", lost, size()),
               .message = "it has failed, or its process has ended"});
}

}  // namespace rollpack::kernels::cuda
