// A weight's elements, looked at on their way to the backend: what is not finite is refused by name
// instead of becoming samples that fail later, or logprobs that are no numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/weight_source.h"

namespace rollpack::rollout {

// `source`, which must outlive it, under the name that errors give it. Each row is looked at when
// it is read, by the thread that packs it next: its bytes are in that core's cache then. Errors:
// invalid_argument naming tensor, element and value, from read_rows(), where an element is NaN,
// infinite, or would be once it is rounded to bfloat16.
class FiniteSource final : public kernels::WeightSource {
 public:
  FiniteSource(std::string name, const kernels::WeightSource& source)
      : WeightSource(source.dtype, source.rows, source.cols),
        name_(std::move(name)),
        source_(source) {}

  const std::byte* read_rows(int64_t begin, int64_t end,
                             std::vector<std::byte>& scratch) const override;

 private:
  [[noreturn]] void fail(const std::byte* elements, int64_t count, int64_t first_row) const;

  const std::string name_;
  const kernels::WeightSource& source_;
};

}  // namespace rollpack::rollout
