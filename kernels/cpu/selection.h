// Where a descending order of tokens is cut, found without sorting: the weight of all values from
// some limit on is a vector sum, so a bisection over limits leaves a few tokens to be sorted.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "kernels/cpu/kernel_table.h"

namespace rollpack::kernels::cpu {

// The last token kept, in the order of (x descending, id ascending). Keeps all by default.
struct Cut {
  float x = -std::numeric_limits<float>::infinity();
  int32_t id = std::numeric_limits<int32_t>::max();

  bool keeps(float value, int32_t token) const { return value > x || (value == x && token <= id); }
};

// Tokens to cut. weights: of each token, f32 and not negative; empty: 1 each.
struct Candidates {
  std::span<const float> x;
  std::span<const int32_t> ids;
  std::span<const float> weights;
  float top = std::numeric_limits<float>::infinity();  // no x is larger
};

// The weight of values >= low reaches a target, that of values >= high does not: `above`.
struct Bracket {
  float low = -std::numeric_limits<float>::infinity();
  float high = std::numeric_limits<float>::infinity();
  double above = 0;
  int64_t num_from_low = 0;
  bool is_reached = false;  // false: all values together do not reach the target
};

// Halves the floats between low and high until at most max_between values are left there, or one
// float. x has no NaN. Empty weights: 1 each. top: no x is larger; infinity where that is not
// known.
Bracket bisect(const KernelTable& kernels, std::span<const float> x, std::span<const float> weights,
               double target, int64_t max_between, float top);

// Moves the entries of x and ids that the cut keeps to the front, in their order; how many they
// are.
int64_t keep_first(const KernelTable& kernels, std::span<float> x, std::span<int32_t> ids,
                   const Cut& cut);

// Memory of a search, kept from one to the next.
class CutFinder {
 public:
  // The first token in descending order at which the running weight, which starts at `above`,
  // reaches `target`; is_reached says whether there is one. Order of sums: share_from() of the
  // values from some limit on, then single tokens in descending order, in f64.
  Cut find(const KernelTable& kernels, const Candidates& all, double above, double target,
           bool& is_reached);

 private:
  struct Entry {
    uint64_t key = 0;  // ascending keys are descending x, ties ascending ids
    float weight = 0;
  };
  std::vector<Entry> between_;
};

}  // namespace rollpack::kernels::cpu
