#include "rollout/cluster/kept_weights.h"

#include <utility>

#include "kernels/base/error.h"
#include "trainer_bridge/shared_memory/segment.h"

namespace rollpack::rollout {
namespace {

struct OwnedChunk {
  explicit OwnedChunk(bridge::MappedSegment mapped) : segment(std::move(mapped)) {}
  bridge::OwnedFd fd;
  bridge::MappedSegment segment;
  bridge::WeightChunk chunk;
};

}  // namespace

std::shared_ptr<const bridge::WeightChunk> keep_chunk(const bridge::WeightChunk& chunk) {
  auto owned = std::make_shared<OwnedChunk>(
      bridge::MappedSegment::map(chunk.fd, static_cast<int64_t>(chunk.mapping.size()),
                                 bridge::kPeerSeals, "kept weight chunk"));
  owned->fd = bridge::OwnedFd::duplicate(chunk.fd);
  owned->chunk = {.fd = owned->fd.get(), .mapping = owned->segment.bytes()};
  for (const bridge::WeightTensor& tensor : chunk.tensors) {
    bridge::WeightTensor& kept = owned->chunk.tensors.emplace_back(tensor);
    kept.bytes = owned->chunk.mapping.subspan(
        static_cast<size_t>(tensor.bytes.data() - chunk.mapping.data()), tensor.bytes.size());
  }
  return {owned, &owned->chunk};
}

void KeptWeights::begin(int64_t version, bool is_partial) {
  discard();
  staged_ = {.version = version, .is_partial = is_partial};
}

void KeptWeights::stage(const bridge::WeightChunk& chunk) {
  try {
    staged_.chunks.push_back(keep_chunk(chunk));
  } catch (const Error&) {  // no descriptor or map left: the update itself may go on
    is_staged_whole_ = false;
  }
}

void KeptWeights::commit() {
  if (staged_packed_) packed_ = std::exchange(staged_packed_, nullptr);
  if (!staged_.is_partial) updates_.clear();
  is_complete_ = is_staged_whole_ && (is_complete_ || !staged_.is_partial) &&
                 updates_.size() <= kMaxPartialUpdates;
  if (is_complete_) {
    updates_.push_back(std::move(staged_));
  } else {
    updates_.clear();
  }
  discard();
}

void KeptWeights::forget() {
  discard();
  updates_.clear();
  packed_.reset();
  is_complete_ = false;
}

void KeptWeights::discard() {
  staged_ = {};
  staged_packed_.reset();
  is_staged_whole_ = true;
}

}  // namespace rollpack::rollout
