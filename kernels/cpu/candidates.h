// The largest logits of each row, collected while the logits are computed: what top-k needs of a
// row that is never kept. Each thread collects for itself; a limit that all share only rises and is
// at no time above the value of the last token wanted, so what is dropped cannot be among them, and
// the set that is left does not depend on threads or on the order of panels.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/selection.h"

namespace rollpack::kernels::cpu {

class CandidateLists {
 public:
  CandidateLists(const KernelTable& kernels, int num_threads);

  // Starts a step. counts[d]: how many of the largest values of distribution d are wanted, by
  // (x descending, id ascending); 0: none.
  void begin(std::span<const int32_t> counts);

  // Whether a panel of this largest value may hold a candidate. False where it is NaN.
  bool may_hold(int32_t distribution, float panel_max) const;
  // Adds the candidates of a panel, whose first token is first_id; x = logit x scale.
  void add(int thread, int32_t distribution, const float* logits, int columns, float scale,
           int32_t first_id);
  // All of a distribution's candidates, in no particular order: the wanted ones and some more.
  void collect(int32_t distribution, std::vector<float>& x, std::vector<int32_t>& ids) const;

 private:
  // One thread's lists, one after the other.
  struct Lists {
    std::vector<float> x;
    std::vector<int32_t> ids;
    std::vector<int32_t> sizes;  // [distributions]
    CutFinder finder;
  };

  void cut_back(Lists& lists, int32_t distribution);
  // A list is cut back to `count` when full: at twice that, a row costs a few cuts a thread.
  static int32_t capacity(int32_t count) { return count == 0 ? 0 : 2 * count + kPanelColumns; }

  const KernelTable& kernels_;
  std::vector<Lists> threads_;
  std::vector<int32_t> counts_;
  std::vector<size_t> begins_;  // [distributions + 1] where a list starts
  std::vector<float> limits_;   // [distributions], through atomic_ref
};

}  // namespace rollpack::kernels::cpu
