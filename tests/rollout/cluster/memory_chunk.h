// A chunk of weights as a trainer would send it.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/shared_memory/segment.h"

namespace rollpack::rollout {

struct KeptChunk {
  bridge::OpenSegment segment;
  bridge::WeightChunk chunk;
  std::optional<bridge::MappedSegment> map;
};

// A sealed memfd of `num_bytes`, all of it one tensor.
inline std::shared_ptr<const bridge::WeightChunk> make_chunk(size_t num_bytes) {
  auto kept = std::make_shared<KeptChunk>(KeptChunk{
      bridge::OpenSegment::create("test-chunk", static_cast<int64_t>(num_bytes)), {}, {}});
  std::vector<uint8_t> bytes(num_bytes);
  for (size_t i = 0; i < num_bytes; ++i) bytes[i] = static_cast<uint8_t>(i * 7 + i / 251);
  kept->segment.write(0, std::as_bytes(std::span(bytes)));
  kept->segment.seal();
  kept->map = bridge::MappedSegment::map(kept->segment.fd(), static_cast<int64_t>(num_bytes),
                                         bridge::kPeerSeals, "test");
  kept->chunk = {.fd = kept->segment.fd(), .mapping = kept->map->bytes(), .tensors = {}};
  kept->chunk.tensors.push_back({.name = "w",
                                 .dtype = DType::kBF16,
                                 .shape = {static_cast<int64_t>(num_bytes / 2)},
                                 .bytes = kept->chunk.mapping});
  return {kept, &kept->chunk};
}

}  // namespace rollpack::rollout
