#include "rollout/node_bridge/straight_way.h"

#include <algorithm>
#include <utility>

#include <spdlog/spdlog.h>

#include "kernels/base/error.h"
#include "rollout/cluster/handshake.h"
#include "rollout/node_bridge/sample_frame.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

// After the first failure a bridge is left alone for twice the limit, then for twice as long each
// time, up to 16 times: each try may hold samples up for the limit.
constexpr int kMaxDoublings = 4;
// Of the limit: how often what waits is looked at.
constexpr int kChecksPerLimit = 8;

}  // namespace

StraightWay::StraightWay(Options options, Ways ways)
    : options_(std::move(options)),
      ways_(std::move(ways)),
      stay_(bridge::asio::make_work_guard(io_)) {}

StraightWay::~StraightWay() {
  io_.stop();
  if (thread_.joinable()) thread_.join();
}

void StraightWay::expect(int32_t node) {
  {
    const std::lock_guard lock(mutex_);
    if (!bridges_.try_emplace(node).second) return;
  }
  ways_.find(asked::FindBridge{node});
}

void StraightWay::found(const told::BridgeAt& bridge) {
  const std::lock_guard lock(mutex_);
  bridges_[bridge.node].endpoint = TcpEndpoint{{bridge.address}, bridge.port};
}

bool StraightWay::has_way(int32_t node, size_t num_bytes) const {
  const auto found = bridges_.find(node);
  if (found == bridges_.end() || !found->second.endpoint) return false;
  const Bridge& bridge = found->second;
  return bridge.endpoint->port != 0 && Clock::now() >= bridge.shut_until &&
         bridge.num_bytes + num_bytes <= options_.max_link_bytes &&
         num_bytes_ + num_bytes <= options_.max_bytes;
}

bool StraightWay::put(bridge::Sample& sample, int32_t attempt) {
  const int32_t node = sample.key.node;
  {
    const std::lock_guard lock(mutex_);
    if (!has_way(node, 0)) return false;
  }
  std::vector<uint8_t> frame = encode_sample_frame(options_.rank, attempt, sample);
  const size_t num_bytes = frame.size();
  const std::lock_guard lock(mutex_);
  if (!has_way(node, num_bytes) || !find_link(bridges_[node])) return false;
  Bridge& bridge = bridges_[node];
  if (bridge.waiting.empty()) bridge.last_progress = Clock::now();
  bridge.waiting.push_back({std::move(sample), attempt, std::move(frame), num_bytes});
  bridge.num_bytes += num_bytes;
  num_bytes_ += num_bytes;
  ++num_under_way_;
  if (!thread_.joinable()) thread_ = std::thread([this] { io_.run(); });
  bridge::asio::post(io_, [this, node] { serve(node); });
  return true;
}

// Where all are in use, the link goes that has been idle longest.
bool StraightWay::find_link(Bridge& bridge) {
  if (bridge.has_link) return true;
  if (num_links_ == options_.max_links) {
    auto oldest = bridges_.end();
    for (auto each = bridges_.begin(); each != bridges_.end(); ++each) {
      if (!each->second.is_idle()) continue;
      if (oldest == bridges_.end() || each->second.last_progress < oldest->second.last_progress) {
        oldest = each;
      }
    }
    if (oldest == bridges_.end()) return false;
    oldest->second.has_link = false;
    --num_links_;
    bridge::asio::post(io_, [this, node = oldest->first] { serve(node); });
  }
  bridge.has_link = true;
  ++num_links_;
  return true;
}

// Does what is to be done for a node: opens its link or closes it, and sends what it may.
void StraightWay::serve(int32_t node) {
  std::string failure;
  {
    const std::lock_guard lock(mutex_);
    Bridge& bridge = bridges_.at(node);
    if (!bridge.has_link) return close(bridge);
    try {
      if (!bridge.socket) open(node, bridge);
    } catch (const Error& error) {
      failure = format_error(error.info);
    }
    while (bridge.is_greeted && bridge.num_sent < bridge.waiting.size()) {
      bridge.socket->send(std::move(bridge.waiting[bridge.num_sent++].frame));
    }
  }
  if (!failure.empty()) give_up(node, failure);
  if (!std::exchange(is_watching_, true)) watch();
}

// Its samples follow once it has shown that it is of this job.
void StraightWay::open(int32_t node, Bridge& bridge) {
  bridge::OwnedFd connecting =
      begin_connect_tcp(bridge.endpoint->addresses.at(0), bridge.endpoint->port);
  watch_tcp(connecting.get(), 2 * options_.limit);
  bridge.socket = std::make_shared<bridge::FrameSocket>(
      io_, std::move(connecting),
      bridge::FrameSocketOptions{.max_queued_bytes = 2 * options_.max_link_bytes,
                                 .frame_deadline = options_.limit});
  bridge.socket->start(
      [this, node](bridge::Frame frame) { hear(node, std::move(frame.body)); },
      // Later: the end may be noticed while something is sent.
      [this, node,
       link = std::weak_ptr(bridge.socket)](const std::optional<ErrorInfo>& error) mutable {
        bridge::asio::post(io_, [this, node, link = std::move(link),
                                 reason = error ? format_error(*error) : "it has closed the link"] {
          const std::shared_ptr<bridge::FrameSocket> ended = link.lock();
          {
            const std::lock_guard lock(mutex_);
            if (!ended || bridges_.at(node).socket != ended) return;
          }
          give_up(node, reason);
        });
      });
  bridge.socket->send(
      encode_hello({.rank = options_.rank, .brings_samples = true}, options_.token));
}

void StraightWay::hear(int32_t node, std::vector<uint8_t> body) {
  bool is_known = false;
  {
    const std::lock_guard lock(mutex_);
    Bridge& bridge = bridges_.at(node);
    is_known = bridge.is_greeted;
    bridge.is_greeted = is_known || is_answer(body, options_.answer);
    if (!bridge.is_greeted) {
      return bridge::asio::post(io_, [this, node] { give_up(node, "another program is there"); });
    }
  }
  if (!is_known) return serve(node);
  try {
    take_receipt(node, decode_receipt(body));
  } catch (const Error& error) {
    bridge::asio::post(io_,
                       [this, node, reason = format_error(error.info)] { give_up(node, reason); });
  }
}

void StraightWay::take_receipt(int32_t node, uint64_t num_samples) {
  std::vector<Event> kept;
  {
    const std::lock_guard lock(mutex_);
    Bridge& bridge = bridges_.at(node);
    while (bridge.num_received < num_samples && bridge.num_sent > 0) {
      const Waiting& received = bridge.waiting.front();
      kept.push_back(
          SampleKept{received.sample.key, received.attempt, received.sample.finish_reason});
      bridge.num_bytes -= received.num_bytes;
      num_bytes_ -= received.num_bytes;
      bridge.waiting.pop_front();
      --bridge.num_sent;
      ++bridge.num_received;
    }
    bridge.last_progress = Clock::now();
    bridge.num_failures = 0;
  }
  tell_all(kept, kept.size());
}

void StraightWay::tell_all(const std::vector<Event>& events, size_t num_samples) {
  for (const Event& event : events) ways_.tell(event);
  {
    const std::lock_guard lock(mutex_);
    num_under_way_ -= num_samples;
  }
  changed_.notify_all();
}

void StraightWay::close(Bridge& bridge) {
  if (bridge.socket) bridge.socket->close();
  bridge.socket.reset();
  bridge.is_greeted = false;
  bridge.num_received = 0;
  bridge.num_sent = 0;
}

void StraightWay::give_up(int32_t node, const std::string& reason) {
  std::vector<Event> events;
  size_t num_samples = 0;
  {
    const std::lock_guard lock(mutex_);
    Bridge& bridge = bridges_.at(node);
    num_samples = bridge.waiting.size();
    for (Waiting& each : bridge.waiting) {
      const bridge::SampleKey key = each.sample.key;
      events.push_back(SampleDone{std::move(each.sample), each.attempt});
      if (bridge.num_sent == 0) continue;
      --bridge.num_sent;
      events.push_back(SampleWithdrawn{key, each.attempt});
    }
    if (std::exchange(bridge.has_link, false)) --num_links_;
    close(bridge);
    num_bytes_ -= std::exchange(bridge.num_bytes, 0);
    bridge.waiting.clear();
    if (num_samples > 0) {
      const auto pause = 2 * options_.limit * (1 << std::min(bridge.num_failures++, kMaxDoublings));
      bridge.shut_until = Clock::now() + pause;
      spdlog::warn("samples for node {}'s bridge go through rank 0 for {:.1f} s: {}", node,
                   std::chrono::duration<double>(pause).count(), reason);
    }
  }
  tell_all(events, num_samples);
}

// As long as there is a link.
void StraightWay::watch() {
  timer_.expires_after(std::max(options_.limit / kChecksPerLimit, 5ms));
  timer_.async_wait([this](bridge::SystemError error) {
    if (error) return;
    is_watching_ = check_links();
    if (is_watching_) watch();
  });
}

bool StraightWay::check_links() {
  std::vector<int32_t> late;
  {
    const std::lock_guard lock(mutex_);
    const TimePoint now = Clock::now();
    const auto limit = options_.limit - options_.limit / kChecksPerLimit;
    for (auto& [node, bridge] : bridges_) {
      if (!bridge.has_link) continue;
      const auto silence = now - bridge.last_progress;
      if (bridge.is_idle() && silence > options_.idle) {
        bridge.has_link = false;
        --num_links_;
        close(bridge);
      } else if (!bridge.is_idle() && silence > limit) {
        late.push_back(node);
      }
    }
  }
  for (const int32_t node : late) give_up(node, "no receipt in time");
  const std::lock_guard lock(mutex_);
  return num_links_ > 0;
}

void StraightWay::flush(TimePoint deadline) {
  std::unique_lock lock(mutex_);
  const auto is_done = [this] { return num_under_way_ == 0; };
  const TimePoint now = Clock::now();
  if (changed_.wait_until(lock, now + (deadline - now) / 2, is_done)) return;
  bridge::asio::post(io_, [this] {
    std::vector<int32_t> late;
    {
      const std::lock_guard inner(mutex_);
      for (const auto& [node, bridge] : bridges_) {
        if (!bridge.waiting.empty()) late.push_back(node);
      }
    }
    for (const int32_t node : late) give_up(node, "this rank ends");
  });
  changed_.wait_until(lock, deadline, is_done);
}

}  // namespace rollpack::rollout
