// The bridge's server as the configuration wants it: rank 0's and those of other nodes are alike.
#pragma once

#include "rollout/config/config.h"
#include "trainer_bridge/server/server.h"

namespace rollpack::rollout {

// `pad_token_id`: what pads are written as.
bridge::ServerOptions server_options(const Config& config, int32_t pad_token_id);

// bridge.socket, with this host's name for {host}.
std::string socket_path(const Config& config);

std::string host_name();

}  // namespace rollpack::rollout
