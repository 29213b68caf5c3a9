// What the service and the delivery say -> replies as maps, fields as in trainer_bridge/README.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/delivery/delivery.h"
#include "trainer_bridge/shared_memory/slot_ring.h"
#include "trainer_bridge/wire/message.h"

namespace rollpack::bridge {

// `instance`: of this server's life.
Json hello_reply(const RolloutService& service, const SlotRing& slots, const std::string& instance);
// The slots that were filled at least once, and who has them; their descriptors go with it.
Json inspect_reply(const SlotRing& slots);
// Their numbers, in the reply's order.
std::vector<int32_t> filled_slots(const SlotRing& slots);
Json sleep_reply(const SleepState& state);
Json weights_reply(const WeightsInUse& weights);
Json batch_reply(const BatchNotice& notice);
Json score_reply(const std::vector<ScoredSequence>& results);
// Text or integer, as it was given.
Json id_value(const PromptId& id);

}  // namespace rollpack::bridge
