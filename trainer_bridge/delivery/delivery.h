// Finished groups -> batches in slots -> clients, each batch acknowledged by its release. What a
// client held when it went is delivered again, byte for byte, before anything new.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "trainer_bridge/contract/delivery_log.h"
#include "trainer_bridge/contract/sample.h"
#include "trainer_bridge/delivery/dp_ranks.h"
#include "trainer_bridge/delivery/group_queue.h"
#include "trainer_bridge/delivery/restored_batches.h"
#include "trainer_bridge/layout/batch_layout.h"
#include "trainer_bridge/shared_memory/slot_ring.h"

namespace rollpack::bridge {

// What a client is told of its batch.
struct BatchNotice {
  std::optional<SlotLease> lease;  // none: only failures
  uint64_t batch_seq = 0;          // 0: nothing to release; without a slot, unless it is logged
  int64_t bytes = 0;
  uint32_t crc32 = 0;
  int64_t num_samples = 0;
  int64_t num_groups = 0;           // of the step, where one was split for data-parallel ranks
  int64_t num_complete_groups = 0;  // of these, those without a failed or aborted sample
  int64_t version_lag = 0;          // weight versions since the oldest token was drawn
  uint64_t step = 0;                // 0: not split
  std::optional<int32_t> dp_rank;   // whose share it is
  std::vector<FailedSample> failed;
};

// What a next_batch asks for.
struct BatchWish {
  std::optional<int64_t> num_groups;  // at most; none: as many as fit
  std::optional<int64_t> min_ready;   // waits for that many; none: for num_groups, or one
  GroupOrder order = GroupOrder::kCompletion;
};

struct DeliveryOptions {
  // Samples with a token drawn more versions ago than this become failures; below 0: none do.
  int64_t max_version_lag = -1;
  // Of the model: where attention costs a sequence as much as the linear layers.
  int64_t attention_parity_tokens = 0;
  std::function<int64_t()> weight_version = [] { return int64_t{0}; };
};

// What becomes of a slot's memory when the client that held it goes.
enum class GoneClient : uint8_t {
  kKeepMemory,     // nobody looks at it any more, or others have it mapped under its number
  kReplaceMemory,  // the client may live on with views: they keep the old memory, unchanged
};

// Single-threaded: the server's thread.
class Delivery {
 public:
  // Both outlive this.
  Delivery(SlotRing& slots, const BatchLayout& layout) : slots_(slots), layout_(layout) {}

  // A sample that no batch can hold becomes a failure here, with the layout's error.
  // Errors: internal, as GroupQueue::add().
  void commit(Sample sample);
  void fail(FailedSample sample);

  // Before the first commit.
  void configure(DeliveryOptions options) { options_ = std::move(options); }
  // Writes down what it does from here on, and goes on from what was written down before. Once,
  // before the first commit.
  void restore(DeliveryLog& log, RestoredDelivery restored);
  // `num_prompts` groups of a submit will come.
  void expect(int64_t request_id, int64_t num_prompts) { groups_.expect(request_id, num_prompts); }
  // Makes `client` a data-parallel rank: from here on it gets that rank's share of each step.
  // Errors: as DpRanks::join().
  void join(uint64_t client, const DpMember& member);

  // The next batch for `client`, or nothing when there is none yet or no slot is free. First what
  // pending() has; then, once as many groups are ready as are waited for, those, up to num_groups
  // and as many as fit a slot, at least one; the rest stay for the next call. For a data-parallel
  // rank they are a step, split once for all ranks, whoever of them asks.
  std::optional<BatchNotice> next_batch(uint64_t client, const BatchWish& wish);
  // What is there for `client` without new groups, whatever it asks for: a batch that another
  // client left behind (the same rank, for ranks), in this life or before a restart, whole, or its
  // rank's share of a step.
  std::optional<BatchNotice> pending(uint64_t client);

  // `lease`: none for a batch without a slot.
  // Errors: as SlotRing::release(); failed_precondition also for another batch_seq; not_found for
  // one without a slot that this client does not have.
  void release(uint64_t client, std::optional<SlotLease> lease, uint64_t batch_seq);
  void client_gone(uint64_t client, GoneClient memory);

  // Samples and failures that wait for a batch; a batch in a slot is no longer counted.
  int64_t num_held_samples() const {
    return groups_.num_held_samples() + ranks_.num_held_samples() + restored_.num_held_samples();
  }
  // By name, for the stats verb.
  std::vector<std::pair<std::string, double>> stats() const;

 private:
  bool may_have(uint64_t client, std::optional<int32_t> dp_rank) const;
  const RestoredBatches::Batch* first_restored(uint64_t client) const;
  std::optional<BatchNotice> deliver_restored(uint64_t client, const RestoredBatches::Batch& batch);
  void hold(uint64_t client, const BatchNotice& notice);
  std::optional<BatchNotice> next_share(uint64_t client);
  std::optional<BatchNotice> batch_of(uint64_t client, std::vector<Group> groups);
  void check_last_finished();
  void fail_stale(Group& group);
  // Of `groups`, how many fit one slot together, or their shares one slot each; 1 or more.
  int64_t num_fitting(const std::vector<Group*>& groups, const DpMember* member) const;
  bool fits(const std::vector<Group*>& groups, const DpMember* member) const;
  void put_step(const DpMember& member, std::vector<Group> groups);
  // Writes what the notice is about and delivers it; without samples there is nothing to write. A
  // batch_seq that it has is written down already.
  BatchNotice send(uint64_t client, BatchNotice notice, std::vector<Sample> samples,
                   std::optional<SlotLease> lease, std::span<const int32_t> row_starts);
  void count_delivered(const BatchNotice& notice, const std::vector<Sample>& samples);

  SlotRing& slots_;
  const BatchLayout& layout_;
  DeliveryOptions options_;
  GroupQueue groups_;
  DpRanks ranks_;
  RestoredBatches restored_;
  DeliveryLog* log_ = nullptr;
  std::map<int32_t, BatchNotice> delivered_;                       // by slot
  std::map<uint64_t, std::pair<uint64_t, BatchNotice>> slotless_;  // client, by batch_seq
  std::map<uint64_t, BatchNotice> left_behind_;                    // by batch_seq
  uint64_t last_batch_seq_ = 0;
  int64_t num_delivered_ = 0;
  int64_t num_redelivered_ = 0;
  int64_t num_samples_delivered_ = 0;
  int64_t num_stale_samples_ = 0;
  int64_t num_tokens_delivered_ = 0;
  int64_t num_pads_delivered_ = 0;
  int64_t num_pads_avoided_ = 0;  // of what padding to the longest of each batch would have added
  int64_t last_version_lag_ = 0;
};

}  // namespace rollpack::bridge
