// A deterministic cluster: the real dispatcher and ledger over workers, links and a clock that are
// made up. One thread, one seed; every fault that can befall ranks may befall these, and what must
// hold is checked as things happen. A seed that fails prints itself and fails again.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace rollpack::rollout::simulation {

// What went wrong by itself, for the proof that it did.
enum class Fault {
  kDeath,          // a process is gone; what was on the wire may still arrive
  kDeathInUpdate,  // between begin and the end of a weight update
  kStop,           // stands still beyond its lease
  kShortStop,      // stands still, but not so long
  kZombie,         // given up, cannot be killed, and goes on
  kEngineFailure,  // says that it can do no more
  kLostTail,       // a link breaks, and what was on it is lost
  kDuplicate,      // a sample arrives twice
  kReorder,        // a sample arrives before what was sent before it
  kSlowLink,
  kPoison,        // a prompt kills the worker that works on it
  kStaging,       // a worker refuses a weight chunk
  kSwitch,        // a worker cannot switch to the new weights
  kStoppedRank0,  // rank 0 stands still for longer than all leases
  kAbort,         // a client aborts what runs
  kPause,         // or pauses
  kSleep,         // or has all ranks give their memory back
  kCancelledUpdate,
  kLateResult,  // a result of a fenced attempt was dropped
  kConviction,  // a prompt was convicted
  kNoWorkerLeft,
  kReplacement,   // one was started
  kFailedStart,   // or could not be
  kWrongWeights,  // a worker switches to other weights than it was told to
  // With bridges on other nodes.
  kStraight,    // a sample went straight to another node's
  kWithdrawal,  // got no receipt, and went through rank 0
  kLostBridge,  // one is gone, with what its trainers had asked for
  // With a journal.
  kRank0Death,      // the whole job is gone, and started again
  kTornJournal,     // while it wrote
  kClientDeath,     // a trainer is gone, and comes again from its checkpoint
  kRedelivery,      // a batch came again, and was not consumed before
  kPassedOver,      // or was
  kAwaitedWeights,  // what was restored had to wait for its weights
  kLostSubmit,      // rank 0 died before a submit was on disk
  kCount
};
inline constexpr auto kNumFaults = static_cast<size_t>(Fault::kCount);
extern const std::array<const char*, kNumFaults> kFaultNames;

struct Report {
  std::array<int64_t, kNumFaults> num_faults = {};
  int64_t num_samples = 0;  // accepted, and ended in exactly one sample or one error
  int64_t num_updates = 0;  // committed
  std::string violation;    // what did not hold; empty: all did

  void add(const Report& other);
};

Report simulate(uint64_t seed);

}  // namespace rollpack::rollout::simulation
