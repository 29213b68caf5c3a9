// How many KV pages sequences need: now, and by what they were promised. Pure functions of the
// engine's state, of constant time but for num_private_tokens().
#pragma once

#include <cstdint>

#include "rollout/engine/engine_state.h"

namespace rollpack::rollout {

// Whether the sequence holds pages and has rows to compute; a follower has no pages yet, and whose
// last token is being drawn no rows.
inline bool computes(const Sequence& sequence) {
  return !sequence.is_finished && !sequence.pages.empty() && sequence.num_remaining() > 0;
}

// Whether pages were promised to it for all it may compute now.
inline bool has_promise(const Sequence& sequence) {
  return sequence.promised_end >= sequence.known_end();
}

// Pages that a computing sequence lacks to write up to length `end`: missing ones, and a copy of
// the page that it may not write into.
int32_t num_pages_lacking(const Sequence& sequence, int32_t end, const EngineState& state);

// Pages that must stay available for a running sequence: what it lacks, up to what was promised to
// it. A follower wants its own part only. A leader wants one more, because with its followers it
// will share, and so have to copy, the page its prompt ends in.
int32_t num_pages_wanted(const Sequence& sequence, const EngineState& state);

// Computed tokens in pages that no other sequence holds: what preemption would take away. Linear in
// the pages counted.
int32_t num_private_tokens(const Sequence& sequence, const EngineState& state);

}  // namespace rollpack::rollout
