#include "tests/trainer_bridge/server/test_client.h"

#include <sys/socket.h>
#include <sys/un.h>

#include <chrono>
#include <cstring>

#include "kernels/base/checksum.h"
#include "trainer_bridge/contract/batch_schema.h"
#include "trainer_bridge/wire/frame.h"

namespace rollpack::bridge {
namespace {

constexpr auto kReplyTime = std::chrono::seconds(10);

Deadline reply_deadline() {
  return std::chrono::steady_clock::now() + kReplyTime;
}

void throw_if_error(const Json& reply) {
  if (!reply.at("ok").get<bool>()) throw Error(error_from_map(reply.at("error")));
}

}  // namespace

Json prompts_of(const std::vector<std::vector<int32_t>>& prompts, int32_t n) {
  Json list = Json::array();
  for (const auto& ids : prompts) {
    list.push_back({{"input_ids", to_bin(std::span(ids))}, {"n", n}});
  }
  return {{"prompts", list}};
}

TestClient::TestClient(const std::string& path, bool says_hello)
    : socket_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  if (::connect(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    throw Error({.code = ErrorCode::kUnavailable, .field = path, .message = std::strerror(errno)});
  }
  if (says_hello) throw_if_error(hello());
}

uint64_t TestClient::post(const std::string& verb, Json fields, std::vector<OwnedFd> fds) {
  fields["verb"] = verb;
  fields["id"] = ++last_id_;
  if (!fds.empty()) fields["num_fds"] = fds.size();
  send_frame(socket_.get(), encode_message(fields), std::move(fds), reply_deadline());
  return last_id_;
}

Json TestClient::reply() {
  auto frame = receive_frame(socket_.get(), reply_deadline());
  if (!frame) throw Error({.code = ErrorCode::kUnavailable, .field = "server closed"});
  Json reply = decode_message(frame->body);
  if (frame->fds.size() != reply.value("num_fds", size_t{0})) fail_invariant("descriptors lost");
  if (reply.contains("slot_bytes")) {
    slots_.clear();
    for (const OwnedFd& fd : frame->fds) {
      slots_.push_back(MappedSegment::map(fd.get(), reply["slot_bytes"], kOwnerSeals, "server"));
    }
  }
  return reply;
}

Json TestClient::request(const std::string& verb, Json fields, std::vector<OwnedFd> fds) {
  const uint64_t id = post(verb, std::move(fields), std::move(fds));
  Json answer = reply();
  if (answer.at("id") != id) fail_invariant("a reply to another request");
  return answer;
}

void TestClient::send_bytes(const std::vector<uint8_t>& bytes) {
  size_t sent = 0;
  while (sent < bytes.size()) {
    const ssize_t put =
        ::send(socket_.get(), bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (put <= 0) return;  // the server has closed: is_closed() will tell
    sent += static_cast<size_t>(put);
  }
}

bool TestClient::is_closed(int64_t timeout_ms) {
  const Deadline deadline =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  try {
    while (receive_frame(socket_.get(), deadline)) {
    }
    return true;
  } catch (const Error& error) {
    return error.info.code == ErrorCode::kDataLoss;
  }
}

Json TestClient::hello() {
  return request("hello", {{"protocol_version", 1}, {"client", "test"}});
}

int64_t TestClient::submit(const std::vector<std::vector<int32_t>>& prompts, int32_t n) {
  const Json answer = request("submit", prompts_of(prompts, n));
  throw_if_error(answer);
  return answer.at("request_id");
}

Json TestClient::next_batch(Json num_groups, int64_t timeout_ms) {
  Json answer =
      request("next_batch", {{"num_groups", std::move(num_groups)}, {"timeout_ms", timeout_ms}});
  throw_if_error(answer);
  return answer;
}

Json TestClient::release(const Json& batch) {
  return request("release", {{"slot", batch.at("slot")},
                             {"generation", batch.at("generation")},
                             {"batch_seq", batch.at("batch_seq")}});
}

std::vector<std::byte> TestClient::bytes_of(const Json& batch) const {
  const auto memory =
      slots_.at(batch.at("slot").get<size_t>()).bytes().first(batch.at("bytes").get<size_t>());
  if (crc32_of(memory.subspan(sizeof(BatchHeader))) != batch.at("crc32").get<uint32_t>()) {
    throw Error({.code = ErrorCode::kDataLoss, .field = "crc32"});
  }
  return {memory.begin(), memory.end()};
}

}  // namespace rollpack::bridge
