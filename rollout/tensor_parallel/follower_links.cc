#include "rollout/tensor_parallel/follower_links.h"

#include <poll.h>
#include <sys/socket.h>

#include <optional>
#include <string>
#include <utility>

#include <fmt/format.h>

#include "kernels/base/error.h"
#include "rollout/tensor_parallel/plain_bytes.h"
#include "trainer_bridge/wire/frame.h"
#include "trainer_bridge/wire/message.h"
#include "trainer_bridge/wire/peer.h"

namespace rollpack::rollout {
namespace {

using bridge::OwnedFd;

[[noreturn]] void fail_lost(int32_t rank, int32_t size, const std::string& reason) {
  throw Error({.code = ErrorCode::kUnavailable,
               .field = fmt::format("rank {} of {} ranks of this replica", rank, size),
               .value = "gone",
               .message = reason});
}

}  // namespace

std::vector<uint8_t> FollowerReady::encode() const {
  std::vector<uint8_t> bytes;
  PlainWriter writer(bytes);
  writer.value(num_pages);
  writer.list(std::vector<char>(fingerprint.begin(), fingerprint.end()));
  writer.value(static_cast<uint64_t>(shards.size()));
  for (const auto& parts : shards) writer.list(parts);
  return bytes;
}

FollowerReady FollowerReady::decode(std::span<const uint8_t> bytes) {
  PlainReader reader(bytes, "follower's word that it is ready");
  FollowerReady ready{.num_pages = reader.value<int32_t>(), .fingerprint = {}, .shards = {}};
  const auto text = reader.list<char>();
  ready.fingerprint.assign(text.begin(), text.end());
  const auto count = reader.value<uint64_t>();
  for (uint64_t i = 0; i < count; ++i) ready.shards.push_back(reader.list<kernels::ShardRange>());
  reader.finish();
  return ready;
}

FollowerLinks::FollowerLinks(std::vector<OwnedFd> followers)
    : sockets_(std::move(followers)), processes_(sockets_.size()) {
  for (size_t rank = 1; rank < sockets_.size(); ++rank) {
    processes_[rank] = std::move(bridge::peer_of(sockets_[rank].get()).pidfd);
  }
}

void FollowerLinks::welcome(const ReplicaMemory& memory, std::span<const std::byte> device_link,
                            bridge::Deadline deadline) {
  std::vector<uint8_t> body = {0};  // a frame has some body
  const auto* const link = reinterpret_cast<const uint8_t*>(device_link.data());
  body.insert(body.end(), link, link + device_link.size());
  for (int32_t rank = 1; rank < size(); ++rank) {
    std::vector<OwnedFd> fds;
    fds.push_back(OwnedFd::duplicate(memory.fd.get()));
    bridge::send_frame(sockets_[static_cast<size_t>(rank)].get(), body, std::move(fds), deadline);
  }
}

namespace {

// The rest of a frame that says all is well. Errors: what it says otherwise.
std::vector<uint8_t> checked_reply(std::optional<bridge::Frame> frame, int32_t rank, int32_t size) {
  if (!frame) fail_lost(rank, size, "its connection has ended");
  if (frame->body.empty() || frame->body[0] > static_cast<uint8_t>(Reply::kFailed)) {
    fail_lost(rank, size, "it sent what is no answer");
  }
  std::vector<uint8_t> rest(frame->body.begin() + 1, frame->body.end());
  if (static_cast<Reply>(frame->body[0]) == Reply::kDone) return rest;
  throw Error(bridge::error_from_map(bridge::decode_message(rest)));
}

}  // namespace

FollowerReady FollowerLinks::wait_ready(int32_t rank, bridge::Deadline deadline) {
  return FollowerReady::decode(checked_reply(
      bridge::receive_frame(sockets_[static_cast<size_t>(rank)].get(), deadline), rank, size()));
}

void FollowerLinks::send(int32_t rank, Request request, std::span<const uint8_t> body,
                         bridge::Deadline deadline) {
  std::vector<uint8_t> bytes;
  bytes.reserve(body.size() + 1);
  bytes.push_back(static_cast<uint8_t>(request));
  bytes.insert(bytes.end(), body.begin(), body.end());
  const std::lock_guard lock(send_mutex_);
  try {
    bridge::send_frame(sockets_[static_cast<size_t>(rank)].get(), std::move(bytes), {}, deadline);
  } catch (const Error& error) {
    fail_lost(rank, size(), error.what());
  }
}

void FollowerLinks::send_all(Request request, std::span<const uint8_t> body,
                             bridge::Deadline deadline) {
  for (int32_t rank = 1; rank < size(); ++rank) send(rank, request, body, deadline);
}

uint64_t FollowerLinks::receive(int32_t rank, bridge::Deadline deadline) {
  const std::vector<uint8_t> rest = checked_reply(
      bridge::receive_frame(sockets_[static_cast<size_t>(rank)].get(), deadline), rank, size());
  PlainReader reader(rest, "follower's answer");
  const auto value = reader.value<uint64_t>();
  reader.finish();
  return value;
}

int32_t FollowerLinks::find_lost_rank() const {
  for (int32_t rank = 1; rank < size(); ++rank) {
    const auto index = static_cast<size_t>(rank);
    pollfd ends[] = {{.fd = sockets_[index].get(), .events = POLLRDHUP, .revents = 0},
                     {.fd = processes_[index].get(), .events = POLLIN, .revents = 0}};
    if (::poll(ends, 2, 0) <= 0) continue;
    if ((ends[0].revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0 || ends[1].revents != 0) {
      return rank;
    }
  }
  return -1;
}

void FollowerLinks::give_up() {
  for (size_t rank = 1; rank < sockets_.size(); ++rank) {
    ::shutdown(sockets_[rank].get(), SHUT_RDWR);
  }
}

}  // namespace rollpack::rollout
