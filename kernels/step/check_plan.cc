#include "kernels/step/check_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/error.h"

namespace rollpack::kernels {
namespace {

using StatusOf = std::function<SlotStatus(int32_t slot)>;

constexpr float kMinTemperature = 1e-5f;  // below, 1 / temperature amplifies rounding beyond use

bool is_in(int64_t value, int64_t end) {
  return value >= 0 && value < end;
}

bool is_temperature(float value) {
  return value == 0.0f || (std::isfinite(value) && value >= kMinTemperature);
}

// Plans are checked in every step: texts are made only where something is wrong.
template <class Value>
[[noreturn]] void fail(std::string_view list, size_t index, std::string_view field, Value value,
                       std::string allowed) {
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = fmt::format("step.{}[{}].{}", list, index, field),
               .value = fmt::to_string(value),
               .allowed = std::move(allowed)});
}

template <class Value>
void require(bool holds, std::string_view list, size_t index, std::string_view field, Value value,
             const char* allowed) {
  if (!holds) fail(list, index, field, value, allowed);
}

void require_below(int64_t value, int64_t end, std::string_view list, size_t index,
                   std::string_view field) {
  if (!is_in(value, end)) {
    fail(list, index, field, value, fmt::format("a number from 0 to {}", end - 1));
  }
}

void check_slot_init(const SlotInit& init, size_t i, const PlanLimits& limits) {
  const SamplingParams& sampling = init.sampling;
  require_below(init.slot, limits.num_slots, "slot_inits", i, "slot");
  require(is_temperature(sampling.temperature), "slot_inits", i, "temperature",
          sampling.temperature, "0 (greedy) or a number from 1e-5");
  require(sampling.top_p > 0 && sampling.top_p <= 1, "slot_inits", i, "top_p", sampling.top_p,
          "a number above 0, at most 1");
  require(sampling.min_p >= 0 && sampling.min_p <= 1, "slot_inits", i, "min_p", sampling.min_p,
          "a number from 0 to 1");
  for (const int32_t id : init.stop_token_ids) {
    require_below(id, limits.V, "slot_inits", i, "stop_token_ids");
  }
  require(std::ranges::is_sorted(init.stop_token_ids), "slot_inits", i, "stop_token_ids",
          init.stop_token_ids.size(), "ascending ids");
}

// What a slot holds for the step's rows and draws.
enum class SlotState : uint8_t {
  kEmpty,
  kFilled,   // nothing sampled yet
  kSampled,  // a token that a row may stand for
  kDrawn,    // by this step
};

// [num_slots], by the plan's slot_inits where those fill a slot anew.
std::vector<SlotState> slot_states(const StepPlan& plan, const PlanLimits& limits,
                                   const StatusOf& status_of) {
  std::vector<SlotState> states(static_cast<size_t>(limits.num_slots), SlotState::kEmpty);
  for (int32_t slot = 0; slot < limits.num_slots; ++slot) {
    const SlotStatus status = status_of(slot);
    if (!status.is_set) continue;
    states[static_cast<size_t>(slot)] =
        status.has_pending ? SlotState::kSampled : SlotState::kFilled;
  }
  for (const SlotInit& init : plan.slot_inits) {
    states[static_cast<size_t>(init.slot)] = SlotState::kFilled;
  }
  return states;
}

SlotState state_of(int32_t slot, const std::vector<SlotState>& states) {
  return is_in(slot, static_cast<int64_t>(states.size())) ? states[static_cast<size_t>(slot)]
                                                          : SlotState::kEmpty;
}

void check_rows(const StepPlan& plan, size_t s, const PlanLimits& limits,
                const std::vector<SlotState>& states) {
  const StepSequence& sequence = plan.sequences[s];
  const bool may_be_pending = state_of(sequence.slot, states) == SlotState::kSampled;
  const int64_t end_position = int64_t{sequence.num_pages} * limits.page_tokens;
  int32_t last = kPadPosition;
  for (int32_t row = sequence.row_begin; row < sequence.row_begin + sequence.num_rows; ++row) {
    const auto index = static_cast<size_t>(row);
    const int32_t id = plan.input_ids[index];
    if (!(id == kPendingToken ? may_be_pending : is_in(id, limits.V))) {
      fail("rows", index, "input_id", id,
           fmt::format("a number from 0 to {}, or -1 where the slot has sampled a token",
                       limits.V - 1));
    }
    const int32_t position = plan.positions[index];
    if (position == kPadPosition) continue;
    if (!is_in(position, end_position)) {
      fail("rows", index, "position", position,
           fmt::format("a position within its {} pages", sequence.num_pages));
    }
    if (last != kPadPosition && position != last + 1) {
      fail("rows", index, "position", position,
           fmt::format("{}, one more than the row before", last + 1));
    }
    last = position;
  }
}

void check_sequences(const StepPlan& plan, const PlanLimits& limits,
                     const std::vector<SlotState>& states) {
  const int64_t T = plan.num_rows();
  if (T > limits.max_rows) {
    fail("rows", plan.input_ids.size(), "count", T,
         fmt::format("at most {} rows", limits.max_rows));
  }
  if (plan.positions.size() != plan.input_ids.size()) {
    fail("rows", plan.input_ids.size(), "count", plan.positions.size(),
         fmt::format("{} positions", T));
  }
  int64_t row_begin = 0;
  for (size_t s = 0; s < plan.sequences.size(); ++s) {
    const StepSequence& sequence = plan.sequences[s];
    if (sequence.row_begin != row_begin) {
      fail("sequences", s, "row_begin", sequence.row_begin,
           fmt::format("{}, the end of the sequence before", row_begin));
    }
    require_below(sequence.num_rows, T - row_begin + 1, "sequences", s, "num_rows");
    const auto entries = static_cast<int64_t>(plan.page_tables.size());
    if (sequence.page_table_begin < 0 || sequence.num_pages < 0 ||
        sequence.page_table_begin + int64_t{sequence.num_pages} > entries) {
      fail("sequences", s, "page_table_begin", sequence.page_table_begin,
           fmt::format("a range within {} entries", entries));
    }
    check_rows(plan, s, limits, states);
    row_begin += sequence.num_rows;
  }
  if (row_begin != T) {
    fail("sequences", plan.sequences.size(), "end", row_begin, fmt::format("{}, all rows", T));
  }
}

// Draw i of the slot that draw i - 1 was of: it stands behind a draft token, in the next row.
void check_draft(const StepPlan& plan, size_t i) {
  const SampleRow& sample = plan.samples[i];
  const int32_t row = plan.samples[i - 1].row + 1;
  const auto after = std::upper_bound(
      plan.sequences.begin(), plan.sequences.end(), sample.row,
      [](int32_t r, const StepSequence& sequence) { return r < sequence.row_begin; });
  const StepSequence& sequence = *(after - 1);  // rows were checked: some sequence has this one
  const auto index = static_cast<size_t>(sample.row);
  if (sample.row != row || row == sequence.row_begin || sequence.slot != sample.slot ||
      plan.positions[index - 1] == kPadPosition || plan.input_ids[index] == kPendingToken) {
    fail("samples", i, "row", sample.row,
         fmt::format("{}, with a token id, in the sequence of slot {} behind its draw before", row,
                     sample.slot));
  }
}

void check_heads(const StepPlan& plan, const PlanLimits& limits, std::vector<SlotState>& states) {
  for (size_t i = 0; i < plan.samples.size(); ++i) {
    const SampleRow& sample = plan.samples[i];
    require_below(sample.row, plan.num_rows(), "samples", i, "row");
    if (i > 0 && sample.slot == plan.samples[i - 1].slot) {
      check_draft(plan, i);
      continue;
    }
    const SlotState state = state_of(sample.slot, states);
    const bool is_usable = state == SlotState::kFilled || state == SlotState::kSampled;
    require(is_usable, "samples", i, "slot", sample.slot,
            "a filled slot, all draws of a slot next to each other");
    states[static_cast<size_t>(sample.slot)] = SlotState::kDrawn;
  }
  for (size_t i = 0; i < plan.scores.size(); ++i) {
    const ScoreRow& score = plan.scores[i];
    require_below(score.row, plan.num_rows(), "scores", i, "row");
    require_below(score.token, limits.V, "scores", i, "token");
    require(is_temperature(score.temperature), "scores", i, "temperature", score.temperature,
            "0 (greedy) or a number from 1e-5");
  }
}

}  // namespace

void check_plan(const StepPlan& plan, const PlanLimits& limits, const StatusOf& slot_status) {
  for (size_t i = 0; i < plan.page_copies.size(); ++i) {
    const PageCopy& copy = plan.page_copies[i];
    require_below(copy.source, limits.num_pages, "page_copies", i, "source");
    require_below(copy.target, limits.num_pages, "page_copies", i, "target");
    require_below(copy.num_tokens, limits.page_tokens + 1, "page_copies", i, "num_tokens");
  }
  for (size_t i = 0; i < plan.slot_inits.size(); ++i) {
    check_slot_init(plan.slot_inits[i], i, limits);
  }
  for (size_t i = 0; i < plan.page_tables.size(); ++i) {
    require_below(plan.page_tables[i], limits.num_pages, "page_tables", i, "page");
  }
  std::vector<SlotState> states = slot_states(plan, limits, slot_status);
  check_sequences(plan, limits, states);
  check_heads(plan, limits, states);
}

}  // namespace rollpack::kernels
