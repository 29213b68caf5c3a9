// A client of the protocol as small as it can be: requests and replies as maps, slots as maps of
// their memfds. Used by the server's tests and by the client processes that they kill.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "trainer_bridge/shared_memory/segment.h"
#include "trainer_bridge/wire/message.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::bridge {

// Waits up to 10 s for each reply and throws Error where none comes.
class TestClient {
 public:
  // Connects; says hello too unless told otherwise.
  explicit TestClient(const std::string& path, bool says_hello = true);

  // Sends a request and returns its reply, whole: {id, ok, ..} or {id, ok, error}.
  Json request(const std::string& verb, Json fields = Json::object(),
               std::vector<OwnedFd> fds = {});
  // The two halves of request().
  uint64_t post(const std::string& verb, Json fields = Json::object(),
                std::vector<OwnedFd> fds = {});
  Json reply();

  void send_bytes(const std::vector<uint8_t>& bytes);
  // Whether the server has closed, within `timeout_ms`; replies on the way are dropped.
  bool is_closed(int64_t timeout_ms = 5000);
  // Says hello and maps the slots anew.
  Json hello();

  // Requests in words. submit and next_batch throw the server's error.
  int64_t submit(const std::vector<std::vector<int32_t>>& prompts, int32_t n);
  Json next_batch(Json num_groups = nullptr, int64_t timeout_ms = 10000);
  Json release(const Json& batch);
  // Bytes of a delivered batch; throws where its checksum is not the notice's.
  std::vector<std::byte> bytes_of(const Json& batch) const;

  int socket() const { return socket_.get(); }
  void close() { socket_.reset(); }

 private:
  OwnedFd socket_;
  uint64_t last_id_ = 0;
  std::vector<MappedSegment> slots_;
};

// The prompts of a submit as its request has them.
Json prompts_of(const std::vector<std::vector<int32_t>>& prompts, int32_t n);

}  // namespace rollpack::bridge
