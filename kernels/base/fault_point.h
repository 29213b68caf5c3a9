// Points at which a process can be made to die, stop or leave something out, for tests of what the
// others make of it. Named in the environment:
//
//   ROLLPACK_FAULT=point:count:action[@rank][,..]
//
// count is the visit of the point that counts, from 1 on, or 0 for every one; action is kill, segv,
// abort, exit (status 0, without a word), stop (SIGSTOP) or skip (what the point stands before is
// not done, where it asks). Without @rank it holds for every rank but 0; replacements are numbered
// after mpirun's ranks. This enum is the list of points; while none is armed a visit costs one load
// of a word that nobody writes.
#pragma once

#include <atomic>
#include <cstdint>

namespace rollpack {

enum class FaultPoint : uint8_t {
  kWorkerConnected,  // worker_connected: rank 0 has its socket; nothing is loaded
  kWorkerLoaded,     // worker_loaded: before it says that it is ready
  kGroupsTaken,      // groups_taken: prompts are queued in its engine
  kStepBegun,        // step_begun: before the step is planned
  kLayerRun,         // layer_run: in mid-step, on the thread that computes
  kStepComputed,     // step_computed: its results are there and not applied
  kSampleCutOff,     // sample_cut_off: half of a sample's frame is in the socket
  kSampleSent,       // sample_sent: all of it
  kWeightsBegun,     // weights_begun: memory for an update is there
  kWeightsStaged,    // weights_staged: some of its tensors are packed
  kWeightsChecked,   // weights_checked: all are, and their hash is not told yet
  kWeightsSwitched,  // weights_switched: steps would use them; rank 0 does not know
  kWorkerGivenUp,    // worker_given_up: rank 0 is about to kill a lost worker; skip: it lives on
  kCount
};

// Arms what ROLLPACK_FAULT says of this rank. Call once, before other threads start.
// Errors: invalid_argument naming the entry.
void arm_faults(int rank);

namespace fault_detail {
extern std::atomic<uint32_t> armed;  // a bit a point
bool visit(FaultPoint point);
}  // namespace fault_detail

inline bool is_fault_armed(FaultPoint point) {
  return (fault_detail::armed.load(std::memory_order_relaxed) >> static_cast<int>(point) & 1) != 0;
}

// Visits a point. Returns whether to leave out what follows; of the other actions none returns.
inline bool fault_at(FaultPoint point) {
  return is_fault_armed(point) && fault_detail::visit(point);
}

}  // namespace rollpack
