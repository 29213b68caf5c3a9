// Weights that are made rather than read, for benchmarks of models that no file is at hand for:
// their texts are noise, their cost is that of real ones.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "kernels/weight_source.h"

namespace rollpack::rollout {

// A bf16 tensor of `rows` x `cols` by its name alone, so that every rank and backend makes the
// same: 1 where it is of a norm, else uniform in +-0.035 (a standard deviation of 0.02, as models
// are initialised), element e from word e % 4 of Philox with counter e / 4 and the name's hash as
// key.
class DummySource final : public kernels::WeightSource {
 public:
  DummySource(std::string_view name, int64_t rows, int64_t cols);

  const std::byte* read_rows(int64_t begin, int64_t end,
                             std::vector<std::byte>& scratch) const override;

 private:
  uint64_t key_ = 0;
  bool is_norm_ = false;
};

}  // namespace rollpack::rollout
