// A sequence in the engine: tokens known so far, how many of them have keys and values in pages,
// and what was said of each sampled token. Everything a policy needs to schedule it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "rollout/engine/request.h"
#include "rollout/speculation/acceptance.h"
#include "rollout/speculation/draft_index.h"

namespace rollpack::rollout {

struct Sequence;

// What the samples of one prompt have in common.
struct Group {
  GroupRequest request;
  // Prompt prefill, done once for all siblings: the leader computes, followers wait without pages.
  Sequence* leader = nullptr;
  std::vector<Sequence*> followers;
  int32_t num_told_rows = 0;          // prompt tokens that some StepWork has told of
  std::unique_ptr<DraftIndex> texts;  // what its samples have said; see batching/drafting
};

struct Sequence {
  // Exactly one of the two is set.
  std::shared_ptr<Group> group;         // a sample being generated
  std::unique_ptr<ScoreRequest> score;  // a sequence being scored

  uint64_t arrival = 0;  // order of arrival in this engine; lower is older
  int32_t sample_index = 0;
  int32_t num_prompt = 0;
  int32_t end_position = 0;     // length at which it ends: prompt + response limit
  std::vector<int32_t> tokens;  // prompt, then response so far
  int32_t num_computed = 0;  // leading tokens whose K and V are in `pages`, steps under way ended
  std::vector<int32_t> pages;
  int64_t kv_version = 0;  // weights that computed them
  int32_t num_filed = 0;   // leading whole pages that the prefix index knows
  int32_t slot = -1;
  bool slot_is_set = false;  // the backend's slot holds this sequence's stream and last token
  bool is_finished = false;
  bool is_failed = false;  // by numbers that are not finite: nobody may use its pages

  // Of steps under way, whose results are not known yet.
  int32_t num_rows_under_way = 0;  // of num_computed
  int32_t num_pending = 0;         // of `tokens`, the last ones, which stand for what is drawn
  int32_t num_uses_under_way = 0;  // that name it: until they end, its pages are its own

  // Preempted for want of pages, under the present weights: it comes back only with the promise of
  // pages up to length `promised_end`, before which it is not preempted again.
  bool was_preempted = false;
  int32_t promised_end = 0;
  int32_t num_lost = 0;        // computed tokens that its last preemption took away
  std::vector<int32_t> draft;  // tokens that may follow, to be verified by the step being planned
  Acceptance acceptance;       // of its drafts

  // Tokens whose rows, and response tokens whose draws, some StepWork has told of.
  int32_t num_told_rows = 0;
  int32_t num_told_draws = 0;

  // One entry a response token (generated or scored).
  std::vector<float> logprobs, scaled_logprobs, support_logmass, entropy;
  std::vector<bridge::VersionSpan> weight_versions;
  bridge::FinishReason finish_reason = bridge::FinishReason::kLength;
  int32_t stop_token_id = -1;

  bool is_score() const { return score != nullptr; }
  int32_t length() const { return static_cast<int32_t>(tokens.size()); }
  int32_t num_response() const { return length() - num_prompt; }
  int32_t num_known() const { return length() - num_pending; }
  int32_t num_done() const { return num_computed - num_rows_under_way; }
  // A sample with tokens drawn already: preempted when it waits.
  bool has_started() const { return !is_score() && num_response() > 0; }
  // Length to which pages are needed now: a sequence's last token predicts nothing and needs none.
  int32_t known_end() const { return std::min(length(), end_position - 1); }
  // Tokens that still need a row. None while a sample's last token is being drawn.
  int32_t num_remaining() const { return known_end() - num_computed; }
  // It ends here, whatever steps under way say of it.
  void forget_steps_under_way() {
    tokens.resize(static_cast<size_t>(num_known()));
    num_computed = num_done();
    num_pending = num_rows_under_way = 0;
  }
};

}  // namespace rollpack::rollout
