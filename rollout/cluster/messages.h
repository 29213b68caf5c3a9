// What rank 0 and its workers say to each other. The same structs travel by function call (the
// worker beside the dispatcher, ranks as threads in tests) and by socket (message_codec).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "rollout/engine/request.h"
#include "rollout/measurement/measurement.h"
#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {

// ---- to a worker; a ticket is answered by one Ack
// -------------------------------------------------

struct AddGroups {
  std::vector<GroupRequest> groups;
};
struct AddScores {
  std::vector<ScoreRequest> requests;
};
struct AbortSamples {
  std::optional<int64_t> request_id;  // nullopt: all
};
struct Pause {
  uint64_t ticket = 0;
  bridge::InFlight in_flight = bridge::InFlight::kKeep;
};
struct Resume {};
struct Sleep {  // the Ack says what is still held
  uint64_t ticket = 0;
  int level = 1;  // 1 or 2
  bridge::InFlight in_flight = bridge::InFlight::kKeep;
};
struct WakeUp {  // likewise
  uint64_t ticket = 0;
  bridge::MemoryTags tags;
};
struct BeginWeights {
  uint64_t ticket = 0;
  bool is_partial = false;  // what is not staged stays as it is
};
struct StageWeights {
  uint64_t ticket = 0;
  std::shared_ptr<const bridge::WeightChunk> chunk;
};
struct FinishWeights {  // everything was staged: is it complete?
  uint64_t ticket = 0;
  bool exports = false;  // the Ack carries the packed set's descriptor, for others of the node
};
struct AdoptWeights {  // a packed set that a rank of the same node has exported
  uint64_t ticket = 0;
  std::shared_ptr<const bridge::OwnedFd> fd;
};
struct CommitWeights {
  uint64_t ticket = 0;
  int64_t version = 0;
  bridge::InFlight in_flight = bridge::InFlight::kKeep;
};
struct DiscardWeights {};
// Schedule by `batching` from now on ("": as before) and measure every step.
struct Measure {
  uint64_t ticket = 0;
  std::string batching;
};
// Answered by Measured: what was measured since the command before.
struct TakeMeasurement {
  uint64_t ticket = 0;
};
struct Stop {
  bool hand_back = true;  // open samples come back as partial samples first
};
struct Ping {  // is it there?
  uint64_t ticket = 0;
};

using Command = std::variant<AddGroups, AddScores, AbortSamples, Pause, Resume, Sleep, WakeUp,
                             BeginWeights, StageWeights, FinishWeights, AdoptWeights,
                             CommitWeights, DiscardWeights, Measure, TakeMeasurement, Stop, Ping>;

// Time in which an update kept a worker from its steps, while it had some to do.
struct UpdateTimes {
  double packing_ms = 0;  // tensors rounded and laid out for the kernels
  double pause_ms = 0;    // all else until steps go on: mapping, switching, giving memory back
};

// ---- from a worker
// --------------------------------------------------------------------------------

struct WorkerReady {
  int64_t pid = 0;
  std::string fingerprint;               // all ranks must have the same
  std::optional<uint64_t> weights_hash;  // of the checkpoint, where it has loaded that
};
struct Pull {  // room for this many more samples
  int32_t num_samples = 0;
};
struct SampleDone {
  bridge::Sample sample;
  int32_t attempt = 0;  // of its group, as the request said
};
// A sample that is at the bridge of the node that asked for it, where it was made or was sent to:
// it waits there for word whether it counts (kept_samples.h).
struct SampleKept {
  bridge::SampleKey key;
  int32_t attempt = 0;
  bridge::FinishReason finish_reason = bridge::FinishReason::kLength;
};
// A sample that was sent to such a bridge, which has not said that it has it, and came to rank 0
// instead: what the bridge may have of it is dropped.
struct SampleWithdrawn {
  bridge::SampleKey key;
  int32_t attempt = 0;
};
struct SampleFailed {
  bridge::FailedSample sample;
  int32_t attempt = 0;
};
struct Scored {
  uint64_t ticket = 0;
  bridge::Outcome error;
  bridge::ScoredSequence sequence;
};
struct Ack {
  uint64_t ticket = 0;
  bridge::Outcome error;
  // Of FinishWeights and AdoptWeights: of the packed set that is staged; of CommitWeights: of the
  // one that steps use from now on.
  std::optional<uint64_t> weights_hash;
  UpdateTimes times;                  // of CommitWeights
  std::optional<int64_t> held_bytes;  // of Sleep and WakeUp
  int fd = -1;  // of FinishWeights that exports, in the worker's process; it stays the worker's
};
struct StepProgress {};  // layers of a step that takes long have been computed since the last event
struct WorkerStats {
  std::vector<std::pair<std::string, double>> values;
};
struct Measured {
  uint64_t ticket = 0;
  Measurement measurement;
};
struct WorkerStopped {};
struct WorkerFailed {  // the worker can do no more work
  ErrorInfo error;
};

using Event =
    std::variant<WorkerReady, Pull, SampleDone, SampleKept, SampleWithdrawn, SampleFailed, Scored,
                 Ack, StepProgress, WorkerStats, Measured, WorkerStopped, WorkerFailed>;

// Where commands for one worker go: a mailbox beside us or a socket. Never blocks.
class WorkerLink {
 public:
  virtual ~WorkerLink() = default;
  virtual void send(Command command) = 0;
  // Whether the worker is a process of its own, which can be lost alone and killed.
  virtual bool is_own_process() const { return false; }
  // Where it runs; 0 is rank 0's node, where a replacement can be started in its place.
  virtual int node() const { return 0; }
  // Which of its node's ranks it is, or takes the place of.
  virtual int rank_on_node() const { return 0; }
  // Ends that process, also a stopped one. Called once, when nothing it says counts any more.
  virtual void kill() {}
};

}  // namespace rollpack::rollout
