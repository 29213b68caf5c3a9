// A backend without numbers: a page slot holds a hash of everything its key depends on (weights,
// all tokens up to its position), a token is drawn from the hash of its row. So a step that reads a
// wrong, stale or foreign key draws a wrong token, and a few microseconds a step allow thousands of
// random schedules. It also checks each plan: ranges, the token budget, no slot of memory written
// twice. Where steps may be under way, they run as late as a seed says, at the latest when they are
// waited for; unused slots of pages hold what no key depends on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "kernels/philox.h"
#include "tests/kernels/step_overlap.h"

namespace rollpack::rollout {

inline uint64_t mix(uint64_t a, uint64_t b) {
  const auto w = kernels::philox4x32({static_cast<uint32_t>(a), static_cast<uint32_t>(a >> 32),
                                      static_cast<uint32_t>(b), static_cast<uint32_t>(b >> 32)},
                                     {1, 2});
  return static_cast<uint64_t>(w[0]) << 32 | w[1];
}

class SimulatedBackend : public kernels::Backend {
 public:
  struct Options {
    int32_t num_pages = 64;
    int32_t page_tokens = 4;
    int32_t num_slots = 8;
    int32_t max_rows = 32;
    int32_t max_steps_under_way = 1;
    uint32_t lateness = 0;     // seed
    int32_t vocab_size = 100;  // a row of token `vocab_size`, never drawn, has keys that are NaN
  };

  explicit SimulatedBackend(const Options& options)
      : options_(options),
        random_(options.lateness),
        pages_(options.num_pages, std::vector<uint64_t>(options.page_tokens, 0)),
        slots_(options.num_slots) {
    info_.max_steps_under_way = options.max_steps_under_way;
    info_.kv.page_tokens = options.page_tokens;
  }

  // What a row's hash is, given the hash of the row before it.
  static uint64_t row_hash(uint64_t version, uint64_t previous, int32_t token) {
    return mix(mix(version, previous), static_cast<uint64_t>(token) + 1);
  }
  static int32_t draw(uint64_t hash, uint64_t seed, uint64_t prompt_hash, uint32_t sample_index,
                      int32_t vocab_size) {
    return static_cast<int32_t>(mix(mix(hash, seed), mix(prompt_hash, sample_index)) %
                                static_cast<uint64_t>(vocab_size));
  }

  static float logprob(uint64_t hash, int32_t token) {
    return -static_cast<float>(mix(hash, static_cast<uint64_t>(token)) % 1000);
  }

  bool is_asleep() const { return is_asleep_; }
  void set_version(uint64_t version) { version_ = version; }
  // From here on siblings draw alike, as greedy ones do.
  void ignore_sample_index() { sees_sample_index_ = false; }
  int64_t num_rows_run() const { return num_rows_run_; }
  size_t num_steps_under_way() const { return steps_.size(); }

  kernels::StepHandle submit(kernels::StepPlan plan) override;
  kernels::StepResult wait(kernels::StepHandle handle, kernels::Deadline) override;
  bool poll(kernels::StepHandle) override { return true; }
  const kernels::BackendInfo& info() const override { return info_; }

  kernels::Buffer alloc(int64_t) override { return {}; }
  void free(kernels::Buffer) override {}
  void upload(kernels::Buffer, const void*, int64_t) override {}
  void download(void*, kernels::Buffer, int64_t) override {}
  void sync() override {}
  kernels::WeightId declare_weight(const kernels::WeightSpec&) override { return 0; }
  void begin_staging() override {}
  void load_weight(kernels::WeightId, int32_t, const kernels::WeightSource&,
                   kernels::ShardRange) override {}
  void copy_committed_to_staged() override {}
  void commit_weights() override { has_weights_ = true; }
  void discard_weights() override {}
  uint64_t weights_hash() override { return version_; }
  uint64_t staged_weights_hash() override { return version_; }
  int export_staged_weights() override { return -1; }
  void adopt_staged_weights(int) override {}
  void sleep(int level) override;
  void wake_up(kernels::MemoryTags tags) override;
  int64_t held_bytes() const override { return 0; }
  void set_program(std::shared_ptr<kernels::StepProgram>) override {}
  void embed(const kernels::EmbedArgs&) override {}
  void rms_norm(const kernels::RmsNormArgs&) override {}
  void linear(const kernels::LinearArgs&) override {}
  void rope_append(const kernels::RopeAppendArgs&) override {}
  void attention(const kernels::AttentionArgs&) override {}
  void gather_head_rows(const kernels::GatherHeadRowsArgs&) override {}
  void lm_head(const kernels::LmHeadArgs&) override {}

 private:
  struct Slot {
    kernels::SlotInit init;
    int32_t pending_token = -1;
    int32_t next_position = 0;
    bool is_set = false;
    bool is_finished = false;
  };
  struct Step {
    kernels::StepHandle handle = 0;
    kernels::StepPlan plan;
    kernels::testing::StepOverlap overlap;
    kernels::StepResult result;
    bool is_done = false;
  };

  static void check(bool holds, const char* what) {
    if (!holds) throw std::logic_error(what);
  }
  void run_up_to(kernels::StepHandle handle);
  kernels::StepResult run(const kernels::StepPlan& plan);
  void spoil_unused_slots(const kernels::StepPlan& plan);
  void run_sequence(const kernels::StepPlan& plan, const kernels::StepSequence& sequence,
                    std::vector<uint64_t>& hashes);
  kernels::HeadResult sample(const kernels::StepPlan& plan, const kernels::SampleRow& row,
                             uint64_t hash);

  const Options options_;
  std::mt19937 random_;
  std::deque<Step> steps_;  // under way, oldest first
  kernels::StepHandle last_handle_ = 0;
  uint64_t version_ = 0;
  bool is_asleep_ = false;
  bool has_weights_ = true;
  bool sees_sample_index_ = true;
  std::vector<std::vector<uint64_t>> pages_;  // [num_pages][page_tokens] row hashes
  std::vector<Slot> slots_;
  std::set<std::pair<int32_t, int32_t>> written_;  // (page, offset) of the step under way
  std::set<int32_t> failed_;                       // sequences of the step under way
  kernels::StepResult result_;
  kernels::BackendInfo info_;
  int64_t num_rows_run_ = 0;
};

inline kernels::StepHandle SimulatedBackend::submit(kernels::StepPlan plan) {
  check(steps_.size() < static_cast<size_t>(options_.max_steps_under_way), "a step too many");
  for (const Step& step : steps_) step.overlap.check(plan, options_.page_tokens);
  const kernels::StepHandle handle = ++last_handle_;
  kernels::testing::StepOverlap overlap;
  if (options_.max_steps_under_way > 1) overlap = {plan, options_.page_tokens};
  steps_.push_back({.handle = handle, .plan = std::move(plan), .overlap = std::move(overlap)});
  if (options_.max_steps_under_way == 1 || random_() % 2 == 0) run_up_to(handle);
  return handle;
}

inline kernels::StepResult SimulatedBackend::wait(kernels::StepHandle handle, kernels::Deadline) {
  check(!steps_.empty() && steps_.front().handle == handle, "waits for the oldest step");
  run_up_to(handle);
  kernels::StepResult result = std::move(steps_.front().result);
  steps_.pop_front();
  return result;
}

inline void SimulatedBackend::run_up_to(kernels::StepHandle handle) {
  for (Step& step : steps_) {
    if (step.handle > handle || std::exchange(step.is_done, true)) continue;
    step.result = run(step.plan);
  }
}

// A page whose first slot is written starts a life; behind what a copy brings nothing is of use.
inline void SimulatedBackend::spoil_unused_slots(const kernels::StepPlan& plan) {
  for (const kernels::PageCopy& copy : plan.page_copies) {
    for (int32_t i = copy.num_tokens; i < options_.page_tokens; ++i) {
      pages_.at(copy.target)[i] = random_();
    }
  }
  for (const kernels::StepSequence& sequence : plan.sequences) {
    for (int32_t row = sequence.row_begin; row < sequence.row_begin + sequence.num_rows; ++row) {
      const int32_t position = plan.positions[row];
      if (position < 0 || position % options_.page_tokens != 0) continue;
      const int32_t entry = sequence.page_table_begin + position / options_.page_tokens;
      for (uint64_t& key : pages_.at(plan.page_tables.at(entry))) key = random_();
    }
  }
}

// Nothing that pages held is of use any more.
inline void SimulatedBackend::sleep(int level) {
  check(steps_.empty(), "no step under way while memory is given back");
  is_asleep_ = true;
  if (level > 1) has_weights_ = false;
  for (auto& page : pages_) {
    for (uint64_t& key : page) key = random_();
  }
}

inline void SimulatedBackend::wake_up(kernels::MemoryTags tags) {
  if (tags.kv_cache) is_asleep_ = false;
}

inline kernels::StepResult SimulatedBackend::run(const kernels::StepPlan& plan) {
  check(!is_asleep_ && has_weights_, "a step of a backend that is awake and has weights");
  check(plan.num_rows() >= 1 && plan.num_rows() <= options_.max_rows, "rows within the budget");
  check(plan.positions.size() == plan.input_ids.size(), "a position a row");
  num_rows_run_ += plan.num_rows();
  for (const kernels::PageCopy& copy : plan.page_copies) {
    check(copy.source != copy.target, "a page copied onto itself");
    for (int32_t i = 0; i < copy.num_tokens; ++i) {
      pages_.at(copy.target)[i] = pages_.at(copy.source)[i];
    }
  }
  spoil_unused_slots(plan);
  for (const kernels::SlotInit& init : plan.slot_inits) {
    slots_.at(init.slot) = {.init = init, .next_position = init.next_position, .is_set = true};
  }
  written_.clear();
  failed_.clear();
  std::vector<uint64_t> hashes(plan.num_rows(), 0);
  int32_t next_row = 0;
  for (const kernels::StepSequence& sequence : plan.sequences) {
    check(sequence.row_begin == next_row, "rows of sequences in order");
    next_row += sequence.num_rows;
    run_sequence(plan, sequence, hashes);
  }
  check(next_row == plan.num_rows(), "every row belongs to a sequence");
  result_ = {};
  result_.failed_sequences.assign(failed_.begin(), failed_.end());
  std::set<int32_t> sampled_slots;
  for (size_t i = 0; i < plan.samples.size(); ++i) {
    const kernels::SampleRow& row = plan.samples[i];
    if (i > 0 && plan.samples[i - 1].slot == row.slot) {
      check(row.row == plan.samples[i - 1].row + 1, "a draw in the row behind the one before");
      const kernels::HeadResult& before = result_.samples.back();
      if (before.is_rejected || before.finish != kernels::SlotFinish::kRunning ||
          before.token != plan.input_ids.at(row.row)) {
        result_.samples.push_back({.slot = row.slot, .is_rejected = true});
        continue;
      }
    } else {
      check(sampled_slots.insert(row.slot).second, "draws of a slot next to each other");
    }
    result_.samples.push_back(sample(plan, row, hashes.at(row.row)));
  }
  for (const kernels::ScoreRow& row : plan.scores) {
    result_.scores.push_back({.position = plan.positions.at(row.row) + 1,
                              .token = row.token,
                              .logprob = logprob(hashes.at(row.row), row.token)});
  }
  return std::move(result_);
}

inline void SimulatedBackend::run_sequence(const kernels::StepPlan& plan,
                                           const kernels::StepSequence& sequence,
                                           std::vector<uint64_t>& hashes) {
  const auto place = [&](int32_t position) -> std::pair<int32_t, int32_t> {
    const int32_t index = position / options_.page_tokens;
    check(index < sequence.num_pages, "a position within the page table");
    return {plan.page_tables.at(sequence.page_table_begin + index),
            position % options_.page_tokens};
  };
  for (int32_t row = sequence.row_begin; row < sequence.row_begin + sequence.num_rows; ++row) {
    const int32_t position = plan.positions[row];
    if (position == kernels::kPadPosition) continue;
    int32_t token = plan.input_ids[row];
    if (token == kernels::kPendingToken) {
      const Slot& slot = slots_.at(sequence.slot);
      check(slot.is_set && slot.pending_token >= 0, "a pending token in the slot");
      check(slot.next_position == position + 1, "a pending token at its position");
      token = slot.pending_token;
    }
    const auto key = [&](int32_t at) -> uint64_t& {
      const auto [page, offset] = place(at);
      return pages_.at(page)[offset];
    };
    // Everything the row sees counts, so that damage to any earlier key shows.
    uint64_t seen = 0;
    for (int32_t j = 0; j < position; ++j) seen = mix(seen, key(j));
    check(written_.insert(place(position)).second, "memory written once a step");
    hashes[row] = row_hash(version_, seen, token);
    if (token == options_.vocab_size) {  // as the CPU backend: zeros instead, and the word of it
      hashes[row] = 0;
      failed_.insert(static_cast<int32_t>(&sequence - plan.sequences.data()));
    }
    key(position) = hashes[row];
  }
}

inline kernels::HeadResult SimulatedBackend::sample(const kernels::StepPlan& plan,
                                                    const kernels::SampleRow& row, uint64_t hash) {
  Slot& slot = slots_.at(row.slot);
  check(slot.is_set, "a sampled slot that was set");
  if (slot.is_finished) return {.slot = row.slot, .is_rejected = true};
  check(plan.positions.at(row.row) + 1 == slot.next_position, "a draw at the slot's position");
  const kernels::SlotInit& init = slot.init;
  kernels::HeadResult result{.slot = row.slot, .position = slot.next_position};
  result.token = draw(hash, init.seed, init.prompt_hash, sees_sample_index_ ? init.sample_index : 0,
                      options_.vocab_size);
  result.logprob = logprob(hash, result.token);
  const bool is_stop = slot.next_position >= init.min_position &&
                       std::ranges::binary_search(init.stop_token_ids, result.token);
  if (is_stop) {
    result.finish = kernels::SlotFinish::kStop;
  } else if (slot.next_position + 1 == init.end_position) {
    result.finish = kernels::SlotFinish::kLength;
  }
  slot.is_finished = result.finish != kernels::SlotFinish::kRunning;
  slot.pending_token = result.token;
  ++slot.next_position;
  return result;
}

}  // namespace rollpack::rollout
