// The backend of a replica that several ranks hold, at its leader: what the engine asks of it the
// leader's own backend does, and the followers do the same. Plans go out before the step begins
// here; results are the leader's. Weights that come from the trainer go to each follower by its
// share, and a set counts as committed once all have committed theirs.
//
// After a failed step, or a follower that is gone, every call fails: the replica is lost as a
// whole.
#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "kernels/forwarding_backend.h"
#include "rollout/engine/replica.h"
#include "rollout/tensor_parallel/follower_links.h"

namespace rollpack::rollout {

class LeaderBackend final : public kernels::ForwardingBackend {
 public:
  // `inner` is the leader's own; waits until every follower has built its backend.
  // Errors: whatever a follower reports; unavailable; deadline_exceeded; failed_precondition where
  // its backend would give other bits.
  LeaderBackend(std::unique_ptr<kernels::Backend> inner, std::shared_ptr<FollowerLinks> followers,
                bridge::Deadline deadline);

  ~LeaderBackend() override;

  // Every rank stages its own share of the files; the caller commits. `replica` has this backend.
  void load_checkpoints(Replica& replica);

  const kernels::BackendInfo& info() const override { return info_; }

  kernels::WeightId declare_weight(const kernels::WeightSpec& spec) override;
  void begin_staging() override;
  using Backend::load_weight;
  void load_weight(kernels::WeightId id, int32_t part, const kernels::WeightSource& source,
                   kernels::ShardRange shard) override;
  void copy_committed_to_staged() override;
  void commit_weights() override;
  void discard_weights() override;
  // Over the hashes of all ranks, in their order: replicas of as many ranks can be compared.
  uint64_t weights_hash() override;
  uint64_t staged_weights_hash() override;
  int export_staged_weights() override;
  void adopt_staged_weights(int fd) override;

  void sleep(int level) override;
  void wake_up(kernels::MemoryTags tags) override;
  // Of all ranks; of the followers as of their last answer to a commit, sleep or wake_up.
  int64_t held_bytes() const override;

  kernels::StepHandle submit(kernels::StepPlan plan) override;
  kernels::StepResult wait(kernels::StepHandle handle, kernels::Deadline deadline) override;

 private:
  void refresh_info();
  void send_share(int32_t rank, kernels::WeightId id, int32_t part,
                  const kernels::WeightSource& source);
  // Does the same on all ranks: `own` here while the followers do theirs. Their answers.
  template <class Own>
  std::vector<uint64_t> on_all(Request request, const Own& own, std::span<const uint8_t> body = {});
  void keep_held_bytes(const std::vector<uint64_t>& answers);
  template <class Hash>
  uint64_t combined(Request request, const Hash& own);

  const std::shared_ptr<FollowerLinks> followers_;
  kernels::BackendInfo info_;
  int32_t num_pages_ = 0;  // that every rank has
  int64_t followers_held_bytes_ = 0;
  std::vector<FollowerReady> ready_;  // [ranks]; none for the leader
  std::vector<bool> is_vector_;       // by weight
  bool is_loading_files_ = false;     // by every rank on its own
  std::mutex call_mutex_;             // answers come to who asked
};

}  // namespace rollpack::rollout
