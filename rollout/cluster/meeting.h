// What rank 0 tells all ranks when they meet: how to reach it, and whether weights come from it.
#pragma once

#include <string>

#include "rollout/cluster/tcp_socket.h"

namespace rollpack::rollout {

struct Meeting {
  bool shares_weights = false;  // of a node's ranks; their first ones come from rank 0
  std::string socket;           // for the ranks of rank 0's node
  TcpEndpoint endpoint;         // for those of other nodes; port 0 where there are none
  // Of this job, secret, random. Who connects by TCP shows `token` and is shown `answer`: neither
  // end takes a stranger for its own, say behind an address that two hosts have (a bridge of
  // containers).
  std::string token, answer;
  std::string weights_place;  // the bridge that takes weights: its socket and host, in words
  std::string job;            // random too, and no secret: tells jobs of one machine apart

  // One line of JSON, and back. Errors: data_loss.
  std::string text() const;
  static Meeting parse(const std::string& text);
};

// 128 random bits in hexadecimal.
std::string random_token();

// Whether both are the same; takes as long wherever they differ.
bool is_same_token(const std::string& a, const std::string& b);

}  // namespace rollpack::rollout
