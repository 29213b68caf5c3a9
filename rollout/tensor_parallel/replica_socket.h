// How the ranks of a replica find each other: the leader listens at a Unix socket of abstract name,
// which leaves no file, and serves this user's processes only. What they say then: frames whose
// first byte is a Request, or a Reply.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "trainer_bridge/wire/deadline.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {

// From the leader. All but kPlan are answered, in order but for kStagedHash: with a hash where one
// is asked for, else with the bytes that the rank holds.
enum class Request : uint8_t {
  kPlan,            // submit this step
  kLoadCheckpoint,  // stage this rank's share of model.path
  kBeginStaging,
  kCopyCommitted,
  kTensorBytes,  // some of the next kLoad's, after a byte that is 1 for the first; not answered
  kLoad,         // stage rows of a part
  kCommit,
  kDiscard,
  kCommittedHash,
  kStagedHash,
  kSleep,   // a byte: the level
  kWakeUp,  // a byte: MemoryTags
};

constexpr uint8_t byte_of(kernels::MemoryTags tags) {
  return static_cast<uint8_t>((tags.weights ? 1 : 0) | (tags.kv_cache ? 2 : 0));
}
constexpr kernels::MemoryTags tags_of(uint8_t byte) {
  return {.weights = (byte & 1) != 0, .kv_cache = (byte & 2) != 0};
}

// From a follower: an answer, or that it can do no more.
enum class Reply : uint8_t { kDone, kRefused, kFailed };

// Of kLoad: a tensor [rows, cols], of which the bytes of rows `sent` have come and rows `shard` of
// the part are held.
struct TensorOrder {
  kernels::WeightId weight = kernels::kNoWeight;
  int32_t part = 0;
  DType dtype = DType::kF32;
  int64_t rows = 0, cols = 0;
  kernels::ShardRange sent, shard;
};

struct ReplicaName {
  std::string job;  // a random text that the ranks of a job have in common
  int replica = 0;
};

// The leader's: waits for all others. [size]; the leader's own entry is empty.
// Errors: deadline_exceeded naming who has not come; unavailable.
std::vector<bridge::OwnedFd> accept_followers(const ReplicaName& name, int32_t size,
                                              bridge::Deadline deadline);

// A follower's. Errors: deadline_exceeded, unavailable.
bridge::OwnedFd connect_to_leader(const ReplicaName& name, kernels::ReplicaRank at,
                                  bridge::Deadline deadline);

// The memory that collectives go through, made by the leader and passed to the others.
struct ReplicaMemory {
  bridge::OwnedFd fd;
  std::shared_ptr<std::byte> bytes;
};
// Errors: resource_exhausted.
ReplicaMemory make_replica_memory(int32_t size);
// Errors: data_loss for memory of another size; resource_exhausted.
std::shared_ptr<std::byte> map_replica_memory(int fd, int32_t size);

}  // namespace rollpack::rollout
