#include "rollout/engine/step_work.h"

#include <algorithm>

namespace rollpack::rollout {
namespace {

void add_span(const StepBatch::Entry& entry, StepWork& work) {
  Sequence& sequence = *entry.sequence;
  const int32_t end = sequence.num_done();
  int32_t begin = std::max(sequence.num_told_rows, end - entry.num_tokens);
  if (Group* group = sequence.group.get()) {
    const int32_t end_of_prompt = std::min(end, sequence.num_prompt);
    if (begin < end_of_prompt) begin = std::clamp(group->num_told_rows, begin, end_of_prompt);
    group->num_told_rows = std::max(group->num_told_rows, end_of_prompt);
  }
  sequence.num_told_rows = std::max(sequence.num_told_rows, end);
  if (begin < end) work.spans.push_back({.begin = begin, .end = end, .pages = sequence.pages});
}

}  // namespace

void describe_step(const StepBatch& batch, StepWork& work) {
  work.spans.clear();
  work.draws.clear();
  work.num_scored = 0;
  for (const StepBatch::Entry& entry : batch.entries) {
    if (entry.sequence == nullptr) continue;
    work.num_scored += entry.num_scores;
    add_span(entry, work);
  }
  for (Sequence* sequence : batch.sampled) {
    if (sequence == nullptr) continue;
    const int32_t num_known = sequence->num_known() - sequence->num_prompt;
    const int32_t num_tokens = num_known - sequence->num_told_draws;
    if (num_tokens == 0) continue;  // it failed, or is listed once more
    sequence->num_told_draws = num_known;
    work.draws.push_back(
        {.arrival = sequence->arrival, .num_tokens = num_tokens, .is_last = sequence->is_finished});
  }
}

}  // namespace rollpack::rollout
