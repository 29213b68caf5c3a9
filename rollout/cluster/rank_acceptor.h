// How ranks reach rank 0 when they meet: those of its node through a Unix socket in a folder that
// only this user may enter, those of other nodes by TCP, with the job's token. Nobody is listened
// to afterwards.
#pragma once

#include <chrono>
#include <functional>
#include <list>
#include <optional>
#include <string>
#include <vector>

#include "rollout/cluster/meeting.h"
#include "trainer_bridge/wire/frame.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {

struct AcceptedRank {
  int rank = 0;
  bool is_remote = false;  // on another node
  std::string host;        // its name for itself
  TcpEndpoint relay;       // where it takes memory and samples from other ranks; port 0: nowhere
  bridge::OwnedFd socket;
};

class RankAcceptor {
 public:
  // Listens at meeting.socket, and by `tcp` where there are other nodes.
  // Errors: invalid_argument for a path too long; unavailable.
  RankAcceptor(const Meeting& meeting, bridge::OwnedFd tcp, int num_ranks);
  ~RankAcceptor();

  // Waits for ranks 1 to num_ranks - 1, or until `gives_up`, asked ten times a second, says so;
  // returns those that have come by then, in rank order.
  std::vector<AcceptedRank> accept(
      std::chrono::steady_clock::time_point deadline,
      const std::function<bool()>& gives_up = [] { return false; });

 private:
  using TimePoint = std::chrono::steady_clock::time_point;
  struct Stranger {  // has not said yet who it is
    bridge::OwnedFd socket;
    bool is_remote = false;
    TimePoint deadline;
    bridge::FrameReader reader;
  };

  void admit(int listener, bool is_remote);
  // Whether there is nothing more to hear from it.
  bool listen_to(Stranger& stranger);
  void greet(Stranger& stranger, const bridge::Frame& frame);

  const Meeting meeting_;
  const int num_ranks_;
  bridge::OwnedFd unix_, tcp_;
  std::list<Stranger> strangers_;
  std::vector<std::optional<AcceptedRank>> accepted_;  // by rank
  int num_accepted_ = 0;
};

// A worker rank's side: how it reaches rank 0.
bridge::OwnedFd connect_on_this_node(const Meeting& meeting, int rank,
                                     std::chrono::steady_clock::time_point deadline);
struct RemoteConnection {
  bridge::OwnedFd socket;
  // Where other ranks connect to this one: at the address by which it reached rank 0.
  std::optional<TcpListener> relay;
};
// Tries rank 0's addresses in turn; ports for the relay are those of `relay`, which may have none
// that is free. Errors: unavailable naming each address and why not.
RemoteConnection connect_from_other_node(const Meeting& meeting, int rank, TcpListenOptions relay,
                                         std::chrono::steady_clock::time_point deadline);

}  // namespace rollpack::rollout
