#include "rollout/node_bridge/server_options.h"

#include <unistd.h>

#include <climits>

namespace rollpack::rollout {

std::string host_name() {
  char name[HOST_NAME_MAX + 1] = {};
  ::gethostname(name, sizeof name - 1);
  return name;
}

std::string socket_path(const Config& config) {
  constexpr std::string_view kHost = "{host}";
  std::string path = config.bridge.socket;
  for (size_t at = 0; (at = path.find(kHost, at)) != std::string::npos;) {
    const std::string name = host_name();
    path.replace(at, kHost.size(), name);
    at += name.size();
  }
  return path;
}

bridge::ServerOptions server_options(const Config& config, int32_t pad_token_id) {
  const BridgeSection& section = config.bridge;
  bridge::ServerOptions options;
  options.socket = socket_path(config);
  options.slots = section.slots;
  options.slot_bytes = section.slot_bytes;
  options.max_version_lag = section.max_version_lag;
  options.layout = {.layout = section.layout,
                    .max_tokens_per_row = section.max_tokens_per_row,
                    .prompt_width = section.prompt_width,
                    .response_width = section.response_width,
                    .pad_to_multiple_of = section.pad_to_multiple_of,
                    .columns = section.columns,
                    .pad_token_id = pad_token_id,
                    .logprobs_mode = config.rollout.logprobs_mode};
  if (!config.reference_model.path.empty()) {
    options.layout.columns.push_back("ref_log_prob");
  }
  return options;
}

}  // namespace rollpack::rollout
