#include "trainer_bridge/server/replies.h"

#include <fmt/format.h>

#include <array>
#include <utility>

#include "trainer_bridge/contract/batch_schema.h"
#include "trainer_bridge/server/requests.h"

namespace rollpack::bridge {

Json id_value(const PromptId& id) {
  if (!id.is_integer) return id.text;
  const Json number = Json::parse(id.text, nullptr, /*allow_exceptions=*/false);
  return number.is_number_integer() ? number : Json(id.text);
}

Json hello_reply(const RolloutService& service, const SlotRing& slots,
                 const std::string& instance) {
  const ServiceInfo info = service.info();
  const auto awaited = service.awaited_weight_version();
  return {{"protocol_version", kProtocolVersion},
          {"schema_version", kSchemaVersion},
          {"config", Json::parse(info.resolved_config_json)},
          {"eos_token_ids", to_bin(std::span(info.eos_token_ids))},
          {"pad_token_id", info.pad_token_id},
          {"vocab_size", info.vocab_size},
          {"fingerprint", info.fingerprint},
          {"instance", instance},
          {"attention_parity_tokens", info.attention_parity_tokens},
          {"weight_version", service.weight_version()},
          {"awaited_weight_version", awaited ? Json(*awaited) : Json(nullptr)},
          {"num_slots", slots.num_slots()},
          {"slot_bytes", slots.slot_bytes()},
          {"num_fds", slots.num_slots()}};
}

std::vector<int32_t> filled_slots(const SlotRing& slots) {
  std::vector<int32_t> filled;
  for (int32_t slot = 0; slot < slots.num_slots(); ++slot) {
    if (slots.generation(slot) > 0) filled.push_back(slot);
  }
  return filled;
}

Json inspect_reply(const SlotRing& slots) {
  // Between two requests nothing is being written: a slot that is "filling" waits with its batch.
  constexpr std::array<const char*, 3> kStates = {"released", "left behind", "delivered"};
  Json list = Json::array();
  for (const int32_t slot : filled_slots(slots)) {
    list.push_back({{"slot", slot},
                    {"generation", slots.generation(slot)},
                    {"state", kStates[static_cast<size_t>(slots.state(slot))]}});
  }
  const size_t num_fds = list.size();
  return {{"slots", std::move(list)}, {"slot_bytes", slots.slot_bytes()}, {"num_fds", num_fds}};
}

Json sleep_reply(const SleepState& state) {
  Json asleep = Json::array();
  if (state.asleep.weights) asleep.push_back("weights");
  if (state.asleep.kv_cache) asleep.push_back("kv_cache");
  return {{"asleep", std::move(asleep)},
          {"needs_weights", state.needs_weights},
          {"held_bytes", state.held_bytes}};
}

// The hash as text: readers of MessagePack differ in what they make of a number above 2^63.
Json weights_reply(const WeightsInUse& weights) {
  return {{"weight_version", weights.version},
          {"weights_hash", fmt::format("{:016x}", weights.hash)},
          {"packing_ms", weights.packing_ms},
          {"pause_ms", weights.pause_ms}};
}

Json batch_reply(const BatchNotice& notice) {
  Json failed = Json::array();
  for (const FailedSample& sample : notice.failed) {
    failed.push_back({{"request_id", sample.key.request_id},
                      {"prompt_index", sample.key.prompt_index},
                      {"prompt_id", id_value(sample.key.prompt_id)},
                      {"sample_index", sample.key.sample_index},
                      {"group_size", sample.key.group_size},
                      {"error", error_to_map(sample.error)}});
  }
  const SlotLease lease = notice.lease.value_or(SlotLease{});
  return {{"slot", notice.lease ? Json(lease.slot) : Json(nullptr)},
          {"generation", lease.generation},
          {"batch_seq", notice.batch_seq},
          {"bytes", notice.bytes},
          {"crc32", notice.crc32},
          {"num_samples", notice.num_samples},
          {"num_groups", notice.num_groups},
          {"num_complete_groups", notice.num_complete_groups},
          {"version_lag", notice.version_lag},
          {"step", notice.step},
          {"failed", std::move(failed)}};
}

Json score_reply(const std::vector<ScoredSequence>& results) {
  Json list = Json::array();
  for (const ScoredSequence& result : results) {
    list.push_back({{"id", id_value(result.id)},
                    {"logprobs", to_bin(std::span(result.logprobs))},
                    {"scaled_logprobs", to_bin(std::span(result.scaled_logprobs))},
                    {"entropy", to_bin(std::span(result.entropy))}});
  }
  return {{"results", std::move(list)}};
}

}  // namespace rollpack::bridge
