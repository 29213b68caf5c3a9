#include "rollout/cluster/meeting.h"

#include <sys/random.h>

#include <array>
#include <cstdint>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"

namespace rollpack::rollout {

std::string Meeting::text() const {
  return nlohmann::json{{"shares_weights", shares_weights},
                        {"socket", socket},
                        {"addresses", endpoint.addresses},
                        {"port", endpoint.port},
                        {"token", token},
                        {"answer", answer},
                        {"weights_place", weights_place},
                        {"job", job}}
      .dump();
}

Meeting Meeting::parse(const std::string& text) {
  try {
    const auto map = nlohmann::json::parse(text);
    return {.shares_weights = map.at("shares_weights"),
            .socket = map.at("socket"),
            .endpoint = {.addresses = map.at("addresses"), .port = map.at("port")},
            .token = map.at("token"),
            .answer = map.at("answer"),
            .weights_place = map.at("weights_place"),
            .job = map.at("job")};
  } catch (const nlohmann::json::exception& error) {
    throw Error({.code = ErrorCode::kDataLoss,
                 .field = "what rank 0 told when ranks met",
                 .value = fmt::format("{} bytes", text.size()),
                 .allowed = "what the same program writes",
                 .message = error.what()});
  }
}

std::string random_token() {
  std::array<uint8_t, 16> bytes;
  size_t filled = 0;
  while (filled < bytes.size()) {
    const ssize_t got = ::getrandom(bytes.data() + filled, bytes.size() - filled, 0);
    if (got > 0) filled += static_cast<size_t>(got);
  }
  std::string text;
  for (const uint8_t byte : bytes) text += fmt::format("{:02x}", byte);
  return text;
}

bool is_same_token(const std::string& a, const std::string& b) {
  if (a.size() != b.size()) return false;
  unsigned difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(b[i]);
  }
  return difference == 0;
}

}  // namespace rollpack::rollout
