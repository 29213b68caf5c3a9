#include "kernels/cuda/step_context.h"

#include <algorithm>
#include <cstring>
#include <span>

#include "kernels/base/error.h"
#include "kernels/cuda/graph_buckets.h"
#include "kernels/cuda/memory_plan.h"
#include "kernels/step/check_plan.h"
#include "kernels/step/draft_draws.h"

namespace rollpack::kernels::cuda {
namespace {

constexpr size_t kArrayAlignment = 16;
constexpr int64_t kResultBytes = int64_t{64} << 10;
static_assert(kMaxGraphRows * (sizeof(HeadResult) + 1) <= kResultBytes);

SlotFill fill_of(const SlotInit& init) {
  return {.state = {.seed = init.seed,
                    .prompt_hash = init.prompt_hash,
                    .sample_index = init.sample_index,
                    .next_position = init.next_position,
                    .min_position = init.min_position,
                    .end_position = init.end_position,
                    .temperature = init.sampling.temperature,
                    .top_k = init.sampling.top_k,
                    .top_p = init.sampling.top_p,
                    .min_p = init.sampling.min_p,
                    .num_stop_tokens = static_cast<int32_t>(init.stop_token_ids.size())},
          .slot = init.slot};
}

std::vector<int32_t> distinct_head_rows(const StepPlan& plan) {
  std::vector<int32_t> rows;
  for (const SampleRow& sample : plan.samples) rows.push_back(sample.row);
  for (const ScoreRow& score : plan.scores) rows.push_back(score.row);
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  return rows;
}

// The slots that a plan fills; the last of a slot's inits counts.
struct Fills {
  std::vector<SlotFill> fills;
  std::vector<int32_t> stop_tokens;

  Fills(const StepPlan& plan, int32_t num_slots) {
    std::vector<int32_t> fill_of_slot(static_cast<size_t>(num_slots), -1);
    for (const SlotInit& init : plan.slot_inits) {
      SlotFill fill = fill_of(init);
      fill.stop_begin = static_cast<int32_t>(stop_tokens.size());
      stop_tokens.insert(stop_tokens.end(), init.stop_token_ids.begin(), init.stop_token_ids.end());
      int32_t& index = fill_of_slot[static_cast<size_t>(init.slot)];
      if (index >= 0) {
        fills[static_cast<size_t>(index)] = fill;
      } else {
        index = static_cast<int32_t>(fills.size());
        fills.push_back(fill);
      }
    }
  }
};

}  // namespace

StepContext::Place::Place(Device& device, int64_t array_bytes)
    : arrays(device, array_bytes, "a step's rows"),
      results(device, kResultBytes, "a step's results"),
      has_ended(device) {}

StepContext::StepContext(Device& device, const ModelShape& shape, const BackendOptions& options,
                         const KvCache& cache)
    : device_(device),
      shape_(shape),
      options_(options),
      cache_(cache),
      slot_mirrors_(static_cast<size_t>(options.max_num_seqs)),
      places_{Place(device, step_array_bytes(options)), Place(device, step_array_bytes(options))} {
  slots_.stop_words = static_cast<int32_t>((shape.V + 31) / 32);
  slot_states_ = DeviceMemory(device, options.max_num_seqs * int64_t{sizeof(SlotState)}, "slots");
  stop_bits_ =
      DeviceMemory(device, int64_t{options.max_num_seqs} * slots_.stop_words * 4, "stop sets");
  slots_.states = slot_states_.as<SlotState>();
  slots_.stop_bits = stop_bits_.as<uint32_t>();
}

int64_t StepContext::num_rows() const {
  if (plan_ == nullptr) fail_invariant("ops are called by a step's program only");
  return rows_.num_rows;
}

void StepContext::begin(Stream stream, const StepPlan& plan, int32_t graph_rows) {
  if (num_under_way_ == places_.size()) fail_invariant("a step more than there are places for");
  check_plan(plan,
             {.V = shape_.V,
              .max_rows = options_.max_num_batched_tokens,
              .num_pages = static_cast<int32_t>(cache_.num_pages),
              .page_tokens = kPageTokens,
              .num_slots = options_.max_num_seqs},
             [this](int32_t slot) -> SlotStatus {
               const SlotMirror& mirror = slot_mirrors_[static_cast<size_t>(slot)];
               return {.is_set = mirror.is_set, .has_pending = mirror.has_pending};
             });
  plan_ = &plan;
  Place& place = current();
  const BeginStepInputs inputs = lay_out(plan, place, graph_rows);
  note_slots(plan);
  std::memcpy(used_arrays_->on_host.as<>(), arrays_.data(), arrays_.size());
  device_.copy_to_device(stream, used_arrays_->on_device.as<>(), used_arrays_->on_host.as<>(),
                         static_cast<int64_t>(arrays_.size()));
  device_.clear(stream, rows_.row_failed, rows_.num_rows);
  device_.kernels().begin_step(stream, inputs);
}

void StepContext::begin_capture(size_t place, int32_t graph_rows) {
  static const StepPlan kNothing;
  plan_ = &kNothing;
  lay_out(kNothing, places_[place], graph_rows);
  if (!is_in_place_) fail_invariant("a graph's arrays do not fit into their place");
}

template <class T>
size_t StepContext::reserve(size_t count) {
  const size_t place = (arrays_.size() + kArrayAlignment - 1) / kArrayAlignment * kArrayAlignment;
  arrays_.resize(place + count * sizeof(T));
  return place;
}

template <class T>
void StepContext::write(size_t place, const std::vector<T>& values) {
  if (!values.empty())
    std::memcpy(arrays_.data() + place, values.data(), values.size() * sizeof(T));
}

template <class T>
size_t StepContext::add(const std::vector<T>& values) {
  const size_t place = reserve<T>(values.size());
  write(place, values);
  return place;
}

// What large plans need grows by a factor, so a few times at most. The step that had this place has
// ended.
StepContext::Block& StepContext::block_for(Block& fixed, Block& large, int64_t bytes,
                                           const char* what) {
  if (bytes <= fixed.on_device.bytes()) return fixed;
  if (bytes > large.on_device.bytes()) {
    const int64_t grown =
        std::max(bytes, 2 * std::max(fixed.on_device.bytes(), large.on_device.bytes()));
    large = Block();  // its memory first
    large = Block(device_, grown, what);
  }
  return large;
}

void StepContext::note_slots(const StepPlan& plan) {
  for (const SlotInit& init : plan.slot_inits) {
    slot_mirrors_[static_cast<size_t>(init.slot)] = {
        .is_set = true,
        .is_cut = is_cut(fill_of(init).state, shape_.V),
        .min_position = init.stop_token_ids.empty() ? 0 : init.min_position,
        .next_position = init.next_position};
  }
  const auto num_samples = static_cast<int32_t>(plan.samples.size());
  for (HeadGroup& group : head_plan_.groups) {
    for (int32_t i = group.first_query; i < group.first_query + group.num_queries; ++i) {
      const int32_t query = head_plan_.queries[static_cast<size_t>(i)];
      if (query >= num_samples) continue;
      const auto slot = static_cast<size_t>(plan.samples[static_cast<size_t>(query)].slot);
      group.may_keep_logits |= slot_mirrors_[slot].may_keep_logits();
    }
  }
  for (size_t i = 0; i < plan.samples.size(); ++i) {
    SlotMirror& slot = slot_mirrors_[static_cast<size_t>(plan.samples[i].slot)];
    // Whatever comes of the draws, a later row may stand for them.
    slot.has_pending = true;
    const bool follows = i > 0 && plan.samples[i - 1].slot == plan.samples[i].slot;
    if (!follows) ++slot.next_position;
  }
}

BeginStepInputs StepContext::lay_out(const StepPlan& plan, Place& place, int32_t graph_rows) {
  const bool is_graph = graph_rows > 0;
  const auto num_own = static_cast<size_t>(plan.num_rows());
  const auto num_all = is_graph ? static_cast<size_t>(graph_rows) : num_own;
  const auto num_rows = static_cast<int32_t>(num_all);
  const auto filled_up = [&](std::vector<int32_t> values, int32_t value) {
    if (is_graph) values.resize(num_all, value);
    return values;
  };
  std::vector<int32_t> row_sequence(num_own);
  std::vector<int32_t> slot, row_start, row_count, table_start, page_count;
  for (size_t s = 0; s < plan.sequences.size(); ++s) {
    const StepSequence& sequence = plan.sequences[s];
    slot.push_back(sequence.slot);
    row_start.push_back(sequence.row_begin);
    row_count.push_back(sequence.num_rows);
    table_start.push_back(sequence.page_table_begin);
    page_count.push_back(sequence.num_pages);
    std::fill_n(row_sequence.begin() + sequence.row_begin, sequence.num_rows,
                static_cast<int32_t>(s));
  }
  std::vector<int32_t> head_rows = distinct_head_rows(plan);
  const auto head_index = [&](int32_t row) {
    return static_cast<int32_t>(std::lower_bound(head_rows.begin(), head_rows.end(), row) -
                                head_rows.begin());
  };
  std::vector<int32_t> sample_row, sample_slot, sample_draw, score_row, score_token;
  std::vector<float> score_temperature;
  for (size_t i = 0; i < plan.samples.size(); ++i) {
    sample_row.push_back(head_index(plan.samples[i].row));
    sample_slot.push_back(plan.samples[i].slot);
    const bool follows = i > 0 && plan.samples[i - 1].slot == plan.samples[i].slot;
    sample_draw.push_back(follows ? sample_draw.back() + 1 : 0);
  }
  for (const ScoreRow& score : plan.scores) {
    score_row.push_back(head_index(score.row));
    score_token.push_back(score.token);
    score_temperature.push_back(score.temperature);
  }
  if (is_graph) {  // a sample for every skipped row, in its own row of the head
    for (size_t i = num_own; i < num_all; ++i) sample_row.push_back(static_cast<int32_t>(i));
    head_rows.resize(num_all, -1);
  }
  const Fills fills(plan, options_.max_num_seqs);
  AttentionLimits limits = attention_limits(shape_);
  limits.wanted_blocks = device_.info().num_multiprocessors * 2;
  AttentionPlan attention = plan_attention(plan, limits);
  const auto num_items = static_cast<int32_t>(attention.items.size());
  if (is_graph) {
    attention.row_states.resize(num_all, kNoState);
  }
  head_plan_ = plan_head(sample_row, score_row, static_cast<int32_t>(head_rows.size()));

  // First the arrays whose sizes the rows of a graph fix, so that their addresses are those that it
  // has; then the work list, whose beginning is; then what is reached by indices from the start.
  arrays_.clear();
  const size_t scalars_at = add(std::vector<StepScalars>{
      {.num_items = num_items, .wants_entropy = plan.wants_entropy ? 1 : 0}});
  const size_t ids_at = add(filled_up(plan.input_ids, kSkippedRow));
  const size_t positions_at = add(filled_up(plan.positions, kPadPosition));
  const size_t sequence_at = add(filled_up(row_sequence, -1));
  const size_t slot_at = add(filled_up(slot, -1)), start_at = add(filled_up(row_start, -1));
  const size_t count_at = add(filled_up(row_count, 0));
  const size_t page_count_at = add(filled_up(page_count, 0));
  table_start = filled_up(table_start, 0);
  const size_t table_start_at = reserve<int32_t>(table_start.size());
  const size_t head_rows_at = add(head_rows), sample_row_at = add(sample_row);
  const size_t sample_slot_at = add(filled_up(sample_slot, -1));
  const size_t sample_draw_at = add(filled_up(sample_draw, 0));
  const size_t score_row_at = add(score_row), score_token_at = add(score_token);
  const size_t temperature_at = add(score_temperature);
  const size_t queries_at = add(head_plan_.queries);
  const size_t row_states_at = add(attention.row_states), pad_rows_at = add(attention.pad_rows);
  const size_t items_at = reserve<AttentionItem>(attention.items.size());
  const auto item_rows_at = static_cast<int32_t>(add(attention.item_rows) / sizeof(int32_t));
  const auto tables_at = static_cast<int32_t>(add(plan.page_tables) / sizeof(int32_t));
  const size_t fills_at = add(fills.fills), stop_tokens_at = add(fills.stop_tokens);
  const size_t copies_at = add(plan.page_copies);
  for (int32_t& start : table_start) start += tables_at;
  write(table_start_at, table_start);
  for (AttentionItem& item : attention.items) {
    item.first_row += item_rows_at;
    item.page_table += tables_at;
  }
  write(items_at, attention.items);

  Block& arrays = block_for(place.arrays, place.large_arrays, static_cast<int64_t>(arrays_.size()),
                            "a step's rows");
  used_arrays_ = &arrays;
  const auto num_samples = static_cast<int32_t>(sample_row.size());
  const auto num_scores = static_cast<int32_t>(plan.scores.size());
  place.failed_at = int64_t{sizeof(HeadResult)} * (num_samples + num_scores);
  place.results_bytes = place.failed_at + num_rows;
  Block& results =
      block_for(place.results, place.large_results, place.results_bytes, "a step's results");
  place.used_results = &results;
  is_in_place_ = &arrays == &place.arrays && &results == &place.results;

  rows_ = {.num_rows = num_rows,
           .num_sequences = static_cast<int32_t>(table_start.size()),
           .scalars = at<StepScalars>(scalars_at),
           .input_ids = at<int32_t>(ids_at),
           .positions = at<int32_t>(positions_at),
           .row_sequence = at<int32_t>(sequence_at),
           .sequence_slot = at<int32_t>(slot_at),
           .row_starts = at<int32_t>(start_at),
           .row_counts = at<int32_t>(count_at),
           .page_table_starts = at<int32_t>(table_start_at),
           .page_counts = at<int32_t>(page_count_at),
           .page_tables = at<int32_t>(0),
           .row_failed = results.on_device.as<uint8_t>() + place.failed_at};
  head_ = {.num_rows = static_cast<int32_t>(head_rows.size()),
           .num_samples = num_samples,
           .num_scores = num_scores,
           .rows = at<int32_t>(head_rows_at),
           .sample_head_row = at<int32_t>(sample_row_at),
           .sample_slot = at<int32_t>(sample_slot_at),
           .sample_draw = at<int32_t>(sample_draw_at),
           .score_head_row = at<int32_t>(score_row_at),
           .score_token = at<int32_t>(score_token_at),
           .score_temperature = at<float>(temperature_at),
           .results = results.on_device.as<HeadResult>()};
  attention_work_ = {.items = at<AttentionItem>(items_at),
                     .item_rows = at<int32_t>(0),
                     .row_states = at<int32_t>(row_states_at),
                     .pad_rows = at<int32_t>(pad_rows_at),
                     .item_blocks = is_graph ? graph_item_blocks(num_rows, limits) : num_items,
                     .num_pads = static_cast<int32_t>(attention.pad_rows.size()),
                     .max_states = limits.max_states};
  head_queries_ = at<int32_t>(queries_at);
  highest_position_ = plan.positions.empty() ? kPadPosition : std::ranges::max(plan.positions);
  return {.slots = slots_,
          .num_fills = static_cast<int32_t>(fills.fills.size()),
          .fills = at<SlotFill>(fills_at),
          .stop_tokens = at<int32_t>(stop_tokens_at),
          .cache = cache_,
          .num_layers = shape_.L,
          .element_bytes = static_cast<int32_t>(dtype_bytes(shape_.dtype)),
          .num_copies = static_cast<int32_t>(plan.page_copies.size()),
          .copies = at<PageCopy>(copies_at)};
}

void StepContext::hand_over(Stream stream, uint64_t number) {
  Place& place = current();
  device_.copy_to_host(stream, place.used_results->on_host.as<>(),
                       place.used_results->on_device.as<>(), place.results_bytes);
  device_.record(place.has_ended, stream);
  place.plan = plan_;
  place.number = number;
  plan_ = nullptr;
  next_ = (next_ + 1) % places_.size();
  ++num_under_way_;
}

void StepContext::abandon(Stream stream, Deadline deadline) noexcept {
  plan_ = nullptr;
  try {
    // The next step overwrites the arrays, and copies from the host may still read them.
    device_.wait(stream, deadline);
  } catch (const Error&) {
    // The next step meets it too.
  }
}

std::optional<StepResult> StepContext::take_result() {
  const Place& place = oldest();
  if (!device_.has_passed(place.has_ended)) return std::nullopt;
  const auto* const results = place.used_results->on_host.as<HeadResult>();
  const size_t num_samples = place.plan->samples.size();
  const size_t num_scores = place.plan->scores.size();
  StepResult result;
  result.samples.assign(results, results + num_samples);
  result.scores.assign(results + num_samples, results + num_samples + num_scores);
  const auto* const row_failed =
      reinterpret_cast<const uint8_t*>(place.used_results->on_host.as<>() + place.failed_at);
  find_failed_sequences(*place.plan, {row_failed, static_cast<size_t>(place.plan->num_rows())},
                        result);
  forget_step();
  return result;
}

void StepContext::forget_step() {
  --num_under_way_;
}

}  // namespace rollpack::kernels::cuda
