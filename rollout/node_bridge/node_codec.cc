// Messages of a node's bridge as frames: a mark, then one MessagePack map.
#include <string>
#include <utility>

#include "kernels/base/error.h"
#include "rollout/cluster/message_parts.h"
#include "rollout/journal/record.h"
#include "rollout/node_bridge/frame_mark.h"
#include "rollout/node_bridge/node_messages.h"
#include "trainer_bridge/wire/message.h"

namespace rollpack::rollout {
namespace {

using bridge::error_from_map;
using bridge::error_to_map;
using bridge::to_bin;
using json = bridge::Json;

template <class T>
json encode_optional(const std::optional<T>& value) {
  return value ? json(*value) : json();
}

template <class T>
std::optional<T> decode_optional(const json& value) {
  if (value.is_null()) return std::nullopt;
  if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
    return integer<T>(value);
  } else {
    return value.get<T>();
  }
}

json encode_sampling(const bridge::SamplingOverrides& s) {
  return {{"temperature", encode_optional(s.temperature)},
          {"top_k", encode_optional(s.top_k)},
          {"top_p", encode_optional(s.top_p)},
          {"min_p", encode_optional(s.min_p)},
          {"seed", encode_optional(s.seed)},
          {"response_length", encode_optional(s.response_length)},
          {"min_tokens", encode_optional(s.min_tokens)},
          {"stop_token_ids", s.stop_token_ids ? to_bin(*s.stop_token_ids) : json()},
          {"ignore_eos", encode_optional(s.ignore_eos)}};
}

bridge::SamplingOverrides decode_sampling(const json& map) {
  bridge::SamplingOverrides s{
      .temperature = decode_optional<float>(map.at("temperature")),
      .top_k = decode_optional<int32_t>(map.at("top_k")),
      .top_p = decode_optional<float>(map.at("top_p")),
      .min_p = decode_optional<float>(map.at("min_p")),
      .seed = decode_optional<uint64_t>(map.at("seed")),
      .response_length = decode_optional<int32_t>(map.at("response_length")),
      .min_tokens = decode_optional<int32_t>(map.at("min_tokens")),
      .ignore_eos = decode_optional<bool>(map.at("ignore_eos"))};
  const json& stops = map.at("stop_token_ids");
  if (!stops.is_null()) s.stop_token_ids = from_bin<int32_t>(stops);
  return s;
}

json encode_prompt(const bridge::PromptRequest& prompt) {
  return {{"id", prompt.prompt_id ? encode_id(*prompt.prompt_id) : json()},
          {"input_ids", to_bin(prompt.input_ids)},
          {"n", encode_optional(prompt.n)},
          {"sampling", encode_sampling(prompt.sampling)},
          {"origin", prompt.origin}};
}

bridge::PromptRequest decode_prompt(const json& map) {
  bridge::PromptRequest prompt{.input_ids = from_bin<int32_t>(map.at("input_ids")),
                               .n = decode_optional<int32_t>(map.at("n")),
                               .sampling = decode_sampling(map.at("sampling")),
                               .origin = map.at("origin")};
  if (!map.at("id").is_null()) prompt.prompt_id = decode_id(map["id"]);
  return prompt;
}

json encode_sequence(const bridge::ScoreSequence& sequence) {
  return {{"id", encode_id(sequence.id)},
          {"input_ids", to_bin(sequence.input_ids)},
          {"response_ids", to_bin(sequence.response_ids)},
          {"temperature", sequence.temperature},
          {"origin", sequence.origin}};
}

bridge::ScoreSequence decode_sequence(const json& map) {
  return {.id = decode_id(map.at("id")),
          .input_ids = from_bin<int32_t>(map.at("input_ids")),
          .response_ids = from_bin<int32_t>(map.at("response_ids")),
          .temperature = map.at("temperature"),
          .origin = map.at("origin")};
}

json encode_scored(const bridge::ScoredSequence& scored) {
  return {{"id", encode_id(scored.id)},
          {"logprobs", to_bin(scored.logprobs)},
          {"scaled_logprobs", to_bin(scored.scaled_logprobs)},
          {"entropy", to_bin(scored.entropy)}};
}

bridge::ScoredSequence decode_scored(const json& map) {
  return {.id = decode_id(map.at("id")),
          .logprobs = from_bin<float>(map.at("logprobs")),
          .scaled_logprobs = from_bin<float>(map.at("scaled_logprobs")),
          .entropy = from_bin<float>(map.at("entropy"))};
}

json encode_sleep(const bridge::SleepState& state) {
  return {{"asleep", encode_tags(state.asleep)},
          {"needs_weights", state.needs_weights},
          {"held_bytes", state.held_bytes}};
}

bridge::SleepState decode_sleep(const json& map) {
  return {.asleep = decode_tags(map.at("asleep")),
          .needs_weights = map.at("needs_weights"),
          .held_bytes = integer<int64_t>(map.at("held_bytes"))};
}

json encode_state(const told::State& state) {
  return {{"type", "state"},
          {"weight_version", state.weight_version},
          {"awaited", encode_optional(state.awaited_weight_version)},
          {"health", encode_outcome(state.health)},
          {"sleep", encode_sleep(state.sleep)}};
}

told::State decode_state(const json& map) {
  return {.weight_version = integer<int64_t>(map.at("weight_version")),
          .awaited_weight_version = decode_optional<int64_t>(map.at("awaited")),
          .health = decode_outcome(map.at("health")),
          .sleep = decode_sleep(map.at("sleep"))};
}

// As the journal writes them.
json encode_batches(const std::vector<bridge::FormedBatch>& batches) {
  const std::string bytes = encode(Record(record::Formed{batches}));
  return json::binary({bytes.begin(), bytes.end()});
}

std::vector<bridge::FormedBatch> decode_batches(const json& value) {
  const auto& bytes = value.get_binary();
  Record record = decode_record({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  return std::get<record::Formed>(std::move(record)).batches;
}

json encode_restored(const bridge::RestoredDelivery& restored) {
  json unformed = json::array();
  for (const bridge::UnformedGroups& groups : restored.unformed) {
    unformed.push_back(json::array({groups.request_id, to_bin(groups.prompt_indices)}));
  }
  return {{"instance", restored.instance},
          {"last_batch_seq", restored.last_batch_seq},
          {"num_steps", restored.num_steps},
          {"batches", encode_batches(restored.batches)},
          {"unformed", std::move(unformed)}};
}

bridge::RestoredDelivery decode_restored(const json& map) {
  bridge::RestoredDelivery restored{.instance = map.at("instance"),
                                    .last_batch_seq = integer<uint64_t>(map.at("last_batch_seq")),
                                    .num_steps = integer<uint64_t>(map.at("num_steps")),
                                    .batches = decode_batches(map.at("batches"))};
  for (const json& groups : map.at("unformed")) {
    restored.unformed.push_back({integer<int64_t>(groups.at(0)), from_bin<int32_t>(groups.at(1))});
  }
  return restored;
}

struct RequestEncoder {
  json operator()(const asked::Opened&) const { return {{"type", "opened"}}; }
  json operator()(const asked::Submit& m) const {
    json prompts = json::array();
    for (const bridge::PromptRequest& prompt : m.prompts) prompts.push_back(encode_prompt(prompt));
    return {{"type", "submit"}, {"ticket", m.ticket}, {"prompts", std::move(prompts)}};
  }
  json operator()(const asked::Abort& m) const {
    return {{"type", "abort"}, {"ticket", m.ticket}, {"request_id", encode_optional(m.request_id)}};
  }
  json operator()(const asked::Pause& m) const {
    return {{"type", "pause"}, {"ticket", m.ticket}, {"in_flight", static_cast<int>(m.in_flight)}};
  }
  json operator()(const asked::Resume&) const { return {{"type", "resume"}}; }
  json operator()(const asked::Sleep& m) const {
    return {{"type", "sleep"},
            {"ticket", m.ticket},
            {"level", m.level},
            {"in_flight", static_cast<int>(m.in_flight)}};
  }
  json operator()(const asked::WakeUp& m) const {
    return {{"type", "wake_up"}, {"ticket", m.ticket}, {"tags", encode_tags(m.tags)}};
  }
  json operator()(const asked::Score& m) const {
    json sequences = json::array();
    for (const bridge::ScoreSequence& each : m.sequences) {
      sequences.push_back(encode_sequence(each));
    }
    return {{"type", "score"}, {"ticket", m.ticket}, {"sequences", std::move(sequences)}};
  }
  json operator()(const asked::FindWeights& m) const {
    return {{"type", "find_weights"}, {"ticket", m.ticket}};
  }
  json operator()(const asked::FindStats& m) const {
    return {{"type", "find_stats"}, {"ticket", m.ticket}};
  }
  json operator()(const asked::Shutdown&) const { return {{"type", "shutdown"}}; }
  json operator()(const asked::Present&) const { return {{"type", "present"}}; }
  json operator()(const asked::FindBridge& m) const {
    return {{"type", "find_bridge"}, {"node", m.node}};
  }
  json operator()(const asked::Formed& m) const {
    return {{"type", "formed"}, {"batches", encode_batches(m.batches)}};
  }
  json operator()(const asked::Released& m) const {
    return {{"type", "released"}, {"batch_seq", m.batch_seq}};
  }
  json operator()(const asked::WhenDurable& m) const {
    return {{"type", "when_durable"}, {"ticket", m.ticket}};
  }
  json operator()(const asked::Received& m) const {
    return {{"type", "received"}, {"num_bytes", m.num_bytes}};
  }
};

struct NewsEncoder {
  json operator()(const told::State& m) const { return encode_state(m); }
  json operator()(const told::Open& m) const {
    return {{"type", "open"},
            {"config", m.info.resolved_config_json},
            {"eos_token_ids", to_bin(m.info.eos_token_ids)},
            {"pad_token_id", m.info.pad_token_id},
            {"vocab_size", m.info.vocab_size},
            {"fingerprint", m.info.fingerprint},
            {"attention_parity_tokens", m.info.attention_parity_tokens},
            {"state", encode_state(m.state)},
            {"restored", m.restored ? encode_restored(*m.restored) : json()}};
  }
  json operator()(const told::Number& m) const {
    return {{"type", "number"},
            {"ticket", m.ticket},
            {"error", encode_outcome(m.error)},
            {"value", m.value}};
  }
  json operator()(const told::Scores& m) const {
    json results = json::array();
    for (const bridge::ScoredSequence& each : m.results) results.push_back(encode_scored(each));
    return {{"type", "scores"},
            {"ticket", m.ticket},
            {"error", encode_outcome(m.error)},
            {"results", std::move(results)}};
  }
  json operator()(const told::Slept& m) const {
    return {{"type", "slept"},
            {"ticket", m.ticket},
            {"error", encode_outcome(m.error)},
            {"state", encode_sleep(m.state)}};
  }
  json operator()(const told::Weights& m) const {
    return {{"type", "weights"},
            {"ticket", m.ticket},
            {"version", m.weights.version},
            {"hash", m.weights.hash},
            {"packing_ms", m.weights.packing_ms},
            {"pause_ms", m.weights.pause_ms}};
  }
  json operator()(const told::Stats& m) const {
    return {{"type", "stats"}, {"ticket", m.ticket}, {"values", m.values}};
  }
  json operator()(const told::Failed& m) const {
    return {{"type", "failed"},
            {"key", encode_key(m.sample.key)},
            {"error", error_to_map(m.sample.error)}};
  }
  json operator()(const told::Decided& m) const {
    return {{"type", "decided"},
            {"worker", m.worker},
            {"key", encode_key(m.key)},
            {"attempt", m.attempt},
            {"verdict", static_cast<int>(m.verdict)}};
  }
  json operator()(const told::Forgotten& m) const {
    return {{"type", "forgotten"}, {"worker", m.worker}};
  }
  json operator()(const told::Ping&) const { return {{"type", "ping"}}; }
  json operator()(const told::BridgeAt& m) const {
    return {{"type", "bridge_at"}, {"node", m.node}, {"address", m.address}, {"port", m.port}};
  }
};

uint64_t ticket_of(const json& map) {
  return integer<uint64_t>(map.at("ticket"));
}

NodeRequest decode_known_request(const json& map) {
  const std::string type = map.at("type");
  if (type == "opened") return asked::Opened{};
  if (type == "submit") {
    asked::Submit submit{.ticket = ticket_of(map)};
    for (const json& each : map.at("prompts")) submit.prompts.push_back(decode_prompt(each));
    return submit;
  }
  if (type == "abort") {
    return asked::Abort{ticket_of(map), decode_optional<int64_t>(map.at("request_id"))};
  }
  if (type == "pause") {
    return asked::Pause{ticket_of(map), enumerator(map.at("in_flight"), bridge::InFlight::kAbort)};
  }
  if (type == "resume") return asked::Resume{};
  if (type == "sleep") {
    return asked::Sleep{ticket_of(map), integer<int>(map.at("level")),
                        enumerator(map.at("in_flight"), bridge::InFlight::kAbort)};
  }
  if (type == "wake_up") return asked::WakeUp{ticket_of(map), decode_tags(map.at("tags"))};
  if (type == "score") {
    asked::Score score{.ticket = ticket_of(map)};
    for (const json& each : map.at("sequences")) score.sequences.push_back(decode_sequence(each));
    return score;
  }
  if (type == "find_weights") return asked::FindWeights{ticket_of(map)};
  if (type == "find_stats") return asked::FindStats{ticket_of(map)};
  if (type == "shutdown") return asked::Shutdown{};
  if (type == "present") return asked::Present{};
  if (type == "find_bridge") return asked::FindBridge{integer<int32_t>(map.at("node"))};
  if (type == "formed") return asked::Formed{decode_batches(map.at("batches"))};
  if (type == "released") return asked::Released{integer<uint64_t>(map.at("batch_seq"))};
  if (type == "when_durable") return asked::WhenDurable{ticket_of(map)};
  if (type == "received") return asked::Received{integer<uint64_t>(map.at("num_bytes"))};
  fail_invariant("unknown request of a node " + type);
}

NodeNews decode_known_news(const json& map) {
  const std::string type = map.at("type");
  if (type == "state") return decode_state(map);
  if (type == "open") {
    return told::Open{
        .info = {.resolved_config_json = map.at("config"),
                 .eos_token_ids = from_bin<int32_t>(map.at("eos_token_ids")),
                 .pad_token_id = integer<int32_t>(map.at("pad_token_id")),
                 .vocab_size = integer<int64_t>(map.at("vocab_size")),
                 .fingerprint = map.at("fingerprint"),
                 .attention_parity_tokens = integer<int64_t>(map.at("attention_parity_tokens"))},
        .state = decode_state(map.at("state")),
        .restored = map.at("restored").is_null()
                        ? std::nullopt
                        : std::optional(decode_restored(map.at("restored")))};
  }
  if (type == "number") {
    return told::Number{ticket_of(map), decode_outcome(map.at("error")),
                        integer<int64_t>(map.at("value"))};
  }
  if (type == "scores") {
    told::Scores scores{.ticket = ticket_of(map), .error = decode_outcome(map.at("error"))};
    for (const json& each : map.at("results")) scores.results.push_back(decode_scored(each));
    return scores;
  }
  if (type == "slept") {
    return told::Slept{ticket_of(map), decode_outcome(map.at("error")),
                       decode_sleep(map.at("state"))};
  }
  if (type == "weights") {
    return told::Weights{ticket_of(map),
                         {.version = integer<int64_t>(map.at("version")),
                          .hash = integer<uint64_t>(map.at("hash")),
                          .packing_ms = map.at("packing_ms"),
                          .pause_ms = map.at("pause_ms")}};
  }
  if (type == "stats") return told::Stats{ticket_of(map), map.at("values")};
  if (type == "failed") {
    return told::Failed{{decode_key(map.at("key")), error_from_map(map.at("error"))}};
  }
  if (type == "decided") {
    return told::Decided{integer<int32_t>(map.at("worker")), decode_key(map.at("key")),
                         integer<int32_t>(map.at("attempt")),
                         enumerator(map.at("verdict"), Verdict::kDrop)};
  }
  if (type == "forgotten") return told::Forgotten{integer<int32_t>(map.at("worker"))};
  if (type == "ping") return told::Ping{};
  if (type == "bridge_at") {
    return told::BridgeAt{integer<int32_t>(map.at("node")), map.at("address"),
                          integer<int32_t>(map.at("port"))};
  }
  fail_invariant("unknown news for a node " + type);
}

std::vector<uint8_t> marked(const json& map) {
  std::vector<uint8_t> body = bridge::encode_message(map);
  body.insert(body.begin(), kNodeMark);
  return body;
}

template <class Decode>
auto decode(std::span<const uint8_t> body, const Decode& decode_known) {
  const json map = bridge::decode_message(body.subspan(1));
  try {
    return decode_known(map);
  } catch (const std::exception& error) {
    fail_decoding(map, error);
  }
}

}  // namespace

bool is_node_frame(std::span<const uint8_t> body) {
  return !body.empty() && (body[0] == kNodeMark || body[0] == kSampleMark);
}

std::vector<uint8_t> encode(const NodeRequest& request) {
  return marked(std::visit(RequestEncoder{}, request));
}

std::vector<uint8_t> encode(const NodeNews& news) {
  return marked(std::visit(NewsEncoder{}, news));
}

NodeRequest decode_node_request(std::span<const uint8_t> body) {
  return decode(body, decode_known_request);
}

NodeNews decode_node_news(std::span<const uint8_t> body) {
  return decode(body, decode_known_news);
}

}  // namespace rollpack::rollout
