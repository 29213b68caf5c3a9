#include "rollout/cluster/memory_relay.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/base/error.h"
#include "rollout/cluster/handshake.h"

namespace rollpack::rollout {
namespace {

using bridge::OwnedFd;
using Clock = std::chrono::steady_clock;

// Only the ranks before this one in a chain connect, one at a time.
constexpr size_t kMaxSenders = 64;
constexpr std::chrono::seconds kConnectLimit{5};
// How soon a forward that waits for a piece sees that this rank ends.
constexpr std::chrono::milliseconds kEndInterval{200};

}  // namespace

MemoryRelay::MemoryRelay(ReceivedMemory& memory, TcpListener listener, Options options)
    : memory_(memory),
      listener_(std::move(listener)),
      options_(std::move(options)),
      end_(::eventfd(0, EFD_CLOEXEC)) {
  if (!end_) throw Error({.code = ErrorCode::kResourceExhausted, .field = "eventfd"});
  receiving_ = std::thread([this] { receive(); });
  sending_ = std::thread([this] { send(); });
}

MemoryRelay::~MemoryRelay() {
  const uint64_t one = 1;
  static_cast<void>(::write(end_.get(), &one, sizeof one));
  {
    const std::lock_guard lock(mutex_);
    is_ending_ = true;
  }
  wake_.notify_all();
  receiving_.join();
  sending_.join();
}

void MemoryRelay::receive() {
  for (;;) {
    if (senders_.size() >= kMaxSenders) drop_oldest_stranger();
    const bool has_room = senders_.size() < kMaxSenders;
    std::vector<pollfd> waiting = {
        {.fd = end_.get(), .events = POLLIN, .revents = 0},
        {.fd = has_room ? listener_.socket.get() : -1, .events = POLLIN, .revents = 0}};
    for (const Sender& sender : senders_) {
      waiting.push_back({.fd = sender.socket.get(), .events = POLLIN, .revents = 0});
    }
    if (::poll(waiting.data(), waiting.size(), -1) < 0) continue;
    if (waiting[0].revents != 0) return;
    size_t index = 2;
    std::erase_if(senders_,
                  [&](Sender& sender) { return waiting[index++].revents != 0 && !hear(sender); });
    if (waiting[1].revents == 0) continue;
    OwnedFd socket(
        ::accept4(listener_.socket.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) continue;
    watch_tcp(socket.get(), options_.limit);
    senders_.push_back({.socket = std::move(socket), .number = ++num_senders_, .reader = {}});
  }
}

// Who connects and says nothing must not keep others out.
void MemoryRelay::drop_oldest_stranger() {
  const auto oldest = std::ranges::find(senders_, false, &Sender::is_known);
  if (oldest != senders_.end()) senders_.erase(oldest);
}

bool MemoryRelay::hear(Sender& sender) {
  try {
    const bridge::IoStatus status = sender.reader.read(sender.socket.get());
    if (status == bridge::IoStatus::kWouldBlock) return true;
    if (status == bridge::IoStatus::kEnd) return false;
    const bridge::Frame frame = sender.reader.take();
    if (!sender.is_known) {
      const std::optional<Hello> hello = decode_hello(frame.body, options_.token);
      if (hello && hello->brings_samples) hand_over(sender, hello->rank);
      sender.is_known = hello && !hello->brings_samples;
      return sender.is_known;
    }
    const MemoryFrame heard = decode_memory_frame(frame.body);
    const auto* piece = std::get_if<MemoryPiece>(&heard);
    if (piece == nullptr) return false;
    if (auto state = memory_.write(*piece, sender.number)) options_.answer(std::move(*state));
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// What it says next is read by another thread: a reader takes nothing beyond its frame.
void MemoryRelay::hand_over(Sender& sender, int32_t rank) {
  TakeSamples take;
  {
    const std::lock_guard lock(mutex_);
    take = take_samples_;
  }
  if (!take) return;
  bridge::send_frame(sender.socket.get(), encode_answer(options_.reply), {},
                     Clock::now() + kConnectLimit);
  take(rank, std::move(sender.socket));
}

void MemoryRelay::set_take_samples(TakeSamples take) {
  const std::lock_guard lock(mutex_);
  take_samples_ = std::move(take);
}

void MemoryRelay::forward(const MemoryForward& order) {
  {
    const std::lock_guard lock(mutex_);
    orders_.push_back(order);
  }
  wake_.notify_all();
}

void MemoryRelay::send() {
  for (;;) {
    MemoryForward order;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return is_ending_ || !orders_.empty(); });
      if (is_ending_) return;
      order = std::move(orders_.front());
      orders_.pop_front();
    }
    try {
      send_on(order);
    } catch (const std::exception&) {
      targets_.erase(order.rank);
    }
  }
}

bool MemoryRelay::is_ending() {
  const std::lock_guard lock(mutex_);
  return is_ending_;
}

void MemoryRelay::send_on(const MemoryForward& order) {
  auto deadline = Clock::now() + options_.limit;
  std::optional<ReceivedMemory::Reader> reader;
  while (!reader) {
    if (is_ending() || Clock::now() > deadline) return;
    // Its first piece may be on its way to this rank yet.
    reader = memory_.reader_of(order.memory, Clock::now() + kEndInterval);
    if (!reader && memory_.is_dropped(order.memory)) return;
  }
  OwnedFd& socket = targets_[order.rank];
  if (!socket) {
    socket = connect_tcp(order.address, order.port, Clock::now() + kConnectLimit);
    watch_tcp(socket.get(), options_.limit);
    bridge::send_frame(socket.get(), encode_hello({}, options_.token), {},
                       Clock::now() + kConnectLimit);
  }
  std::vector<uint8_t> buffer;
  while (!reader->is_at_end() && Clock::now() < deadline) {
    const std::optional<MemoryPiece> piece = reader->next(buffer, Clock::now() + kEndInterval);
    if (is_ending()) return;
    if (!piece) {
      if (reader->is_dropped()) return;
      continue;
    }
    bridge::send_frame(socket.get(), encode(*piece), {}, Clock::now() + options_.limit);
    deadline = Clock::now() + options_.limit;
  }
}

}  // namespace rollpack::rollout
