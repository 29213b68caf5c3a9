#include "kernels/reference/step_state.h"

#include <algorithm>
#include <cstring>

namespace rollpack::kernels::reference {

KvPages::KvPages(const ModelShape& shape, int32_t page_tokens, int32_t num_pages)
    : shape_(shape),
      page_tokens_(page_tokens),
      num_pages_(num_pages),
      token_bytes_(shape.G * shape.K * dtype_bytes(shape.dtype)) {
  wake_up();
}

void KvPages::wake_up() {
  memory_.resize(static_cast<size_t>((num_pages_ + 1) * page_bytes(shape_, page_tokens_)));
}

int64_t KvPages::page_bytes(const ModelShape& shape, int32_t page_tokens) {
  return shape.L * 2 * page_tokens * shape.G * shape.K * dtype_bytes(shape.dtype);
}

std::byte* KvPages::token(int32_t layer, int32_t page, int32_t which, int32_t offset) {
  const int64_t plane = (static_cast<int64_t>(layer) * (num_pages_ + 1) + page) * 2 + which;
  return memory_.data() + (plane * page_tokens_ + offset) * token_bytes_;
}

void* KvPages::keys(int32_t layer, int32_t page, int32_t offset, int64_t kv_head) {
  return token(layer, page, 0, offset) + kv_head * shape_.K * dtype_bytes(shape_.dtype);
}

void* KvPages::values(int32_t layer, int32_t page, int32_t offset, int64_t kv_head) {
  return token(layer, page, 1, offset) + kv_head * shape_.K * dtype_bytes(shape_.dtype);
}

void KvPages::copy(const PageCopy& copy) {
  for (int32_t layer = 0; layer < shape_.L; ++layer) {
    for (const int32_t which : {0, 1}) {
      std::memmove(token(layer, copy.target, which, 0), token(layer, copy.source, which, 0),
                   static_cast<size_t>(copy.num_tokens * token_bytes_));
    }
  }
}

StepState begin_step(const StepPlan& plan, std::vector<Slot>& slots, KvPages& pages) {
  for (const PageCopy& copy : plan.page_copies) pages.copy(copy);
  for (const SlotInit& init : plan.slot_inits) {
    slots[static_cast<size_t>(init.slot)] = {
        .is_set = true, .init = init, .next_position = init.next_position};
  }
  StepState step{.plan = &plan};
  for (size_t s = 0; s < plan.sequences.size(); ++s) {
    const StepSequence& sequence = plan.sequences[s];
    for (int32_t t = sequence.row_begin; t < sequence.row_begin + sequence.num_rows; ++t) {
      int32_t token = plan.input_ids[static_cast<size_t>(t)];
      if (token == kPendingToken) token = slots[static_cast<size_t>(sequence.slot)].token;
      step.rows.push_back({token, plan.positions[static_cast<size_t>(t)], static_cast<int32_t>(s)});
    }
  }
  for (const SampleRow& sample : plan.samples) step.head_rows.push_back(sample.row);
  for (const ScoreRow& score : plan.scores) step.head_rows.push_back(score.row);
  std::sort(step.head_rows.begin(), step.head_rows.end());
  step.head_rows.erase(std::unique(step.head_rows.begin(), step.head_rows.end()),
                       step.head_rows.end());
  step.row_failed.assign(static_cast<size_t>(plan.num_rows()), 0);
  return step;
}

}  // namespace rollpack::kernels::reference
