#include "rollout/cluster/message_codec.h"

#include <cstring>
#include <string>
#include <utility>

#include "kernels/base/error.h"
#include "trainer_bridge/shared_memory/segment.h"
#include "trainer_bridge/wire/message.h"

namespace rollpack::rollout {
namespace {

using bridge::error_from_map;
using bridge::error_to_map;
using bridge::Frame;
using bridge::OwnedFd;
using bridge::to_bin;
using json = bridge::Json;

template <class T>
std::vector<T> from_bin(const json& value) {
  const auto& bytes = value.get_binary();
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

// ---- parts
// ---------------------------------------------------------------------------------------

json encode_outcome(const bridge::Outcome& outcome) {
  return outcome ? error_to_map(*outcome) : json();
}

bridge::Outcome decode_outcome(const json& value) {
  if (value.is_null()) return std::nullopt;
  return error_from_map(value);
}

json encode_id(const bridge::PromptId& id) {
  return json::array({id.text, id.is_integer});
}

bridge::PromptId decode_id(const json& value) {
  return {.text = value.at(0), .is_integer = value.at(1)};
}

json encode_key(const bridge::SampleKey& key) {
  return {{"request_id", key.request_id},
          {"prompt_index", key.prompt_index},
          {"prompt_id", encode_id(key.prompt_id)},
          {"sample_index", key.sample_index},
          {"group_size", key.group_size}};
}

bridge::SampleKey decode_key(const json& map) {
  return {.request_id = map.at("request_id"),
          .prompt_index = map.at("prompt_index"),
          .prompt_id = decode_id(map.at("prompt_id")),
          .sample_index = map.at("sample_index"),
          .group_size = map.at("group_size")};
}

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
          {"response_lengths", to_bin(group.response_lengths)}};
}

GroupRequest decode_group(const json& map) {
  GroupRequest group{.key = decode_key(map.at("key")),
                     .attempt = map.at("attempt"),
                     .sample_indices = from_bin<int32_t>(map.at("sample_indices"))};
  group.prompt_ids =
      std::make_shared<const std::vector<int32_t>>(from_bin<int32_t>(map.at("prompt_ids")));
  group.sampling = {.params = {.temperature = map.at("temperature"),
                               .top_k = map.at("top_k"),
                               .top_p = map.at("top_p"),
                               .min_p = map.at("min_p")},
                    .seed = map.at("seed"),
                    .response_length = map.at("response_length"),
                    .min_tokens = map.at("min_tokens"),
                    .stop_token_ids = from_bin<int32_t>(map.at("stop_token_ids"))};
  group.response_lengths = from_bin<int32_t>(map.at("response_lengths"));
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
  return {.ticket = map.at("ticket"),
          .sequence = {.id = decode_id(map.at("id")),
                       .input_ids = from_bin<int32_t>(map.at("input_ids")),
                       .response_ids = from_bin<int32_t>(map.at("response_ids")),
                       .temperature = map.at("temperature"),
                       .origin = map.at("origin")}};
}

json encode_sample(const bridge::Sample& sample) {
  json versions = json::array();
  for (const bridge::VersionSpan& span : sample.weight_versions) {
    versions.push_back(json::array({span.first_token, span.version}));
  }
  return {{"key", encode_key(sample.key)},
          {"prompt_ids", to_bin(*sample.prompt_ids)},
          {"response_ids", to_bin(sample.response_ids)},
          {"logprobs", to_bin(sample.logprobs)},
          {"scaled_logprobs", to_bin(sample.scaled_logprobs)},
          {"support_logmass", to_bin(sample.support_logmass)},
          {"entropy", to_bin(sample.entropy)},
          {"ref_log_prob", to_bin(sample.ref_log_prob)},
          {"finish_reason", static_cast<int>(sample.finish_reason)},
          {"stop_token_id", sample.stop_token_id},
          {"temperature", sample.temperature},
          {"weight_versions", versions}};
}

bridge::Sample decode_sample(const json& map) {
  bridge::Sample sample{.key = decode_key(map.at("key"))};
  sample.prompt_ids =
      std::make_shared<const std::vector<int32_t>>(from_bin<int32_t>(map.at("prompt_ids")));
  sample.response_ids = from_bin<int32_t>(map.at("response_ids"));
  sample.logprobs = from_bin<float>(map.at("logprobs"));
  sample.scaled_logprobs = from_bin<float>(map.at("scaled_logprobs"));
  sample.support_logmass = from_bin<float>(map.at("support_logmass"));
  sample.entropy = from_bin<float>(map.at("entropy"));
  sample.ref_log_prob = from_bin<float>(map.at("ref_log_prob"));
  sample.finish_reason = static_cast<bridge::FinishReason>(map.at("finish_reason").get<int>());
  sample.stop_token_id = map.at("stop_token_id");
  sample.temperature = map.at("temperature");
  for (const json& span : map.at("weight_versions")) {
    sample.weight_versions.push_back({.first_token = span.at(0), .version = span.at(1)});
  }
  return sample;
}

json encode_chunk(const bridge::WeightChunk& chunk) {
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

// The chunk with the mapping and descriptor it lives in.
struct OwnedChunk {
  explicit OwnedChunk(bridge::MappedSegment mapped) : segment(std::move(mapped)) {}
  bridge::MappedSegment segment;
  bridge::WeightChunk chunk;
};

std::shared_ptr<const bridge::WeightChunk> decode_chunk(const json& map, const OwnedFd& fd) {
  auto owned = std::make_shared<OwnedChunk>(
      bridge::MappedSegment::map(fd.get(), map.at("mapping_bytes").get<int64_t>(),
                                 bridge::kPeerSeals, "weight chunk of rank 0"));
  owned->chunk.mapping = owned->segment.bytes();
  for (const json& tensor : map.at("tensors")) {
    owned->chunk.tensors.push_back(
        {.name = tensor.at("name"),
         .dtype = static_cast<DType>(tensor.at("dtype").get<int>()),
         .shape = tensor.at("shape"),
         .bytes = owned->chunk.mapping.subspan(tensor.at("offset").get<size_t>(),
                                               tensor.at("bytes").get<size_t>())});
  }
  return {owned, &owned->chunk};
}

json encode_measurement(const Measurement& m) {
  json ops = json::array();
  for (const kernels::OpProfile& op : m.profile.ops) {
    ops.push_back(
        json::array({op.name, op.num_calls, op.num_rows, op.seconds, op.flops, op.bytes}));
  }
  return {{"step_flops", to_bin(m.step_flops)},
          {"step_bytes", to_bin(m.step_bytes)},
          {"compute_s", m.compute_s},
          {"largest_step_rows", m.largest_step_rows},
          {"peak_pages", m.peak_pages},
          {"first_token_times_s", m.first_token_times_s},
          {"token_gaps_s", to_bin(m.token_gaps_s)},
          {"num_steps", m.profile.num_steps},
          {"program_s", m.profile.program_s},
          {"ops", ops},
          {"stats", m.stats}};
}

Measurement decode_measurement(const json& map) {
  Measurement m{.step_flops = from_bin<float>(map.at("step_flops")),
                .step_bytes = from_bin<float>(map.at("step_bytes")),
                .compute_s = map.at("compute_s"),
                .largest_step_rows = map.at("largest_step_rows"),
                .peak_pages = map.at("peak_pages"),
                .first_token_times_s = map.at("first_token_times_s"),
                .token_gaps_s = from_bin<float>(map.at("token_gaps_s")),
                .profile = {.num_steps = map.at("num_steps"), .program_s = map.at("program_s")},
                .stats = map.at("stats")};
  for (const json& op : map.at("ops")) {
    m.profile.ops.push_back({.name = op.at(0),
                             .num_calls = op.at(1),
                             .num_rows = op.at(2),
                             .seconds = op.at(3),
                             .flops = op.at(4),
                             .bytes = op.at(5)});
  }
  return m;
}

json in_flight(bridge::InFlight mode) {
  return static_cast<int>(mode);
}

bridge::InFlight in_flight(const json& map) {
  return static_cast<bridge::InFlight>(map.at("in_flight").get<int>());
}

// ---- commands
// ------------------------------------------------------------------------------------

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
  json operator()(const BeginWeights& m) const {
    return {{"type", "begin_weights"}, {"ticket", m.ticket}, {"is_partial", m.is_partial}};
  }
  json operator()(const StageWeights& m) const {
    return {{"type", "stage_weights"}, {"ticket", m.ticket}, {"chunk", encode_chunk(*m.chunk)}};
  }
  json operator()(const FinishWeights& m) const {
    return {{"type", "finish_weights"}, {"ticket", m.ticket}};
  }
  json operator()(const ExportWeights& m) const {
    return {{"type", "export_weights"}, {"ticket", m.ticket}};
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
};

Command decode_known_command(const json& map, std::vector<OwnedFd>& fds) {
  const std::string type = map.at("type");
  const auto ticket = [&] { return map.at("ticket").get<uint64_t>(); };
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
    return AbortSamples{id.is_null() ? std::nullopt : std::optional(id.get<int64_t>())};
  }
  if (type == "pause") return Pause{ticket(), in_flight(map)};
  if (type == "resume") return Resume{};
  if (type == "begin_weights") return BeginWeights{ticket(), map.at("is_partial")};
  if (type == "stage_weights") {
    return StageWeights{ticket(), decode_chunk(map.at("chunk"), fds.at(0))};
  }
  if (type == "finish_weights") return FinishWeights{ticket()};
  if (type == "export_weights") return ExportWeights{ticket()};
  if (type == "adopt_weights") {
    return AdoptWeights{ticket(), std::make_shared<const OwnedFd>(std::move(fds.at(0)))};
  }
  if (type == "commit_weights") {
    return CommitWeights{ticket(), map.at("version").get<int64_t>(), in_flight(map)};
  }
  if (type == "discard_weights") return DiscardWeights{};
  if (type == "measure") return Measure{ticket(), map.at("batching").get<std::string>()};
  if (type == "take_measurement") return TakeMeasurement{ticket()};
  if (type == "stop") return Stop{map.at("hand_back").get<bool>()};
  fail_invariant("unknown command " + type);
}

// ---- events
// --------------------------------------------------------------------------------------

struct EventEncoder {
  json operator()(const WorkerReady& m) const {
    return {{"type", "ready"}, {"pid", m.pid}, {"fingerprint", m.fingerprint}};
  }
  json operator()(const Pull& m) const {
    return {{"type", "pull"}, {"num_samples", m.num_samples}};
  }
  json operator()(const SampleDone& m) const {
    return {{"type", "sample"}, {"attempt", m.attempt}, {"sample", encode_sample(m.sample)}};
  }
  json operator()(const SampleFailed& m) const {
    return {{"type", "failed"},
            {"attempt", m.attempt},
            {"key", encode_key(m.sample.key)},
            {"error", error_to_map(m.sample.error)}};
  }
  json operator()(const Scored& m) const {
    return {{"type", "scored"},
            {"ticket", m.ticket},
            {"error", encode_outcome(m.error)},
            {"id", encode_id(m.sequence.id)},
            {"logprobs", to_bin(m.sequence.logprobs)},
            {"scaled_logprobs", to_bin(m.sequence.scaled_logprobs)},
            {"entropy", to_bin(m.sequence.entropy)}};
  }
  json operator()(const Ack& m) const {
    if (m.fd >= 0) fail_invariant("only rank 0 exports weights");
    return {{"type", "ack"}, {"ticket", m.ticket}, {"error", encode_outcome(m.error)}};
  }
  json operator()(const StepProgress&) const { return {{"type", "progress"}}; }
  json operator()(const WorkerStats& m) const { return {{"type", "stats"}, {"values", m.values}}; }
  json operator()(const Measured& m) const {
    return {{"type", "measured"},
            {"ticket", m.ticket},
            {"measurement", encode_measurement(m.measurement)}};
  }
  json operator()(const WorkerStopped&) const { return {{"type", "stopped"}}; }
  json operator()(const WorkerFailed& m) const {
    return {{"type", "worker_failed"}, {"error", error_to_map(m.error)}};
  }
};

Event decode_known_event(const json& map) {
  const std::string type = map.at("type");
  if (type == "ready")
    return WorkerReady{.pid = map.at("pid"), .fingerprint = map.at("fingerprint")};
  if (type == "pull") return Pull{map.at("num_samples").get<int32_t>()};
  if (type == "sample") return SampleDone{decode_sample(map.at("sample")), map.at("attempt")};
  if (type == "failed") {
    return SampleFailed{{decode_key(map.at("key")), error_from_map(map.at("error"))},
                        map.at("attempt")};
  }
  if (type == "scored") {
    return Scored{.ticket = map.at("ticket"),
                  .error = decode_outcome(map.at("error")),
                  .sequence = {.id = decode_id(map.at("id")),
                               .logprobs = from_bin<float>(map.at("logprobs")),
                               .scaled_logprobs = from_bin<float>(map.at("scaled_logprobs")),
                               .entropy = from_bin<float>(map.at("entropy"))}};
  }
  if (type == "ack")
    return Ack{.ticket = map.at("ticket"), .error = decode_outcome(map.at("error"))};
  if (type == "progress") return StepProgress{};
  if (type == "stats") return WorkerStats{map.at("values")};
  if (type == "measured") {
    return Measured{.ticket = map.at("ticket"),
                    .measurement = decode_measurement(map.at("measurement"))};
  }
  if (type == "stopped") return WorkerStopped{};
  if (type == "worker_failed") return WorkerFailed{error_from_map(map.at("error"))};
  fail_invariant("unknown event " + type);
}

[[noreturn]] void fail_decoding(const json& map, const std::exception& cause) {
  throw Error({.code = ErrorCode::kDataLoss,
               .field = "rank message",
               .value = map.value("type", "without a type"),
               .message = cause.what()});
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

Frame encode(const Event& event) {
  return {.body = bridge::encode_message(std::visit(EventEncoder{}, event)), .fds = {}};
}

Command decode_command(Frame frame) {
  const json map = bridge::decode_message(frame.body);
  try {
    return decode_known_command(map, frame.fds);
  } catch (const std::exception& error) {
    fail_decoding(map, error);
  }
}

Event decode_event(const Frame& frame) {
  const json map = bridge::decode_message(frame.body);
  try {
    return decode_known_event(map);
  } catch (const std::exception& error) {
    fail_decoding(map, error);
  }
}

}  // namespace rollpack::rollout
