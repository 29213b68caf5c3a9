// Commands, from rank 0 to a worker, as frames.
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/base/error.h"
#include "rollout/cluster/message_codec.h"
#include "rollout/cluster/message_parts.h"
#include "trainer_bridge/shared_memory/segment.h"
#include "trainer_bridge/wire/message.h"

namespace rollpack::rollout {
namespace {

using bridge::Frame;
using bridge::OwnedFd;
using bridge::to_bin;
using json = bridge::Json;

json encode_group(const GroupRequest& group) {
  const RequestSampling& sampling = group.sampling;
  return {{"key", encode_key(group.key)},
          {"attempt", group.attempt},
          {"sample_indices", to_bin(group.sample_indices)},
          {"prompt_ids", to_bin(*group.prompt_ids)},
          {"temperature", sampling.params.temperature},
          {"top_k", sampling.params.top_k},
          {"top_p", sampling.params.top_p},
          {"min_p", sampling.params.min_p},
          {"seed", sampling.seed},
          {"response_length", sampling.response_length},
          {"min_tokens", sampling.min_tokens},
          {"stop_token_ids", to_bin(sampling.stop_token_ids)},
          {"response_lengths", to_bin(group.response_lengths)},
          {"ignores_stops", group.ignores_stops}};
}

GroupRequest decode_group(const json& map) {
  GroupRequest group{.key = decode_key(map.at("key")),
                     .attempt = integer<int32_t>(map.at("attempt")),
                     .sample_indices = from_bin<int32_t>(map.at("sample_indices"))};
  group.prompt_ids =
      std::make_shared<const std::vector<int32_t>>(from_bin<int32_t>(map.at("prompt_ids")));
  group.sampling = {.params = {.temperature = map.at("temperature"),
                               .top_k = integer<int32_t>(map.at("top_k")),
                               .top_p = map.at("top_p"),
                               .min_p = map.at("min_p")},
                    .seed = integer<uint64_t>(map.at("seed")),
                    .response_length = integer<int32_t>(map.at("response_length")),
                    .min_tokens = integer<int32_t>(map.at("min_tokens")),
                    .stop_token_ids = from_bin<int32_t>(map.at("stop_token_ids"))};
  group.response_lengths = from_bin<int32_t>(map.at("response_lengths"));
  group.ignores_stops = map.at("ignores_stops");
  return group;
}

json encode_score(const ScoreRequest& request) {
  const bridge::ScoreSequence& sequence = request.sequence;
  return {{"ticket", request.ticket},
          {"id", encode_id(sequence.id)},
          {"input_ids", to_bin(sequence.input_ids)},
          {"response_ids", to_bin(sequence.response_ids)},
          {"temperature", sequence.temperature},
          {"origin", sequence.origin}};
}

ScoreRequest decode_score(const json& map) {
  return {.ticket = integer<uint64_t>(map.at("ticket")),
          .sequence = {.id = decode_id(map.at("id")),
                       .input_ids = from_bin<int32_t>(map.at("input_ids")),
                       .response_ids = from_bin<int32_t>(map.at("response_ids")),
                       .temperature = map.at("temperature"),
                       .origin = map.at("origin")}};
}

json encode_chunk(const bridge::WeightChunk& chunk) {
  if (chunk.lender) fail_invariant("lent weights are read by the process they were lent to");
  json tensors = json::array();
  for (const bridge::WeightTensor& tensor : chunk.tensors) {
    tensors.push_back({{"name", tensor.name},
                       {"dtype", static_cast<int>(tensor.dtype)},
                       {"shape", tensor.shape},
                       {"offset", tensor.bytes.data() - chunk.mapping.data()},
                       {"bytes", tensor.bytes.size()}});
  }
  return {{"mapping_bytes", chunk.mapping.size()}, {"tensors", tensors}};
}

bridge::WeightTensor decode_tensor(const json& map, std::span<const std::byte> mapping) {
  bridge::WeightTensor tensor{.name = map.at("name"),
                              .dtype = enumerator(map.at("dtype"), DType::kU8)};
  for (const json& extent : map.at("shape")) tensor.shape.push_back(integer<int64_t>(extent));
  const auto offset = integer<size_t>(map.at("offset")), bytes = integer<size_t>(map.at("bytes"));
  if (offset > mapping.size() || bytes > mapping.size() - offset) {
    throw std::out_of_range("tensor " + tensor.name + " lies outside its chunk");
  }
  tensor.bytes = mapping.subspan(offset, bytes);
  return tensor;
}

// The chunk with the mapping and descriptor it lives in.
struct OwnedChunk {
  explicit OwnedChunk(bridge::MappedSegment mapped) : segment(std::move(mapped)) {}
  bridge::MappedSegment segment;
  bridge::WeightChunk chunk;
};

std::shared_ptr<const bridge::WeightChunk> decode_chunk(const json& map, const OwnedFd& fd) {
  auto owned = std::make_shared<OwnedChunk>(
      bridge::MappedSegment::map(fd.get(), integer<int64_t>(map.at("mapping_bytes")),
                                 bridge::kPeerSeals, "weight chunk of rank 0"));
  owned->chunk.mapping = owned->segment.bytes();
  for (const json& tensor : map.at("tensors")) {
    owned->chunk.tensors.push_back(decode_tensor(tensor, owned->chunk.mapping));
  }
  return {owned, &owned->chunk};
}

json in_flight(bridge::InFlight mode) {
  return static_cast<int>(mode);
}

bridge::InFlight in_flight(const json& map) {
  return enumerator(map.at("in_flight"), bridge::InFlight::kAbort);
}

struct CommandEncoder {
  json operator()(const AddGroups& m) const {
    json groups = json::array();
    for (const GroupRequest& group : m.groups) groups.push_back(encode_group(group));
    return {{"type", "add_groups"}, {"groups", groups}};
  }
  json operator()(const AddScores& m) const {
    json requests = json::array();
    for (const ScoreRequest& request : m.requests) requests.push_back(encode_score(request));
    return {{"type", "add_scores"}, {"requests", requests}};
  }
  json operator()(const AbortSamples& m) const {
    return {{"type", "abort"}, {"request_id", m.request_id ? json(*m.request_id) : json()}};
  }
  json operator()(const Pause& m) const {
    return {{"type", "pause"}, {"ticket", m.ticket}, {"in_flight", in_flight(m.in_flight)}};
  }
  json operator()(const Resume&) const { return {{"type", "resume"}}; }
  json operator()(const Sleep& m) const {
    return {{"type", "sleep"},
            {"ticket", m.ticket},
            {"level", m.level},
            {"in_flight", in_flight(m.in_flight)}};
  }
  json operator()(const WakeUp& m) const {
    return {{"type", "wake_up"}, {"ticket", m.ticket}, {"tags", encode_tags(m.tags)}};
  }
  json operator()(const BeginWeights& m) const {
    return {{"type", "begin_weights"}, {"ticket", m.ticket}, {"is_partial", m.is_partial}};
  }
  json operator()(const StageWeights& m) const {
    return {{"type", "stage_weights"}, {"ticket", m.ticket}, {"chunk", encode_chunk(*m.chunk)}};
  }
  json operator()(const FinishWeights& m) const {
    return {{"type", "finish_weights"}, {"ticket", m.ticket}, {"exports", m.exports}};
  }
  json operator()(const AdoptWeights& m) const {
    return {{"type", "adopt_weights"}, {"ticket", m.ticket}};
  }
  json operator()(const CommitWeights& m) const {
    return {{"type", "commit_weights"},
            {"ticket", m.ticket},
            {"version", m.version},
            {"in_flight", in_flight(m.in_flight)}};
  }
  json operator()(const DiscardWeights&) const { return {{"type", "discard_weights"}}; }
  json operator()(const Measure& m) const {
    return {{"type", "measure"}, {"ticket", m.ticket}, {"batching", m.batching}};
  }
  json operator()(const TakeMeasurement& m) const {
    return {{"type", "take_measurement"}, {"ticket", m.ticket}};
  }
  json operator()(const Stop& m) const { return {{"type", "stop"}, {"hand_back", m.hand_back}}; }
  json operator()(const Ping& m) const { return {{"type", "ping"}, {"ticket", m.ticket}}; }
};

Command decode_known_command(const json& map, std::vector<OwnedFd>& fds) {
  const std::string type = map.at("type");
  const auto ticket = [&] { return integer<uint64_t>(map.at("ticket")); };
  if (type == "add_groups") {
    AddGroups command;
    for (const json& group : map.at("groups")) command.groups.push_back(decode_group(group));
    return command;
  }
  if (type == "add_scores") {
    AddScores command;
    for (const json& each : map.at("requests")) command.requests.push_back(decode_score(each));
    return command;
  }
  if (type == "abort") {
    const json& id = map.at("request_id");
    return AbortSamples{id.is_null() ? std::nullopt : std::optional(integer<int64_t>(id))};
  }
  if (type == "pause") return Pause{ticket(), in_flight(map)};
  if (type == "resume") return Resume{};
  if (type == "sleep") {
    return Sleep{ticket(), integer<int>(map.at("level")), in_flight(map)};
  }
  if (type == "wake_up") return WakeUp{ticket(), decode_tags(map.at("tags"))};
  if (type == "begin_weights") return BeginWeights{ticket(), map.at("is_partial")};
  if (type == "stage_weights") {
    return StageWeights{ticket(), decode_chunk(map.at("chunk"), fds.at(0))};
  }
  if (type == "finish_weights") return FinishWeights{ticket(), map.at("exports")};
  if (type == "adopt_weights") {
    return AdoptWeights{ticket(), std::make_shared<const OwnedFd>(std::move(fds.at(0)))};
  }
  if (type == "commit_weights") {
    return CommitWeights{ticket(), integer<int64_t>(map.at("version")), in_flight(map)};
  }
  if (type == "discard_weights") return DiscardWeights{};
  if (type == "measure") return Measure{ticket(), map.at("batching").get<std::string>()};
  if (type == "take_measurement") return TakeMeasurement{ticket()};
  if (type == "stop") return Stop{map.at("hand_back").get<bool>()};
  if (type == "ping") return Ping{ticket()};
  fail_invariant("unknown command " + type);
}

}  // namespace

Frame encode(const Command& command) {
  Frame frame{.body = bridge::encode_message(std::visit(CommandEncoder{}, command)), .fds = {}};
  if (const auto* stage = std::get_if<StageWeights>(&command)) {
    frame.fds.push_back(OwnedFd::duplicate(stage->chunk->fd));
  } else if (const auto* adopt = std::get_if<AdoptWeights>(&command)) {
    frame.fds.push_back(OwnedFd::duplicate(adopt->fd->get()));
  }
  return frame;
}

Command decode_command(Frame frame) {
  const json map = bridge::decode_message(frame.body);
  try {
    return decode_known_command(map, frame.fds);
  } catch (const std::exception& error) {
    fail_decoding(map, error);
  }
}

}  // namespace rollpack::rollout
