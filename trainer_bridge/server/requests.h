// Requests as maps -> what the service and the delivery take. Types and ranges of the protocol are
// checked here; what a value means to the model is the service's business.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/delivery/delivery.h"
#include "trainer_bridge/shared_memory/slot_ring.h"
#include "trainer_bridge/wire/fields.h"

namespace rollpack::bridge {

inline constexpr int64_t kProtocolVersion = 1;

// Errors, all: invalid_argument naming the field, e.g. prompts[3].sampling.top_p.
std::vector<PromptRequest> read_prompts(Fields& fields);
std::vector<ScoreSequence> read_sequences(Fields& fields);
InFlight read_in_flight(Fields& fields);
// Absent: all.
MemoryTags read_tags(Fields& fields);

// Bytes that a client has somewhere in its memory, to be looked for there.
struct MemoryProbe {
  uint64_t address = 0;
  std::vector<int32_t> value;
};

struct HelloRequest {
  int64_t protocol_version = 0;
  std::optional<DpMember> member;  // of a data-parallel trainer
  std::optional<MemoryProbe> probe;
};
HelloRequest read_hello(Fields& fields);

struct NextBatchRequest {
  BatchWish wish;
  int64_t timeout_ms = 0;
};
NextBatchRequest read_next_batch(Fields& fields);

struct ReleaseRequest {
  std::optional<SlotLease> lease;  // none: of a batch without a slot
  uint64_t batch_seq = 0;
};
ReleaseRequest read_release(Fields& fields);

// How far a trainer's probabilities are from those its tokens were drawn with; the client's
// rollout_probs_diff().
struct ProbsDiff {
  double mean = 0, max = 0, std = 0;  // of |p_rollout - p_trainer|
  double k3_kl = 0;                   // nats
};
ProbsDiff read_probs_diff(Fields& fields);

}  // namespace rollpack::bridge
