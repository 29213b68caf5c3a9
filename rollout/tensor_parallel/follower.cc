#include "rollout/tensor_parallel/follower.h"

#include <poll.h>

#include <cerrno>
#include <chrono>
#include <deque>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/communicator/shared_memory_communicator.h"
#include "kernels/forwarding_backend.h"
#include "rollout/tensor_parallel/follower_links.h"
#include "rollout/tensor_parallel/plain_bytes.h"
#include "rollout/tensor_parallel/plan_codec.h"
#include "trainer_bridge/wire/frame.h"
#include "trainer_bridge/wire/message.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;
using kernels::ShardRange;

// The leader reads answers while it waits for them; what piles up here is one answer.
constexpr auto kReplyTimeout = 60s;
// How often a rank with steps under way looks whether one has failed.
constexpr int kStepInterval_ms = 20;
// A frame that has begun is whole soon: both ends are on one host.
constexpr auto kFrameTimeout = 60s;
// Longer than any step: the collectives inside have deadlines of their own.
constexpr auto kStepTimeout = 10min;

// Remembers which rows of each weight the model declares for this rank.
class DeclaringBackend final : public kernels::ForwardingBackend {
 public:
  explicit DeclaringBackend(std::unique_ptr<kernels::Backend> inner)
      : ForwardingBackend(std::move(inner)) {}
  ~DeclaringBackend() override {
    inner().sync();
    inner().set_program(nullptr);  // while this is whole: a program may free its buffers here
  }

  kernels::WeightId declare_weight(const kernels::WeightSpec& spec) override {
    shards.push_back(spec.shards);
    return inner().declare_weight(spec);
  }

  std::vector<std::vector<ShardRange>> shards;
};

// Rows [sent.begin, sent.end) of a tensor, as they came.
class ReceivedRows final : public kernels::WeightSource {
 public:
  ReceivedRows(const TensorOrder& order, const std::vector<uint8_t>& bytes)
      : WeightSource(order.dtype, order.rows, order.cols), first_(order.sent.begin), bytes_(bytes) {
    if (static_cast<int64_t>(bytes.size()) != order.sent.size() * row_bytes()) {
      throw Error({.code = ErrorCode::kDataLoss,
                   .field = "tensor from the leader",
                   .message = "other bytes came than its rows have"});
    }
  }

  const std::byte* read_rows(int64_t begin, int64_t, std::vector<std::byte>&) const override {
    return reinterpret_cast<const std::byte*>(bytes_.data()) + (begin - first_) * row_bytes();
  }

 private:
  const int64_t first_;
  const std::vector<uint8_t>& bytes_;
};

class Follower {
 public:
  Follower(bridge::OwnedFd leader, Replica& replica)
      : leader_(std::move(leader)), replica_(replica) {}
  ~Follower() {
    if (check_.joinable()) check_.join();
  }

  void tell_ready(FollowerReady ready) { send(Reply::kDone, ready.encode()); }

  void run() {
    while (wait_for_frame()) {
      const std::optional<bridge::Frame> frame =
          bridge::receive_frame(leader_.get(), std::chrono::steady_clock::now() + kFrameTimeout);
      if (!frame) return;
      if (frame->body.empty()) fail_invariant("a request of the leader's has a kind");
      handle(static_cast<Request>(frame->body[0]), std::span(frame->body).subspan(1));
    }
  }

  void tell_failure(const ErrorInfo& error) {
    try {
      send(Reply::kFailed, bridge::encode_message(bridge::error_to_map(error)));
    } catch (const Error&) {
      // The leader is gone too.
    }
  }

 private:
  // False: the leader has gone. Looks after steps meanwhile. Errors: those of a step.
  bool wait_for_frame() {
    for (;;) {
      take_finished_steps();
      pollfd waiting{.fd = leader_.get(), .events = POLLIN, .revents = 0};
      const int ready = ::poll(&waiting, 1, steps_.empty() ? -1 : kStepInterval_ms);
      if (ready < 0 && errno != EINTR) return false;
      if (ready > 0) return true;  // its end is read as one
    }
  }

  void take_finished_steps() {
    while (!steps_.empty() && replica_.backend().poll(steps_.front())) wait_for_step();
  }

  void wait_for_step() {
    replica_.backend().wait(steps_.front(), std::chrono::steady_clock::now() + kStepTimeout);
    steps_.pop_front();
  }

  void handle(Request request, std::span<const uint8_t> body) {
    kernels::Backend& backend = replica_.backend();
    switch (request) {
      case Request::kPlan:
        if (steps_.size() == 2) wait_for_step();  // the leader has had its result
        steps_.push_back(backend.submit(decode_plan(body)));
        return;
      case Request::kTensorBytes:
        // Of one that the leader could not read to its end no kLoad came.
        if (body.empty()) fail_invariant("a piece says whether it is the first");
        if (body[0] != 0) tensor_.clear();
        tensor_.insert(tensor_.end(), body.begin() + 1, body.end());
        return;
      case Request::kLoad:
        return answer([&] { load(body); });
      case Request::kLoadCheckpoint:
        return answer([&] { replica_.load_checkpoint(); });
      case Request::kBeginStaging:
        return answer([&] { backend.begin_staging(); });
      case Request::kCopyCommitted:
        return answer([&] { backend.copy_committed_to_staged(); });
      case Request::kCommit:
        return answer([&] { backend.commit_weights(); });
      case Request::kDiscard:
        return answer([&] { backend.discard_weights(); });
      case Request::kCommittedHash:
        return answer_hash([&] { return backend.weights_hash(); });
      case Request::kStagedHash:
        // Beside the steps, as at the leader.
        if (check_.joinable()) check_.join();
        check_ = std::thread(
            [this, &backend] { answer_hash([&] { return backend.staged_weights_hash(); }); });
        return;
      case Request::kSleep:
      case Request::kWakeUp:
        if (body.size() != 1) fail_invariant("sleep and wake_up have one byte");
        while (!steps_.empty()) wait_for_step();  // the leader has had their results
        if (request == Request::kSleep) return answer([&] { backend.sleep(body[0]); });
        return answer([&] { backend.wake_up(tags_of(body[0])); });
    }
    fail_invariant("a request of the leader's that this rank does not know");
  }

  void load(std::span<const uint8_t> body) {
    PlainReader reader(body, "tensor from the leader");
    const auto order = reader.value<TensorOrder>();
    reader.finish();
    std::vector<uint8_t> bytes = std::exchange(tensor_, {});
    if (order.sent.size() == 0) bytes.clear();
    const ReceivedRows rows(order, bytes);
    replica_.backend().load_weight(order.weight, order.part, rows, order.shard);
  }

  template <class Action>
  void answer(const Action& action) {
    answer_hash([&] {
      action();
      return static_cast<uint64_t>(replica_.backend().held_bytes());
    });
  }

  template <class Hash>
  void answer_hash(const Hash& hash) {
    try {
      const uint64_t value = hash();
      std::vector<uint8_t> body;
      PlainWriter(body).value(value);
      send(Reply::kDone, body);
    } catch (const Error& error) {
      send(Reply::kRefused, bridge::encode_message(bridge::error_to_map(error.info)));
    }
  }

  void send(Reply reply, const std::vector<uint8_t>& body) {
    std::vector<uint8_t> bytes = {static_cast<uint8_t>(reply)};
    bytes.insert(bytes.end(), body.begin(), body.end());
    const std::lock_guard lock(send_mutex_);
    bridge::send_frame(leader_.get(), std::move(bytes), {},
                       std::chrono::steady_clock::now() + kReplyTimeout);
  }

  const bridge::OwnedFd leader_;
  Replica& replica_;
  std::deque<kernels::StepHandle> steps_;  // under way, oldest first
  std::vector<uint8_t> tensor_;            // of the next kLoad
  std::mutex send_mutex_;
  std::thread check_;
};

void send_failure(int leader, const ErrorInfo& error) {
  std::vector<uint8_t> body = {static_cast<uint8_t>(Reply::kFailed)};
  const std::vector<uint8_t> text = bridge::encode_message(bridge::error_to_map(error));
  body.insert(body.end(), text.begin(), text.end());
  try {
    bridge::send_frame(leader, std::move(body), {},
                       std::chrono::steady_clock::now() + kReplyTimeout);
  } catch (const Error&) {
    // The leader is gone too.
  }
}

}  // namespace

void follow(bridge::OwnedFd leader, const Config& config, const ModelConfig& model,
            const ReplicaOptions& options) {
  const int socket = leader.get();
  std::unique_ptr<Replica> replica;
  FollowerReady ready;
  try {
    auto declaring = std::make_unique<DeclaringBackend>(configured_backend(config, model, options));
    DeclaringBackend& declared = *declaring;
    replica = std::make_unique<Replica>(config, model, std::move(declaring), options.communicator);
    ready = {.num_pages = replica->backend_info().kv.num_pages,
             .fingerprint = replica->backend_info().fingerprint,
             .shards = declared.shards};
  } catch (const Error& error) {
    send_failure(socket, error.info);
    throw;
  }
  Follower follower(std::move(leader), *replica);
  try {
    follower.tell_ready(std::move(ready));
    follower.run();
  } catch (const Error& error) {
    options.communicator->abandon();
    follower.tell_failure(error.info);
    throw;
  }
}

Welcome join_replica(int leader, kernels::ReplicaRank at, std::chrono::milliseconds timeout,
                     bridge::Deadline deadline) {
  std::optional<bridge::Frame> welcome = bridge::receive_frame(leader, deadline);
  if (!welcome || welcome->fds.size() != 1 || welcome->body.empty()) {
    throw Error({.code = ErrorCode::kUnavailable,
                 .field = "leader of this replica",
                 .value = "gone",
                 .message = "it sent no memory to work through"});
  }
  const auto find_lost_rank = [leader] {
    pollfd end{.fd = leader, .events = POLLRDHUP, .revents = 0};
    const bool is_gone =
        ::poll(&end, 1, 0) > 0 && (end.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
    return is_gone ? 0 : -1;
  };
  const auto link = std::as_bytes(std::span(welcome->body).subspan(1));
  return {.communicator = std::make_shared<kernels::SharedMemoryCommunicator>(
              map_replica_memory(welcome->fds[0].get(), at.size),
              kernels::SharedMemoryOptions{
                  .at = at, .timeout = timeout, .find_lost_rank = find_lost_rank}),
          .device_link = {link.begin(), link.end()}};
}

}  // namespace rollpack::rollout
