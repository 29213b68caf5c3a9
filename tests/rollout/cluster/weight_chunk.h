// Weights as the bridge hands them to the dispatcher, and the calls of an update, each waited for.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <optional>
#include <vector>

#include "rollout/cluster/dispatcher.h"
#include "tests/rollout/cluster/thread_ranks.h"
#include "trainer_bridge/shared_memory/segment.h"

namespace rollpack::rollout {

// Tensors in a sealed memfd, as the weight inbox hands them over.
struct Chunk {
  explicit Chunk(const std::vector<NamedTensor>& tensors) {
    const int fd = ::memfd_create("tiny weights", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int64_t bytes = 0;
    std::vector<int64_t> offsets;
    for (const NamedTensor& tensor : tensors) {
      offsets.push_back(bytes);
      EXPECT_EQ(::pwrite(fd, tensor.values.data(), tensor.bytes().size(), bytes),
                static_cast<ssize_t>(tensor.bytes().size()));
      bytes += static_cast<int64_t>(tensor.bytes().size());
    }
    ::fcntl(fd, F_ADD_SEALS, bridge::kPeerSeals);
    owner = bridge::OwnedFd(fd);
    segment.emplace(bridge::MappedSegment::map(fd, bytes, bridge::kPeerSeals, "test"));
    chunk = {.fd = fd, .mapping = segment->bytes()};
    for (size_t i = 0; i < tensors.size(); ++i) {
      chunk.tensors.push_back(
          {.name = tensors[i].name,
           .dtype = DType::kF32,
           .shape = tensors[i].shape,
           .bytes = segment->bytes().subspan(offsets[i], tensors[i].bytes().size())});
    }
  }
  bridge::OwnedFd owner;
  std::optional<bridge::MappedSegment> segment;
  bridge::WeightChunk chunk;
};

inline bridge::Outcome begin(Dispatcher& dispatcher, int64_t version,
                             std::optional<int64_t> base_version = std::nullopt) {
  Waiter waiter;
  dispatcher.begin_weights({version, base_version}, waiter.callback());
  return waiter.wait();
}

inline bridge::Outcome stage(Dispatcher& dispatcher, const Chunk& chunk) {
  Waiter waiter;
  dispatcher.stage_weights(chunk.chunk, waiter.callback());
  return waiter.wait();
}

inline bridge::Outcome commit(Dispatcher& dispatcher,
                              bridge::InFlight mode = bridge::InFlight::kKeep) {
  Waiter waiter;
  dispatcher.commit_weights(mode, waiter.callback());
  return waiter.wait();
}

}  // namespace rollpack::rollout
