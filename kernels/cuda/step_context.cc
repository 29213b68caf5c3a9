#include "kernels/cuda/step_context.h"

#include <algorithm>
#include <cstring>
#include <span>

#include "kernels/base/error.h"
#include "kernels/step/check_plan.h"
#include "kernels/step/draft_draws.h"

namespace rollpack::kernels::cuda {
namespace {

constexpr size_t kAlignment = 16;
constexpr int64_t kFirstArrayBytes = int64_t{1} << 20;

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

}  // namespace

StepContext::StepContext(Device& device, const ModelShape& shape, const BackendOptions& options,
                         const KvCache& cache)
    : device_(device),
      shape_(shape),
      options_(options),
      cache_(cache),
      slot_mirrors_(static_cast<size_t>(options.max_num_seqs)),
      places_{Place(device), Place(device)} {
  slots_.stop_words = static_cast<int32_t>((shape.V + 31) / 32);
  slot_states_ = DeviceMemory(device, options.max_num_seqs * int64_t{sizeof(SlotState)}, "slots");
  stop_bits_ =
      DeviceMemory(device, int64_t{options.max_num_seqs} * slots_.stop_words * 4, "stop sets");
  slots_.states = slot_states_.as<SlotState>();
  slots_.stop_bits = stop_bits_.as<uint32_t>();
  for (Place& place : places_) {
    place.on_host = HostMemory(device, kFirstArrayBytes, "a step's rows");
    place.on_device = DeviceMemory(device, kFirstArrayBytes, "a step's rows");
  }
}

const StepPlan& StepContext::plan() const {
  if (plan_ == nullptr) fail_invariant("ops are called by a step's program only");
  return *plan_;
}

void StepContext::begin(Stream stream, const StepPlan& plan) {
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
  arrays_.clear();
  add_rows(stream);
}

template <class T>
size_t StepContext::add(const std::vector<T>& values) {
  const size_t place = (arrays_.size() + kAlignment - 1) / kAlignment * kAlignment;
  arrays_.resize(place + values.size() * sizeof(T));
  if (!values.empty())
    std::memcpy(arrays_.data() + place, values.data(), values.size() * sizeof(T));
  return place;
}

void StepContext::upload(Stream stream) {
  const auto bytes = static_cast<int64_t>(arrays_.size());
  Place& place = current();
  if (bytes > place.on_device.bytes()) {
    // Page tables of many long sequences: rare, and by a factor, so a few times at most. The step
    // that had this place has ended.
    const int64_t grown = std::max(bytes, 2 * place.on_device.bytes());
    place.on_host = HostMemory(device_, grown, "a step's rows");
    place.on_device = DeviceMemory(device_, grown, "a step's rows");
  }
  std::memcpy(place.on_host.as<>(), arrays_.data(), arrays_.size());
  device_.copy_to_device(stream, place.on_device.as<>(), place.on_host.as<>(), bytes);
}

std::vector<int32_t> StepContext::distinct_head_rows() const {
  std::vector<int32_t> rows;
  for (const SampleRow& sample : plan_->samples) rows.push_back(sample.row);
  for (const ScoreRow& score : plan_->scores) rows.push_back(score.row);
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  return rows;
}

void StepContext::add_rows(Stream stream) {
  const StepPlan& plan = *plan_;
  const auto num_rows = static_cast<int32_t>(plan.num_rows());
  std::vector<int32_t> row_sequence(plan.input_ids.size());
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
  const std::vector<int32_t> head_rows = distinct_head_rows();
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

  // The last of a slot's inits counts.
  std::vector<SlotFill> fills;
  std::vector<int32_t> fill_of_slot(slot_mirrors_.size(), -1), stop_tokens;
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
    slot_mirrors_[static_cast<size_t>(init.slot)] = {.is_set = true, .has_pending = false};
  }
  // Whatever comes of the draws, a later row may stand for them.
  for (const SampleRow& sample : plan.samples) {
    slot_mirrors_[static_cast<size_t>(sample.slot)].has_pending = true;
  }
  AttentionLimits limits = attention_limits(shape_);
  limits.wanted_blocks = device_.info().num_multiprocessors * 2;
  const AttentionPlan attention = plan_attention(plan, limits);

  const size_t ids_at = add(plan.input_ids), positions_at = add(plan.positions);
  const size_t sequence_at = add(row_sequence), slot_at = add(slot), start_at = add(row_start);
  const size_t count_at = add(row_count), table_start_at = add(table_start);
  const size_t page_count_at = add(page_count), tables_at = add(plan.page_tables);
  const size_t head_rows_at = add(head_rows), sample_row_at = add(sample_row);
  const size_t sample_slot_at = add(sample_slot), sample_draw_at = add(sample_draw);
  const size_t score_row_at = add(score_row), score_token_at = add(score_token);
  const size_t temperature_at = add(score_temperature);
  const size_t fills_at = add(fills), stop_tokens_at = add(stop_tokens);
  const size_t copies_at = add(plan.page_copies);
  const size_t items_at = add(attention.items), item_rows_at = add(attention.item_rows);
  const size_t row_states_at = add(attention.row_states), merges_at = add(attention.merges);
  head_plan_ = plan_head(sample_row, score_row, static_cast<int32_t>(head_rows.size()));
  const size_t queries_at = add(head_plan_.queries);
  upload(stream);

  const auto num_samples = static_cast<int32_t>(plan.samples.size());
  const auto num_scores = static_cast<int32_t>(plan.scores.size());
  const int64_t failed_at = int64_t{sizeof(HeadResult)} * (num_samples + num_scores);
  Place& place = current();
  place.results_bytes = failed_at + num_rows;
  if (place.results_bytes > place.results_on_device.bytes()) {
    const int64_t grown = std::max(2 * place.results_bytes, int64_t{64} << 10);
    place.results_on_device = DeviceMemory(device_, grown, "a step's results");
    place.results_on_host = HostMemory(device_, grown, "a step's results");
  }
  device_.clear(stream, place.results_on_device.as<>() + failed_at, num_rows);

  rows_ = {.num_rows = num_rows,
           .num_sequences = static_cast<int32_t>(plan.sequences.size()),
           .input_ids = at<int32_t>(ids_at),
           .positions = at<int32_t>(positions_at),
           .row_sequence = at<int32_t>(sequence_at),
           .sequence_slot = at<int32_t>(slot_at),
           .row_starts = at<int32_t>(start_at),
           .row_counts = at<int32_t>(count_at),
           .page_table_starts = at<int32_t>(table_start_at),
           .page_counts = at<int32_t>(page_count_at),
           .page_tables = at<int32_t>(tables_at),
           .row_failed = place.results_on_device.as<uint8_t>() + failed_at};
  head_ = {.num_rows = static_cast<int32_t>(head_rows.size()),
           .num_samples = num_samples,
           .num_scores = num_scores,
           .wants_entropy = plan.wants_entropy,
           .rows = at<int32_t>(head_rows_at),
           .sample_head_row = at<int32_t>(sample_row_at),
           .sample_slot = at<int32_t>(sample_slot_at),
           .sample_draw = at<int32_t>(sample_draw_at),
           .score_head_row = at<int32_t>(score_row_at),
           .score_token = at<int32_t>(score_token_at),
           .score_temperature = at<float>(temperature_at),
           .results = place.results_on_device.as<HeadResult>()};
  attention_work_ = {.items = at<AttentionItem>(items_at),
                     .item_rows = at<int32_t>(item_rows_at),
                     .row_states = at<int32_t>(row_states_at),
                     .merges = at<AttentionMerge>(merges_at),
                     .num_items = static_cast<int32_t>(attention.items.size()),
                     .num_merges = static_cast<int32_t>(attention.merges.size()),
                     .max_states = limits.max_states};
  head_queries_ = at<int32_t>(queries_at);
  highest_position_ = plan.positions.empty() ? kPadPosition : std::ranges::max(plan.positions);

  device_.kernels().begin_step(stream,
                               {.slots = slots_,
                                .num_fills = static_cast<int32_t>(fills.size()),
                                .fills = at<SlotFill>(fills_at),
                                .stop_tokens = at<int32_t>(stop_tokens_at),
                                .cache = cache_,
                                .num_layers = shape_.L,
                                .element_bytes = static_cast<int32_t>(dtype_bytes(shape_.dtype)),
                                .num_copies = static_cast<int32_t>(plan.page_copies.size()),
                                .copies = at<PageCopy>(copies_at)});
}

void StepContext::hand_over(Stream stream, uint64_t number) {
  Place& place = current();
  device_.copy_to_host(stream, place.results_on_host.as<>(), place.results_on_device.as<>(),
                       place.results_bytes);
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
  const auto* const results = place.results_on_host.as<HeadResult>();
  const size_t num_samples = place.plan->samples.size();
  const size_t num_scores = place.plan->scores.size();
  StepResult result;
  result.samples.assign(results, results + num_samples);
  result.scores.assign(results + num_samples, results + num_samples + num_scores);
  const auto* const row_failed =
      reinterpret_cast<const uint8_t*>(results + num_samples + num_scores);
  find_failed_sequences(*place.plan, {row_failed, static_cast<size_t>(place.plan->num_rows())},
                        result);
  forget_step();
  return result;
}

void StepContext::forget_step() {
  --num_under_way_;
}

}  // namespace rollpack::kernels::cuda
