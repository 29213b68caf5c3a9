// What a worker that joins later needs to have the current weights: where ranks share, the packed
// set; otherwise the updates that led to them, each as its sender wrote it. Costs the memory of
// one copy of the weights, which is then the sender's memfd living on. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {

// A chunk that owns its descriptor and its mapping.
// Errors: those of MappedSegment::map.
std::shared_ptr<const bridge::WeightChunk> keep_chunk(const bridge::WeightChunk& chunk);

class KeptWeights {
 public:
  // Updates of some tensors that are kept over a full one, or over the checkpoint: beyond it nobody
  // can join until a full update comes.
  static constexpr size_t kMaxPartialUpdates = 4;

  struct Update {
    int64_t version = 0;
    bool is_partial = false;
    std::vector<std::shared_ptr<const bridge::WeightChunk>> chunks;
  };

  // An update under way, and what becomes of it.
  void begin(int64_t version, bool is_partial);
  void stage(const bridge::WeightChunk& chunk);
  void set_packed(std::shared_ptr<const bridge::OwnedFd> fd) { staged_packed_ = std::move(fd); }
  void commit();
  void discard();
  // Lets all memory go: nobody can join until a full update has come.
  void forget();

  // Whether what is kept leads to the current weights, so that who joins can be given them.
  bool is_complete() const { return is_complete_; }
  // From the checkpoint, in order. Empty: the checkpoint is current.
  const std::vector<Update>& updates() const { return updates_; }
  const std::shared_ptr<const bridge::OwnedFd>& packed() const { return packed_; }

 private:
  Update staged_;
  bool is_staged_whole_ = true;  // false: a chunk could not be kept
  std::shared_ptr<const bridge::OwnedFd> staged_packed_, packed_;
  std::vector<Update> updates_;
  bool is_complete_ = true;
};

}  // namespace rollpack::rollout
