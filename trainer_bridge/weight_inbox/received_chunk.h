// One memfd of weights, mapped and checked: what its views show can no longer change.
#pragma once

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/shared_memory/segment.h"
#include "trainer_bridge/weight_inbox/manifest.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::bridge {

class ReceivedChunk {
 public:
  // Maps `fd` and compares every tensor's checksum: a pass over all bytes, a quarter of a second a
  // GB and more, so not for a thread that others wait on.
  // Errors: those of MappedSegment::map() for kPeerSeals; data_loss naming the tensor whose bytes
  // are not those that were sent.
  ReceivedChunk(ChunkManifest manifest, OwnedFd fd);

  // Valid as long as this object.
  WeightChunk view() const;

 private:
  OwnedFd fd_;
  MappedSegment segment_;
  ChunkManifest manifest_;
};

}  // namespace rollpack::bridge
