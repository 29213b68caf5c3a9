// Everything a plan can get wrong, found before the step changes anything.
#include <fmt/format.h>

#include <cmath>

#include "kernels/base/error.h"
#include "kernels/reference/step_state.h"

namespace rollpack::kernels::reference {
namespace {

constexpr float kMinTemperature = 1e-5f;  // below, 1 / temperature amplifies rounding beyond use

template <class Value>
void require(bool holds, std::string_view list, size_t index, std::string_view field, Value value,
             std::string allowed) {
  if (holds) return;
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = fmt::format("step.{}[{}].{}", list, index, field),
               .value = fmt::to_string(value),
               .allowed = std::move(allowed)});
}

std::string below(int64_t end) { return fmt::format("a number from 0 to {}", end - 1); }

bool is_in(int64_t value, int64_t end) { return value >= 0 && value < end; }

bool is_temperature(float value) {
  return value == 0.0f || (std::isfinite(value) && value >= kMinTemperature);
}

void check_slot_init(const SlotInit& init, size_t i, const PlanLimits& limits, size_t num_slots) {
  const SamplingParams& sampling = init.sampling;
  const auto slots = static_cast<int64_t>(num_slots);
  require(is_in(init.slot, slots), "slot_inits", i, "slot", init.slot, below(slots));
  require(is_temperature(sampling.temperature), "slot_inits", i, "temperature",
          sampling.temperature, "0 (greedy) or a number from 1e-5");
  require(sampling.top_p > 0 && sampling.top_p <= 1, "slot_inits", i, "top_p", sampling.top_p,
          "a number above 0, at most 1");
  require(sampling.min_p >= 0 && sampling.min_p <= 1, "slot_inits", i, "min_p", sampling.min_p,
          "a number from 0 to 1");
  for (const int32_t id : init.stop_token_ids) {
    require(is_in(id, limits.V), "slot_inits", i, "stop_token_ids", id, below(limits.V));
  }
}

void check_sequence(const StepPlan& plan, size_t s, int32_t row_begin, const PlanLimits& limits) {
  const StepSequence& sequence = plan.sequences[s];
  require(sequence.row_begin == row_begin, "sequences", s, "row_begin", sequence.row_begin,
          fmt::format("{}, the end of the sequence before", row_begin));
  const int64_t rows_left = plan.num_rows() - row_begin;
  require(sequence.num_rows >= 0 && sequence.num_rows <= rows_left, "sequences", s, "num_rows",
          sequence.num_rows, fmt::format("a number from 0 to {}", rows_left));
  const auto entries = static_cast<int64_t>(plan.page_tables.size());
  require(sequence.page_table_begin >= 0 && sequence.num_pages >= 0 &&
              sequence.page_table_begin + int64_t{sequence.num_pages} <= entries,
          "sequences", s, "page_table_begin", sequence.page_table_begin,
          fmt::format("a range within {} entries", entries));
  int32_t last = kPadPosition;
  for (int32_t t = row_begin; t < row_begin + sequence.num_rows; ++t) {
    const int32_t position = plan.positions[static_cast<size_t>(t)];
    if (position == kPadPosition) continue;
    const auto row = static_cast<size_t>(t);
    require(is_in(position, int64_t{sequence.num_pages} * limits.page_tokens), "rows", row,
            "position", position,
            fmt::format("a position within its {} pages", sequence.num_pages));
    require(last == kPadPosition || position == last + 1, "rows", row, "position", position,
            fmt::format("{}, one more than the row before", last + 1));
    last = position;
  }
}

// Whether the slot has a sampled token that a row of this step may stand for.
bool has_pending(const StepPlan& plan, int32_t slot, const std::vector<Slot>& slots) {
  for (const SlotInit& init : plan.slot_inits) {
    if (init.slot == slot) return false;  // filled by this very step: nothing sampled yet
  }
  return is_in(slot, static_cast<int64_t>(slots.size())) &&
         slots[static_cast<size_t>(slot)].token != kPendingToken;
}

void check_rows(const StepPlan& plan, const PlanLimits& limits, const std::vector<Slot>& slots) {
  require(plan.num_rows() <= limits.max_rows, "rows", plan.input_ids.size(), "count",
          plan.num_rows(), fmt::format("at most {} rows", limits.max_rows));
  require(plan.positions.size() == plan.input_ids.size(), "rows", plan.input_ids.size(), "count",
          plan.positions.size(), fmt::format("{} positions", plan.num_rows()));
  int32_t row_begin = 0;
  for (size_t s = 0; s < plan.sequences.size(); ++s) {
    check_sequence(plan, s, row_begin, limits);
    const StepSequence& sequence = plan.sequences[s];
    for (int32_t t = row_begin; t < row_begin + sequence.num_rows; ++t) {
      const int32_t id = plan.input_ids[static_cast<size_t>(t)];
      const bool is_known =
          id == kPendingToken ? has_pending(plan, sequence.slot, slots) : is_in(id, limits.V);
      require(is_known, "rows", static_cast<size_t>(t), "input_id", id,
              below(limits.V) + ", or -1 where the slot has sampled a token");
    }
    row_begin += sequence.num_rows;
  }
  require(row_begin == plan.num_rows(), "sequences", plan.sequences.size(), "end", row_begin,
          fmt::format("{}, all rows", plan.num_rows()));
}

void check_heads(const StepPlan& plan, const PlanLimits& limits, const std::vector<Slot>& slots) {
  std::vector<uint8_t> is_set(slots.size());
  for (size_t i = 0; i < slots.size(); ++i) is_set[i] = slots[i].is_set;
  for (const SlotInit& init : plan.slot_inits) is_set[static_cast<size_t>(init.slot)] = 1;
  for (size_t i = 0; i < plan.samples.size(); ++i) {
    const SampleRow& sample = plan.samples[i];
    require(is_in(sample.row, plan.num_rows()), "samples", i, "row", sample.row,
            below(plan.num_rows()));
    const bool is_usable = is_in(sample.slot, static_cast<int64_t>(slots.size())) &&
                           is_set[static_cast<size_t>(sample.slot)] == 1;
    require(is_usable, "samples", i, "slot", sample.slot, "a filled slot, once a step");
    is_set[static_cast<size_t>(sample.slot)] = 2;  // a second draw needs the token of this one
  }
  for (size_t i = 0; i < plan.scores.size(); ++i) {
    const ScoreRow& score = plan.scores[i];
    require(is_in(score.row, plan.num_rows()), "scores", i, "row", score.row,
            below(plan.num_rows()));
    require(is_in(score.token, limits.V), "scores", i, "token", score.token, below(limits.V));
    require(is_temperature(score.temperature), "scores", i, "temperature", score.temperature,
            "0 (greedy) or a number from 1e-5");
  }
}

}  // namespace

void check_plan(const StepPlan& plan, const PlanLimits& limits, const std::vector<Slot>& slots) {
  for (size_t i = 0; i < plan.page_copies.size(); ++i) {
    const PageCopy& copy = plan.page_copies[i];
    require(is_in(copy.source, limits.num_pages), "page_copies", i, "source", copy.source,
            below(limits.num_pages));
    require(is_in(copy.target, limits.num_pages), "page_copies", i, "target", copy.target,
            below(limits.num_pages));
    require(is_in(copy.num_tokens, limits.page_tokens + 1), "page_copies", i, "num_tokens",
            copy.num_tokens, below(limits.page_tokens + 1));
  }
  for (size_t i = 0; i < plan.slot_inits.size(); ++i) {
    check_slot_init(plan.slot_inits[i], i, limits, slots.size());
  }
  for (size_t i = 0; i < plan.page_tables.size(); ++i) {
    require(is_in(plan.page_tables[i], limits.num_pages), "page_tables", i, "page",
            plan.page_tables[i], below(limits.num_pages));
  }
  check_rows(plan, limits, slots);
  check_heads(plan, limits, slots);
}

}  // namespace rollpack::kernels::reference
