#include "rollout/node_bridge/node_desk.h"

#include <algorithm>
#include <utility>
#include <variant>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <spdlog/spdlog.h>

#include "kernels/base/error.h"
#include "rollout/node_bridge/sample_frame.h"

namespace rollpack::rollout {
namespace {

// Samples under way to a node: commands and weights for its ranks never wait behind more. 8 MiB
// keep 10 Gbit/s busy for 6 ms, many times what a frame takes to be taken in and answered for.
constexpr size_t kMaxBytesUnderWay = size_t{8} << 20;
// Samples made for a node that its bridge has not taken in: a link or a bridge that slow gets no
// new requests.
constexpr size_t kMaxWaitingSamples = 65536;

}  // namespace

NodeDesk::NodeDesk(Dispatcher& dispatcher, bridge::SampleSink& own, std::vector<int32_t> bridges,
                   Ways ways)
    : dispatcher_(dispatcher), own_(own), ways_(std::move(ways)) {
  for (size_t i = 0; i < bridges.size(); ++i) {
    const int32_t number = static_cast<int32_t>(i) + 1;
    nodes_[number].worker = bridges[i];
    held_by_.emplace(bridges[i], number);
  }
}

told::State NodeDesk::state() const {
  return {.weight_version = dispatcher_.weight_version(),
          .awaited_weight_version = dispatcher_.awaited_weight_version(),
          .health = dispatcher_.health(),
          .sleep = dispatcher_.sleep_state()};
}

void NodeDesk::open(std::chrono::steady_clock::time_point deadline) {
  told::Open news{dispatcher_.info(), state(), std::nullopt};
  std::unique_lock lock(mutex_);
  for (const auto& [number, node] : nodes_) {
    if (node.is_gone) continue;
    if (journal_ != nullptr) news.restored = journal_->restored_delivery(number);
    ways_.send(node.worker, encode(news));
  }
  const auto is_there = [](const auto& each) { return each.second.is_open || each.second.is_gone; };
  if (changed_.wait_until(lock, deadline, [&] { return std::ranges::all_of(nodes_, is_there); })) {
    return;
  }
  std::vector<int32_t> missing;
  for (const auto& each : nodes_) {
    if (!is_there(each)) missing.push_back(each.first);
  }
  throw Error({.code = ErrorCode::kDeadlineExceeded,
               .field = "bridges of nodes",
               .value = fmt::format("{}", fmt::join(missing, ", ")),
               .message = "did not open in time"});
}

void NodeDesk::tell_state() {
  const told::State now = state();
  const std::lock_guard lock(mutex_);
  for (const auto& [number, node] : nodes_) {
    if (node.is_there()) ways_.send(node.worker, encode(now));
  }
}

void NodeDesk::tell(int32_t node, const NodeNews& news) {
  std::vector<uint8_t> frame = encode(news);
  const std::lock_guard lock(mutex_);
  const Node& to = nodes_.at(node);
  if (!to.is_gone) ways_.send(to.worker, std::move(frame));
}

// ---- samples
// -------------------------------------------------------------------------------------

void NodeDesk::commit(bridge::Sample sample) {
  const int32_t node = sample.key.node;
  if (node == 0) return own_.commit(std::move(sample));
  try {
    send_sample(node, encode_sample_frame(/*worker=*/0, /*attempt=*/0, sample));
  } catch (const Error& error) {
    fail({std::move(sample.key), error.info});  // no frame holds it
  }
}

void NodeDesk::fail(bridge::FailedSample sample) {
  if (sample.key.node == 0) return own_.fail(std::move(sample));
  const int32_t node = sample.key.node;
  tell(node, told::Failed{std::move(sample)});
}

void NodeDesk::send_sample(int32_t number, std::vector<uint8_t> frame) {
  const std::lock_guard lock(mutex_);
  Node& node = nodes_.at(number);
  if (node.is_gone) {
    ++num_undeliverable_;
    return;
  }
  node.waiting.push_back(std::move(frame));
  pump(node);
}

void NodeDesk::pump(Node& node) {
  while (!node.waiting.empty() && node.num_bytes_under_way < kMaxBytesUnderWay) {
    node.num_bytes_under_way += node.waiting.front().size();
    ++num_samples_sent_;
    ways_.send(node.worker, std::move(node.waiting.front()));
    node.waiting.pop_front();
  }
}

void NodeDesk::decide(int32_t worker, const bridge::SampleKey& key, int32_t attempt,
                      Verdict verdict) {
  if (verdict != Verdict::kDrop) {
    const std::lock_guard lock(mutex_);
    const bool is_its_own = ways_.node_of(worker) == key.node;
    ++(nodes_.at(key.node).is_gone ? num_undeliverable_
       : is_its_own                ? num_samples_kept_
                                   : num_samples_straight_);
  }
  tell(key.node, told::Decided{worker, key, attempt, verdict});
}

void NodeDesk::forget(int32_t worker) {
  const std::vector<uint8_t> frame = encode(told::Forgotten{worker});
  const std::lock_guard lock(mutex_);
  for (const auto& [number, node] : nodes_) {
    if (node.worker == worker) {
      ways_.later([this, lost = number] { lose(lost); });
    } else if (!node.is_gone) {
      ways_.send(node.worker, frame);
    }
  }
}

// Its clients see their sockets end. Nobody is left to have what they asked for.
void NodeDesk::lose(int32_t number) {
  size_t num_waiting = 0;
  {
    const std::lock_guard lock(mutex_);
    Node& node = nodes_.at(number);
    if (std::exchange(node.is_gone, true)) return;
    num_waiting = node.waiting.size();
    num_undeliverable_ += static_cast<int64_t>(num_waiting);
    node.waiting.clear();
  }
  changed_.notify_all();
  const int64_t num_open = dispatcher_.drop_node(number);
  spdlog::error(
      "node {} has no bridge any more: {} samples that its trainers had not got are dropped, {} "
      "more are aborted; its other ranks go on for other nodes",
      number, num_waiting, num_open);
}

// ---- requests
// ------------------------------------------------------------------------------------

void NodeDesk::handle(int32_t worker, std::vector<uint8_t> frame) {
  NodeRequest request = decode_node_request(frame);
  if (const auto* find = std::get_if<asked::FindBridge>(&request)) {
    return tell_place(worker, find->node);
  }
  const auto held = held_by_.find(worker);
  if (held == held_by_.end()) return;
  const int32_t number = held->second;
  {
    const std::lock_guard lock(mutex_);
    if (nodes_.at(number).is_gone) return;
  }
  std::visit([&](auto& known) { on_request(number, known); }, request);
}

void NodeDesk::tell_place(int32_t worker, int32_t node) {
  told::BridgeAt place{.node = node, .address = "", .port = 0};
  const std::lock_guard lock(mutex_);
  // It takes samples before it takes clients: a life before may have left it some.
  if (const auto found = nodes_.find(node); found != nodes_.end() && !found->second.is_gone) {
    const TcpEndpoint endpoint = ways_.endpoint_of(found->second.worker);
    if (endpoint.port != 0) {
      place.address = endpoint.addresses.at(0);
      place.port = endpoint.port;
    }
  }
  ways_.send(worker, encode(place));
}

// A bridge that nobody asks for anything owes nothing else: so it is asked. A quarter of a lease
// lies between an answer and the next question, the rest is for the answer.
void NodeDesk::check_bridges(std::chrono::steady_clock::time_point now,
                             std::chrono::milliseconds lease) {
  std::vector<int32_t> silent;
  {
    const std::lock_guard lock(mutex_);
    const bool was_stopped = now - std::exchange(last_check_, now) > lease / 2;
    for (auto& [number, node] : nodes_) {
      if (!node.is_there()) continue;
      if (was_stopped) node.last_change = now;
      if (now - node.last_change <= (node.owes_answer ? lease - lease / 4 : lease / 4)) continue;
      if (node.owes_answer) {
        silent.push_back(node.worker);
        continue;
      }
      node.owes_answer = true;
      node.last_change = now;
      ways_.send(node.worker, encode(told::Ping{}));
    }
  }
  // Its samples are dropped with all else that is lost with a rank: see forget().
  for (const int32_t worker : silent) {
    dispatcher_.lose_worker(worker,
                            {.code = ErrorCode::kDeadlineExceeded,
                             .field = fmt::format("rank {}", worker),
                             .value = "its node's bridge has not answered",
                             .allowed = fmt::format("an answer within cluster.lease_s = {}",
                                                    std::chrono::duration<double>(lease).count())});
  }
}

void NodeDesk::on_request(int32_t node, asked::Opened&) {
  {
    const std::lock_guard lock(mutex_);
    nodes_.at(node).is_open = true;
    nodes_.at(node).last_change = last_check_;
  }
  changed_.notify_all();
  tell_state();  // which may have changed since it was told to open
}

void NodeDesk::check_room(const Node& node) const {
  if (node.waiting.size() < kMaxWaitingSamples) return;
  throw Error({.code = ErrorCode::kWouldBlock,
               .field = "samples on their way to this node",
               .value = std::to_string(node.waiting.size()),
               .origin = "submit",
               .allowed = fmt::format("fewer than {}", kMaxWaitingSamples),
               .message = "its bridge takes them in too slowly; try again"});
}

void NodeDesk::on_request(int32_t node, asked::Submit& request) {
  const uint64_t ticket = request.ticket;
  try {
    {
      const std::lock_guard lock(mutex_);
      check_room(nodes_.at(node));
    }
    dispatcher_.submit(std::move(request.prompts), node, [&](int64_t request_id) {
      tell(node, told::Number{ticket, std::nullopt, request_id});
    });
  } catch (const Error& error) {
    tell(node, told::Number{ticket, error.info, 0});
  }
}

void NodeDesk::on_request(int32_t node, asked::Abort& request) {
  const int64_t num_open =
      request.request_id ? dispatcher_.abort(*request.request_id) : dispatcher_.abort_node(node);
  tell(node, told::Number{request.ticket, std::nullopt, num_open});
}

void NodeDesk::on_request(int32_t node, asked::Pause& request) {
  dispatcher_.pause(request.in_flight,
                    [this, node, ticket = request.ticket](bridge::Outcome outcome) {
                      tell(node, told::Number{ticket, std::move(outcome), 0});
                    });
}

void NodeDesk::on_request(int32_t, asked::Resume&) {
  dispatcher_.resume();
}

void NodeDesk::on_request(int32_t node, asked::Sleep& request) {
  dispatcher_.sleep(request.level, request.in_flight, tell_slept(node, request.ticket));
}

void NodeDesk::on_request(int32_t node, asked::WakeUp& request) {
  dispatcher_.wake_up(request.tags, tell_slept(node, request.ticket));
}

bridge::Answer<bridge::SleepState> NodeDesk::tell_slept(int32_t node, uint64_t ticket) {
  return [this, node, ticket](bridge::Outcome outcome, bridge::SleepState state) {
    tell(node, told::Slept{ticket, std::move(outcome), state});
  };
}

void NodeDesk::on_request(int32_t node, asked::Score& request) {
  const uint64_t ticket = request.ticket;
  dispatcher_.score(
      std::move(request.sequences),
      [this, node, ticket](bridge::Outcome outcome, std::vector<bridge::ScoredSequence> results) {
        try {
          tell(node, told::Scores{ticket, std::move(outcome), std::move(results)});
        } catch (const Error& error) {
          tell(node, told::Scores{ticket, error.info, {}});  // no frame holds them
        }
      });
}

void NodeDesk::on_request(int32_t node, asked::FindWeights& request) {
  tell(node, told::Weights{request.ticket, dispatcher_.weights_in_use()});
}

void NodeDesk::on_request(int32_t node, asked::FindStats& request) {
  tell(node, told::Stats{request.ticket, dispatcher_.stats()});
}

void NodeDesk::on_request(int32_t, asked::Shutdown&) {
  dispatcher_.shutdown();
}

void NodeDesk::on_request(int32_t number, asked::Present&) {
  const std::lock_guard lock(mutex_);
  nodes_.at(number).owes_answer = false;
  nodes_.at(number).last_change = last_check_;
}

void NodeDesk::on_request(int32_t number, asked::Received& request) {
  const std::lock_guard lock(mutex_);
  Node& node = nodes_.at(number);
  node.num_bytes_under_way -= std::min<size_t>(node.num_bytes_under_way, request.num_bytes);
  pump(node);
}

void NodeDesk::on_request(int32_t node, asked::Formed& request) {
  const std::lock_guard lock(mutex_);
  if (journal_ != nullptr) journal_->formed_at(node, std::move(request.batches));
}

void NodeDesk::on_request(int32_t node, asked::Released& request) {
  const std::lock_guard lock(mutex_);
  if (journal_ != nullptr) journal_->released_at(node, request.batch_seq);
}

// The journal may answer at once, under the lock.
void NodeDesk::on_request(int32_t node, asked::WhenDurable& request) {
  const auto done = [this, node, ticket = request.ticket](std::optional<ErrorInfo> error) {
    ways_.later(
        [this, node, answer = told::Number{ticket, std::move(error), 0}] { tell(node, answer); });
  };
  const std::lock_guard lock(mutex_);
  journal_ != nullptr ? journal_->when_durable(done) : done(std::nullopt);
}

void NodeDesk::forget_journal() {
  const std::lock_guard lock(mutex_);
  journal_ = nullptr;
}

bridge::RolloutService::Numbers NodeDesk::numbers() const {
  const std::lock_guard lock(mutex_);
  const auto num_open =
      std::ranges::count_if(nodes_, [](const auto& each) { return each.second.is_there(); });
  size_t num_waiting = 0;
  for (const auto& [number, node] : nodes_) num_waiting += node.waiting.size();
  return {{"num_node_bridges", static_cast<double>(num_open)},
          {"num_samples_sent_to_nodes", static_cast<double>(num_samples_sent_)},
          {"num_samples_kept_on_nodes", static_cast<double>(num_samples_kept_)},
          {"num_samples_straight_to_nodes", static_cast<double>(num_samples_straight_)},
          {"num_samples_waiting_for_nodes", static_cast<double>(num_waiting)},
          {"num_samples_undeliverable", static_cast<double>(num_undeliverable_)}};
}

}  // namespace rollpack::rollout
