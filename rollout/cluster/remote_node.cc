#include "rollout/cluster/remote_node.h"

#include <sys/stat.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include <fmt/format.h>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"
#include "rollout/cluster/message_codec.h"

namespace rollpack::rollout {
namespace {

using Clock = std::chrono::steady_clock;

// Sent to a node and not yet written there: fills a link of 10 Gbit/s over 6 ms, and is all that
// another message to the same rank can have before it.
constexpr uint64_t kWindowBytes = 8 * kMaxPieceBytes;

uint64_t next_number() {
  static uint64_t last = 0;  // one thread, see the class
  return ++last;
}

int64_t size_of(int fd) {
  struct stat status {};
  return ::fstat(fd, &status) == 0 ? status.st_size : 0;
}

// What a command's descriptor belongs to.
struct Attached {
  std::shared_ptr<const void> owner;
  int fd = -1;
};

Attached attached_to(const Command& command) {
  if (const auto* stage = std::get_if<StageWeights>(&command)) {
    return {stage->chunk, stage->chunk->fd};
  }
  if (const auto* adopt = std::get_if<AdoptWeights>(&command)) {
    return {adopt->fd, adopt->fd->get()};
  }
  return {};
}

template <class T>
concept WithTicket = requires(const T& message) {
  message.ticket;
};

uint64_t ticket_of(const Command& command) {
  return std::visit(
      [](const auto& known) -> uint64_t {
        if constexpr (WithTicket<std::decay_t<decltype(known)>>) return known.ticket;
        return 0;
      },
      command);
}

bool is_about_weights(const Command& command) {
  return std::visit(
      [](const auto& known) {
        using T = std::decay_t<decltype(known)>;
        return std::is_same_v<T, BeginWeights> || std::is_same_v<T, StageWeights> ||
               std::is_same_v<T, FinishWeights> || std::is_same_v<T, AdoptWeights> ||
               std::is_same_v<T, CommitWeights> || std::is_same_v<T, DiscardWeights> ||
               std::is_same_v<T, Sleep> || std::is_same_v<T, WakeUp>;  // drop what is discarded
      },
      command);
}

}  // namespace

OutgoingMemory::OutgoingMemory(std::shared_ptr<const void> owner, int fd)
    : owner_(std::move(owner)),
      number_(next_number()),
      segment_(bridge::MappedSegment::map(fd, size_of(fd), bridge::kPeerSeals,
                                          "weights for another node")),
      sums_((segment_.bytes().size() + kMaxPieceBytes - 1) / kMaxPieceBytes) {}

MemoryPiece OutgoingMemory::piece(uint64_t offset) {
  const std::span<const std::byte> rest = segment_.bytes().subspan(offset);
  const std::span<const std::byte> bytes = rest.first(std::min(rest.size(), kMaxPieceBytes));
  std::optional<uint32_t>& sum = sums_[offset / kMaxPieceBytes];
  if (!sum) sum = crc32_of(bytes);
  return {.memory = number_,
          .total_bytes = num_bytes(),
          .offset = offset,
          .bytes = {reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()},
          .crc = *sum};
}

RemoteNode* OutgoingMemory::join(RemoteNode& node) {
  leave(node);
  RemoteNode* const last = chain_.empty() ? nullptr : chain_.back();
  chain_.push_back(&node);
  return last;
}

void OutgoingMemory::leave(RemoteNode& node) {
  std::erase(chain_, &node);
}

std::shared_ptr<OutgoingMemory> OutgoingMemories::of(const std::shared_ptr<const void>& owner,
                                                     int fd) {
  std::erase_if(all_, [](const auto& each) { return each.second.expired(); });
  std::weak_ptr<OutgoingMemory>& known = all_[owner.get()];
  std::shared_ptr<OutgoingMemory> memory = known.lock();
  if (!memory) known = memory = std::make_shared<OutgoingMemory>(owner, fd);
  return memory;
}

bool RemoteNode::Rank::has_switch_waiting() const {
  return std::ranges::any_of(waiting, [](const Waiting& each) {
    return std::holds_alternative<CommitWeights>(each.command);
  });
}

RemoteNode::RemoteNode(Actions actions, OutgoingMemories& memories, int number)
    : actions_(std::move(actions)), memories_(memories), number_(number) {}

void RemoteNode::send(int32_t rank, Command command) {
  const auto found = ranks_.find(rank);
  if (found == ranks_.end()) return;
  // What comes after a switch is meant for the new weights: before its first one a rank has none.
  const bool follows_switch =
      found->second.has_switch_waiting() && !std::holds_alternative<Stop>(command);
  if (!is_about_weights(command) && !follows_switch) return transmit(rank, command);
  uint64_t memory = 0;
  try {
    memory = use_memory(command);
  } catch (const Error& error) {
    return actions_.answer(rank, Ack{.ticket = ticket_of(command), .error = error.info});
  }
  found->second.waiting.push_back({std::move(command), memory});
  forward(rank);
  pump();
}

// Of the command: 0 where it has none.
uint64_t RemoteNode::use_memory(const Command& command) {
  const Attached attached = attached_to(command);
  if (attached.fd < 0) return 0;
  std::shared_ptr<OutgoingMemory> memory = memories_.of(attached.owner, attached.fd);
  const uint64_t number = memory->number();
  Transfer& transfer = transfers_[number];
  if (!transfer.memory) transfer.memory = std::move(memory);
  const bool is_queued = std::ranges::find(queue_, number) != queue_.end();
  if (!transfer.has_arrived() && !transfer.error && !is_queued) queue_.push_back(number);
  ++transfer.num_users;
  return number;
}

void RemoteNode::release(uint64_t memory) {
  const auto found = transfers_.find(memory);
  if (found == transfers_.end() || --found->second.num_users > 0) return;
  if (found->second.holder) actions_.transmit(*found->second.holder, encode(MemoryEnd{memory}));
  forget(found->second);
  std::erase(queue_, memory);
  transfers_.erase(found);
}

// Sends on what waits for nothing any more.
void RemoteNode::forward(int32_t rank) {
  Rank& state = ranks_.at(rank);
  while (!state.waiting.empty()) {
    Waiting& next = state.waiting.front();
    if (next.memory != 0) {
      const Transfer& transfer = transfers_.at(next.memory);
      const uint64_t ticket = ticket_of(next.command);
      if (transfer.error) {
        Ack refused{.ticket = ticket, .error = *transfer.error};
        const uint64_t memory = next.memory;
        state.waiting.pop_front();
        release(memory);
        actions_.answer(rank, std::move(refused));
        continue;
      }
      if (!transfer.has_arrived()) return;
      state.uses[ticket] = next.memory;
      actions_.transmit(rank, encode(MemoryUse{next.memory, *transfer.holder}));
    }
    transmit(rank, next.command);
    state.waiting.pop_front();
  }
}

void RemoteNode::forward_all() {
  for (const auto& [rank, state] : ranks_) forward(rank);
}

void RemoteNode::transmit(int32_t rank, const Command& command) {
  actions_.transmit(rank, encode(command).body);  // its descriptors stay here
}

// One memory at a time, as much of it as the window allows.
void RemoteNode::pump() {
  if (queue_.empty() || ranks_.empty()) return;
  Transfer& transfer = transfers_.at(queue_.front());
  if (!transfer.holder) begin(transfer);
  while (transfer.feeder == nullptr && transfer.num_sent < transfer.memory->num_bytes() &&
         transfer.num_sent - transfer.num_arrived < kWindowBytes) {
    const MemoryPiece piece = transfer.memory->piece(transfer.num_sent);
    transfer.num_sent += piece.bytes.size();
    actions_.transmit(*transfer.holder, encode(piece));
  }
}

void RemoteNode::begin(Transfer& transfer) {
  const auto& [rank, state] = *ranks_.begin();
  transfer.holder = rank;
  transfer.num_sent = transfer.num_arrived = 0;
  transfer.last_progress = Clock::now();
  transfer.feeder = nullptr;
  RemoteNode* const before = transfer.memory->join(*this);
  if (before == nullptr || !can_be_fed_ || state.relay.port == 0) return;
  if (before->feed(transfer.memory->number(), rank, state.relay)) transfer.feeder = before;
}

// Lets this node's holder send memory on; false where it has none.
bool RemoteNode::feed(uint64_t memory, int32_t rank, const TcpEndpoint& endpoint) {
  const auto found = transfers_.find(memory);
  if (found == transfers_.end() || !found->second.holder || found->second.error) return false;
  actions_.transmit(*found->second.holder,
                    encode(MemoryForward{memory, rank, endpoint.port, endpoint.addresses.at(0)}));
  return true;
}

// From rank 0: whoever sent it has stopped.
void RemoteNode::restart(Transfer& transfer) {
  transfer.feeder = nullptr;
  transfer.num_sent = transfer.num_arrived = 0;
  transfer.last_progress = Clock::now();
  pump();
}

void RemoteNode::check_feeder(Clock::time_point now, std::chrono::milliseconds limit) {
  if (queue_.empty() || ranks_.empty()) return;
  Transfer& transfer = transfers_.at(queue_.front());
  if (transfer.feeder == nullptr || now - transfer.last_progress < limit) return;
  can_be_fed_ = false;  // no way between them, or a peer that hangs: not tried again
  restart(transfer);
}

void RemoteNode::lose_feeder(const RemoteNode& feeder) {
  if (queue_.empty() || ranks_.empty()) return;
  Transfer& transfer = transfers_.at(queue_.front());
  if (transfer.feeder == &feeder) restart(transfer);
}

// This node has it no more, or not yet again.
void RemoteNode::forget(Transfer& transfer) {
  transfer.memory->leave(*this);
}

void RemoteNode::handle(int32_t rank, const MemoryState& state) {
  const auto found = transfers_.find(state.memory);
  if (found == transfers_.end() || found->second.holder != rank || found->second.error) return;
  Transfer& transfer = found->second;
  if (!state.error.empty()) {
    return fail(state.memory, {.code = ErrorCode::kDataLoss,
                               .field = fmt::format("weights for rank {}'s node", rank),
                               .message = state.error});
  }
  const uint64_t limit =
      transfer.feeder == nullptr ? transfer.num_sent : transfer.memory->num_bytes();
  const bool is_more = state.num_bytes > transfer.num_arrived;
  transfer.num_arrived = std::max(transfer.num_arrived, std::min(state.num_bytes, limit));
  transfer.last_progress = Clock::now();
  if (is_more) {
    for (const auto& [other, others] : ranks_) {
      const bool waits = !others.waiting.empty() && others.waiting.front().memory == state.memory;
      if (waits) actions_.tell_progress(other);
    }
  }
  if (transfer.has_arrived()) {
    std::erase(queue_, state.memory);
    forward_all();
  }
  pump();
}

void RemoteNode::fail(uint64_t memory, ErrorInfo error) {
  transfers_.at(memory).error = std::move(error);
  forget(transfers_.at(memory));
  std::erase(queue_, memory);
  forward_all();
  pump();
}

void RemoteNode::handle(int32_t rank, const Ack& ack) {
  const auto found = ranks_.find(rank);
  if (found == ranks_.end()) return;
  const auto use = found->second.uses.find(ack.ticket);
  if (use == found->second.uses.end()) return;
  const uint64_t memory = use->second;
  found->second.uses.erase(use);
  release(memory);
}

// By a command that has not gone out yet.
bool RemoteNode::is_awaited(uint64_t memory) const {
  return std::ranges::any_of(ranks_, [&](const auto& each) {
    return std::ranges::any_of(each.second.waiting,
                               [&](const Waiting& waiting) { return waiting.memory == memory; });
  });
}

void RemoteNode::lose_rank(int32_t rank) {
  const auto found = ranks_.find(rank);
  if (found == ranks_.end()) return;
  const Rank lost = std::move(found->second);
  ranks_.erase(found);
  // What it held comes anew to another one; who has been told that this one has it, and has not
  // asked yet, reports that it is gone.
  for (auto& [number, transfer] : transfers_) {
    if (transfer.holder != rank || transfer.error) continue;
    forget(transfer);
    transfer.holder.reset();
    transfer.num_sent = transfer.num_arrived = 0;
    const std::vector<RemoteNode*> others = transfer.memory->chain();
    for (RemoteNode* const other : others) other->lose_feeder(*this);
    const bool is_queued = std::ranges::find(queue_, number) != queue_.end();
    if (!is_queued && is_awaited(number)) queue_.push_back(number);
  }
  for (const Waiting& each : lost.waiting) {
    if (each.memory != 0) release(each.memory);
  }
  for (const auto& [ticket, memory] : lost.uses) release(memory);
  pump();
}

}  // namespace rollpack::rollout
