// The weight update under way, if any: whose it is, which phases came in which order, and what
// becomes of it when a phase is refused or its client goes. Phases reach the service in order. It
// may hold several chunks at once, so that a replica takes all that has come between two of its
// steps; begin and commit wait until it has answered for every chunk before them.
//
//   closed --begin--> open --chunk--> open ... --commit--> closed
//     ^                 +--cancel, a refusal, its client gone--+
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/weight_inbox/manifest.h"
#include "trainer_bridge/weight_inbox/received_chunk.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::bridge {

// Chunks of an update that a client may send ahead of their replies. Each holds a descriptor and a
// mapping. At four chunks of 64 MiB a replica whose steps take 100 ms can take in 2.7 GB/s.
inline constexpr size_t kMaxPhasesAhead = 4;

// All calls on one thread, the foreground.
class WeightInbox {
 public:
  using Task = std::function<void()>;
  // Runs a task later or at once: `background` on a thread where checksums may take their time,
  // `foreground` on the calling thread of this class; both callable from any thread.
  using Runner = std::function<void(Task)>;

  WeightInbox(RolloutService& service, Runner background, Runner foreground);

  // `done` is called once, on the foreground. Errors, through `done`:
  //   invalid_argument     a version not above the current one; a base that is not the current one
  //   failed_precondition  a phase out of order, another client's update, another version
  //   would_block          more than kMaxPhasesAhead chunks of this update wait
  //   and what the manifest's memory or the service has against it, which ends the update
  void begin(uint64_t client, WeightUpdate update, OutcomeCallback done);
  void chunk(uint64_t client, int64_t version, ChunkManifest manifest, OwnedFd fd,
             OutcomeCallback done);
  // A chunk of tensors that the client lends until it is answered for.
  // Errors also: unsupported where the service takes none.
  void lent_chunk(uint64_t client, int64_t version, ChunkManifest manifest,
                  std::shared_ptr<const PeerMemory> lender, OutcomeCallback done);
  void commit(uint64_t client, int64_t version, InFlight in_flight, OutcomeCallback done);
  // Errors (thrown): failed_precondition; a commit that has begun cannot be cancelled.
  void cancel(uint64_t client, int64_t version);

  // Cancels what is the client's. A commit that has begun goes through.
  void client_gone(uint64_t client);
  bool is_open() const { return update_.has_value(); }

 private:
  enum class Kind { kBegin, kChunk, kCommit };
  struct Phase {
    Kind kind;
    std::function<void(const OutcomeCallback&)> run;
    OutcomeCallback done;
  };
  struct Update {
    uint64_t client = 0;
    int64_t version = 0;
    bool is_committing = false;
    size_t num_ahead = 0;         // chunks that wait for their reply
    std::set<std::string> names;  // of the tensors sent so far
  };

  static const char* name_of(Kind kind);
  void check_owner(const char* phase, uint64_t client, int64_t version) const;
  void enqueue(Phase phase);
  void enqueue_chunk(uint64_t client, int64_t version,
                     std::function<void(const OutcomeCallback&)> run, OutcomeCallback done);
  void run_next();
  void phase_ended(uint64_t update_serial, Kind kind, const OutcomeCallback& done, Outcome outcome);
  void stage(ChunkManifest manifest, const std::shared_ptr<OwnedFd>& fd,
             const OutcomeCallback& done);
  void stage_lent(const ChunkManifest& manifest, std::shared_ptr<const PeerMemory> lender,
                  const OutcomeCallback& done);
  void refuse_chunk(uint64_t update_serial, const ErrorInfo& error, const OutcomeCallback& done);
  void check_new_names(const ChunkManifest& manifest);
  void close(const std::string& why);

  RolloutService& service_;
  Runner background_;
  Runner foreground_;
  std::optional<Update> update_;
  uint64_t update_serial_ = 0;  // tells a late answer to a cancelled update from this one's
  std::deque<Phase> waiting_;
  // Of phases being carried out, perhaps of an update cancelled since:
  bool is_busy_ = false;    // one keeps the next from starting
  size_t num_staging_ = 0;  // chunks that have not been answered for
};

}  // namespace rollpack::bridge
