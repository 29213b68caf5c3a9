// Prompt pages that running sequences are about to compute. Whoever needs the same page next waits
// for it instead of computing it a second time: so prompts that begin alike and arrive together
// share their beginning as well as those that come later.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>

#include "rollout/engine/engine_state.h"

namespace rollpack::rollout {

class PagesUnderWay {
 public:
  // The pages that sequences of `state` compute next.
  explicit PagesUnderWay(const EngineState& state);

  // Adds the next page of a sequence that was just admitted.
  void add(const Sequence& sequence);
  // Whether one of them is the page of `sequence` that follows the filed pages `before`, no later
  // than position `end`.
  bool contains(const Sequence& sequence, std::span<const int32_t> before, int32_t end) const;

 private:
  struct Page {
    int32_t parent;  // the filed page before it; -1: none
    std::span<const int32_t> tokens;
  };
  static uint64_t hash(const Page& page);

  int32_t page_tokens_;
  // By hash; of two with one hash the first stays, the other is computed for itself alone.
  std::unordered_map<uint64_t, Page> pages_;
};

}  // namespace rollpack::rollout
