#include "rollout/cluster/handshake.h"

#include <exception>

#include "rollout/cluster/meeting.h"
#include "trainer_bridge/wire/message.h"

namespace rollpack::rollout {

std::vector<uint8_t> encode_hello(const Hello& hello, const std::string& token) {
  bridge::Json map = {{"rank", hello.rank}, {"token", token}, {"host", hello.host}};
  if (hello.relay.port != 0) map["relay"] = {hello.relay.addresses.at(0), hello.relay.port};
  if (hello.brings_samples) map["samples"] = true;
  return bridge::encode_message(map);
}

std::optional<Hello> decode_hello(std::span<const uint8_t> body, const std::string& token) {
  const bridge::Json map = bridge::decode_message(body);
  if (!is_same_token(map.at("token"), token)) return std::nullopt;
  Hello hello{.rank = map.at("rank"),
              .host = map.at("host"),
              .brings_samples = map.value("samples", false)};
  if (map.contains("relay")) {
    hello.relay = {.addresses = {map["relay"].at(0)}, .port = map["relay"].at(1)};
  }
  return hello;
}

std::vector<uint8_t> encode_answer(const std::string& answer) {
  return bridge::encode_message({{"answer", answer}});
}

bool is_answer(std::span<const uint8_t> body, const std::string& answer) {
  try {
    return is_same_token(bridge::decode_message(body).value("answer", ""), answer);
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace rollpack::rollout
