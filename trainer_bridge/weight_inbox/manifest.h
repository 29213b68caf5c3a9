// What a client says its chunk of weights holds, read and checked against itself: types, ranges,
// sizes, names. No byte of the memory it describes is touched here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/dtype.h"
#include "trainer_bridge/wire/fields.h"

namespace rollpack::bridge {

inline constexpr int64_t kMaxTensorRank = 8;

struct TensorEntry {
  std::string name;  // canonical, see canonical_name()
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  int64_t offset = 0;  // from the start of the memfd, a multiple of the element's bytes
  int64_t bytes = 0;   // product of shape times the element's bytes
  uint32_t crc32 = 0;  // zlib's, of these bytes
  uint64_t address = 0;  // of a lent tensor, in place of offset and crc32
};

struct ChunkManifest {
  int64_t bytes = 0;  // of the memfd that count; tensors lie inside, apart from one another
  std::vector<TensorEntry> tensors;
};

// Reads `bytes` and `tensors`. Gaps between tensors are allowed, overlaps are not.
// Errors: invalid_argument naming tensors[i] and the field; unsupported for adapter keys.
ChunkManifest read_manifest(Fields& fields);

// Reads `tensors` that lie in the sender's own memory, where they may overlap: `bytes` stays 0.
// Errors: as read_manifest().
ChunkManifest read_lent_manifest(Fields& fields);

// `name` without the prefixes `module.` (DistributedDataParallel) and `_orig_mod.` (torch.compile),
// however often they were put on.
std::string canonical_name(std::string_view name);

}  // namespace rollpack::bridge
