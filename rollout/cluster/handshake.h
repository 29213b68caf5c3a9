// What processes of a job that meet over TCP say first: who connects shows the job's token and
// says what it comes for; who listens may have to show the answer, so that neither end takes a
// stranger for its own. One frame each.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "rollout/cluster/tcp_socket.h"

namespace rollpack::rollout {

struct Hello {
  int rank = 0;
  std::string host;  // its name for itself
  // Where it takes memory and samples from other ranks; port 0: nowhere. To rank 0.
  TcpEndpoint relay;
  bool brings_samples = false;  // to another rank: they follow, and not memory
};

std::vector<uint8_t> encode_hello(const Hello& hello, const std::string& token);
// nullopt: another token. Errors: std::exception for what is no hello.
std::optional<Hello> decode_hello(std::span<const uint8_t> body, const std::string& token);

std::vector<uint8_t> encode_answer(const std::string& answer);
bool is_answer(std::span<const uint8_t> body, const std::string& answer);

}  // namespace rollpack::rollout
