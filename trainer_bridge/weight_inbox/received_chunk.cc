#include "trainer_bridge/weight_inbox/received_chunk.h"

#include <fmt/format.h>

#include <utility>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

std::span<const std::byte> bytes_of(const TensorEntry& tensor, std::span<const std::byte> memory) {
  return memory.subspan(static_cast<size_t>(tensor.offset), static_cast<size_t>(tensor.bytes));
}

}  // namespace

ReceivedChunk::ReceivedChunk(ChunkManifest manifest, OwnedFd fd)
    : fd_(std::move(fd)),
      segment_(MappedSegment::map(fd_.get(), manifest.bytes, kPeerSeals, "update_weights chunk")),
      manifest_(std::move(manifest)) {
  for (const TensorEntry& tensor : manifest_.tensors) {
    const uint32_t crc32 = crc32_of(bytes_of(tensor, segment_.bytes()));
    if (crc32 == tensor.crc32) continue;
    throw Error({.code = ErrorCode::kDataLoss,
                 .field = tensor.name,
                 .value = fmt::format("crc32 {:08x}", crc32),
                 .origin = "update_weights chunk",
                 .allowed = fmt::format("crc32 {:08x}, as the manifest says", tensor.crc32),
                 .message = "the bytes that arrived are not those that were sent"});
  }
}

WeightChunk ReceivedChunk::view() const {
  WeightChunk chunk{.fd = fd_.get(), .mapping = segment_.bytes()};
  for (const TensorEntry& tensor : manifest_.tensors) {
    chunk.tensors.push_back(
        {tensor.name, tensor.dtype, tensor.shape, bytes_of(tensor, segment_.bytes())});
  }
  return chunk;
}

}  // namespace rollpack::bridge
