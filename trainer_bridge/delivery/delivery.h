// Finished groups -> batches in slots -> clients, each batch acknowledged by its release. What a
// client held when it went is delivered again, byte for byte, before anything new.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "trainer_bridge/contract/sample.h"
#include "trainer_bridge/delivery/group_queue.h"
#include "trainer_bridge/layout/batch_layout.h"
#include "trainer_bridge/shared_memory/slot_ring.h"

namespace rollpack::bridge {

// What a client is told of its batch.
struct BatchNotice {
  std::optional<SlotLease> lease;  // none: only failures, and nothing to release
  uint64_t batch_seq = 0;          // 0 without a slot
  int64_t bytes = 0;
  uint32_t crc32 = 0;
  int64_t num_samples = 0;
  int64_t num_groups = 0;
  std::vector<FailedSample> failed;
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

  // The next batch for `client`, or nothing when there is none yet or no slot is free. First what
  // another client left behind, whole, whatever num_groups; then
  //   num_groups given  once that many groups are finished: that many, or as many of them as fit a
  //                     slot, the rest staying for the next call
  //   none              as many finished groups as fit a slot, at least one
  std::optional<BatchNotice> next_batch(uint64_t client, std::optional<int64_t> num_groups);

  // Errors: as SlotRing::release(); failed_precondition also for another batch_seq.
  void release(uint64_t client, SlotLease lease, uint64_t batch_seq);
  void client_gone(uint64_t client, GoneClient memory);

  // Samples and failures that wait for a batch; a batch in a slot is no longer counted.
  int64_t num_held_samples() const { return groups_.num_held_samples(); }
  // By name, for the stats verb.
  std::vector<std::pair<std::string, double>> stats() const;

 private:
  std::optional<BatchNotice> redeliver(uint64_t client);
  void check_last_finished();
  // Of the first `limit` finished groups, how many fit one slot together; 1 or more.
  int64_t num_fitting(int64_t limit) const;
  bool fits(int64_t num_groups) const;
  void write(BatchNotice& notice, std::vector<Sample> samples, SlotLease lease);

  SlotRing& slots_;
  const BatchLayout& layout_;
  GroupQueue groups_;
  std::map<int32_t, BatchNotice> delivered_;     // by slot
  std::map<uint64_t, BatchNotice> left_behind_;  // by batch_seq
  uint64_t last_batch_seq_ = 0;
  int64_t num_delivered_ = 0;
  int64_t num_redelivered_ = 0;
  int64_t num_samples_delivered_ = 0;
};

}  // namespace rollpack::bridge
