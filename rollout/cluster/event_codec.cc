// Events, from a worker to rank 0, as frames.
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "kernels/base/error.h"
#include "rollout/cluster/message_codec.h"
#include "rollout/cluster/message_parts.h"
#include "trainer_bridge/wire/message.h"

namespace rollpack::rollout {
namespace {

using bridge::error_from_map;
using bridge::error_to_map;
using bridge::Frame;
using bridge::to_bin;
using json = bridge::Json;

json encode_sample(const bridge::Sample& sample) {
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
          {"weight_versions", encode_spans(sample.weight_versions)}};
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
  sample.finish_reason = enumerator(map.at("finish_reason"), bridge::FinishReason::kAbort);
  sample.stop_token_id = integer<int32_t>(map.at("stop_token_id"));
  sample.temperature = map.at("temperature");
  sample.weight_versions = decode_spans(map.at("weight_versions"));
  return sample;
}

json encode_hash(const std::optional<uint64_t>& hash) {
  return hash ? json(*hash) : json();
}

std::optional<uint64_t> decode_hash(const json& value) {
  if (value.is_null()) return std::nullopt;
  return integer<uint64_t>(value);
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
                .largest_step_rows = integer<int64_t>(map.at("largest_step_rows")),
                .peak_pages = integer<int64_t>(map.at("peak_pages")),
                .first_token_times_s = map.at("first_token_times_s"),
                .token_gaps_s = from_bin<float>(map.at("token_gaps_s")),
                .profile = {.num_steps = integer<int64_t>(map.at("num_steps")),
                            .program_s = map.at("program_s")},
                .stats = map.at("stats")};
  for (const json& op : map.at("ops")) {
    m.profile.ops.push_back({.name = op.at(0),
                             .num_calls = integer<int64_t>(op.at(1)),
                             .num_rows = integer<int64_t>(op.at(2)),
                             .seconds = op.at(3),
                             .flops = op.at(4),
                             .bytes = op.at(5)});
  }
  return m;
}

struct EventEncoder {
  json operator()(const WorkerReady& m) const {
    return {{"type", "ready"},
            {"pid", m.pid},
            {"fingerprint", m.fingerprint},
            {"weights_hash", encode_hash(m.weights_hash)}};
  }
  json operator()(const Pull& m) const {
    return {{"type", "pull"}, {"num_samples", m.num_samples}};
  }
  json operator()(const SampleDone& m) const {
    return {{"type", "sample"}, {"attempt", m.attempt}, {"sample", encode_sample(m.sample)}};
  }
  json operator()(const SampleKept& m) const {
    return {{"type", "kept"},
            {"attempt", m.attempt},
            {"key", encode_key(m.key)},
            {"finish_reason", static_cast<int>(m.finish_reason)}};
  }
  json operator()(const SampleWithdrawn& m) const {
    return {{"type", "withdrawn"}, {"attempt", m.attempt}, {"key", encode_key(m.key)}};
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
    return {{"type", "ack"},
            {"ticket", m.ticket},
            {"error", encode_outcome(m.error)},
            {"weights_hash", encode_hash(m.weights_hash)},
            {"packing_ms", m.times.packing_ms},
            {"pause_ms", m.times.pause_ms},
            {"held_bytes", m.held_bytes ? json(*m.held_bytes) : json()}};
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
    return WorkerReady{.pid = integer<int64_t>(map.at("pid")),
                       .fingerprint = map.at("fingerprint"),
                       .weights_hash = decode_hash(map.at("weights_hash"))};
  if (type == "pull") return Pull{integer<int32_t>(map.at("num_samples"))};
  if (type == "sample")
    return SampleDone{decode_sample(map.at("sample")), integer<int32_t>(map.at("attempt"))};
  if (type == "kept") {
    return SampleKept{decode_key(map.at("key")), integer<int32_t>(map.at("attempt")),
                      enumerator(map.at("finish_reason"), bridge::FinishReason::kAbort)};
  }
  if (type == "withdrawn") {
    return SampleWithdrawn{decode_key(map.at("key")), integer<int32_t>(map.at("attempt"))};
  }
  if (type == "failed") {
    return SampleFailed{{decode_key(map.at("key")), error_from_map(map.at("error"))},
                        integer<int32_t>(map.at("attempt"))};
  }
  if (type == "scored") {
    return Scored{.ticket = integer<uint64_t>(map.at("ticket")),
                  .error = decode_outcome(map.at("error")),
                  .sequence = {.id = decode_id(map.at("id")),
                               .logprobs = from_bin<float>(map.at("logprobs")),
                               .scaled_logprobs = from_bin<float>(map.at("scaled_logprobs")),
                               .entropy = from_bin<float>(map.at("entropy"))}};
  }
  if (type == "ack") {
    const json& held = map.at("held_bytes");
    return Ack{.ticket = integer<uint64_t>(map.at("ticket")),
               .error = decode_outcome(map.at("error")),
               .weights_hash = decode_hash(map.at("weights_hash")),
               .times = {.packing_ms = map.at("packing_ms"), .pause_ms = map.at("pause_ms")},
               .held_bytes = held.is_null() ? std::nullopt : std::optional(integer<int64_t>(held))};
  }
  if (type == "progress") return StepProgress{};
  if (type == "stats") return WorkerStats{map.at("values")};
  if (type == "measured") {
    return Measured{.ticket = integer<uint64_t>(map.at("ticket")),
                    .measurement = decode_measurement(map.at("measurement"))};
  }
  if (type == "stopped") return WorkerStopped{};
  if (type == "worker_failed") return WorkerFailed{error_from_map(map.at("error"))};
  fail_invariant("unknown event " + type);
}

// The end that the request comes to whose result no frame holds; nullopt: nobody waits for it.
std::optional<Event> as_failure(const Event& event, const ErrorInfo& error) {
  if (const auto* done = std::get_if<SampleDone>(&event)) {
    return SampleFailed{{done->sample.key, error}, done->attempt};
  }
  if (const auto* scored = std::get_if<Scored>(&event)) {
    return Scored{scored->ticket, error, {.id = scored->sequence.id}};
  }
  return std::nullopt;
}

}  // namespace

Frame encode(const Event& event) {
  const auto encoded = [](const Event& told) {
    return Frame{.body = bridge::encode_message(std::visit(EventEncoder{}, told)), .fds = {}};
  };
  try {
    return encoded(event);
  } catch (const Error& too_long) {
    const std::optional<Event> failure = as_failure(event, too_long.info);
    if (!failure) throw;
    return encoded(*failure);
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
