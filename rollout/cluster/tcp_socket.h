// TCP between the hosts of a job: where rank 0 listens, how other hosts reach it, and how soon a
// link that was lost without a word is noticed.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {

struct TcpEndpoint {
  std::vector<std::string> addresses;  // numeric, in the order to try
  int port = 0;
};

struct TcpListener {
  bridge::OwnedFd socket;  // non-blocking
  TcpEndpoint endpoint;
};

struct TcpListenOptions {
  std::string interface;  // a name or a numeric address; "": all of this host but loopback
  int port = 0;           // the first tried; 0: any free one
  int num_ports = 64;     // tried from there on
};

// Errors: invalid_argument naming cluster.interface and what this host has; unavailable naming the
// ports where none is free.
TcpListener listen_tcp(const TcpListenOptions& options);

// Errors: unavailable or deadline_exceeded with the system's reason.
bridge::OwnedFd connect_tcp(const std::string& address, int port,
                            std::chrono::steady_clock::time_point deadline);

// Begins to connect: the socket can be written to once it is there, and is at its end where that
// fails. Never waits. Errors: unavailable with the system's reason.
bridge::OwnedFd begin_connect_tcp(const std::string& address, int port);

// By which the peer of a connection sees this host.
std::string own_address(int socket);

// From now on a peer that does not answer for about `limit` breaks the connection: what was sent
// and not acknowledged that long (TCP_USER_TIMEOUT), and probes while nothing is sent (keepalive).
// Source: RFC 5482; tcp(7).
void watch_tcp(int socket, std::chrono::milliseconds limit);

// The connection is reset when it is closed: what has not gone out is dropped.
void reset_on_close(int socket);

}  // namespace rollpack::rollout
