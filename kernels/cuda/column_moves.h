// Columns of several ranks on their way between rows and the padded parts of an all_gather, in
// which every rank gives equally many bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rollpack::kernels::cuda {

inline constexpr int32_t kMaxGatherRanks = 32;

// Row r of part p: bytes starts[p] to starts[p + 1] of row r of the target, from the front of row r
// of the part.
struct MoveColumnsInputs {
  int64_t num_rows = 0;
  int32_t num_parts = 0;
  int64_t starts[kMaxGatherRanks + 1] = {};  // not descending
  const std::byte* source = nullptr;         // [num_parts], source_part bytes apart
  int64_t source_part = 0;
  int64_t source_stride = 0;  // bytes from row to row
  std::byte* target = nullptr;
  int64_t target_stride = 0;
};

}  // namespace rollpack::kernels::cuda
