// Samples that rank 0 never sees: handed to the bridge of the node that asked for them, they wait
// there until rank 0 says whether they count.
#pragma once

#include <cstdint>

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/contract/sample.h"

namespace rollpack::rollout {

enum class Verdict : uint8_t {
  kCommit = 0,
  kCommitAsAborted = 1,  // it ends by length where a batch of a life before was aborted
  kDrop = 2,             // late, of a fenced attempt, or a second one
};

// Called under the dispatcher's lock, so that verdicts keep their order: never blocks and never
// calls back.
class KeptSamples {
 public:
  virtual ~KeptSamples() = default;

  // What becomes of the sample that `worker` has left at the bridge of node key.node.
  virtual void decide(int32_t worker, const bridge::SampleKey& key, int32_t attempt,
                      Verdict verdict) = 0;
  // `worker` is lost: what it has left anywhere and was not decided about is dropped.
  virtual void forget(int32_t worker) = 0;
  // Counters and gauges, by name; part of the dispatcher's.
  virtual bridge::RolloutService::Numbers numbers() const = 0;
};

}  // namespace rollpack::rollout
