#include "rollout/journal/live_set.h"

#include <algorithm>
#include <limits>
#include <set>
#include <string>
#include <tuple>

#include <fmt/format.h>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

[[noreturn]] void contradict(const std::string& what) {
  throw Error({.code = ErrorCode::kDataLoss, .field = "journal record", .value = what});
}

// Lists and texts, and a little more than what numbers take: never less than what is written, or a
// journal would be rewritten without end.

size_t bytes_of(const ErrorInfo& error) {
  return 32 + error.field.size() + error.value.size() + error.origin.size() + error.allowed.size() +
         error.message.size();
}

int64_t bytes_of(const record::Group& group) {
  const AcceptedGroup& accepted = group.accepted;
  const GroupRequest& request = accepted.request;
  return static_cast<int64_t>(
      128 + 4 * (request.prompt_ids->size() + request.sampling.stop_token_ids.size()) +
      request.key.prompt_id.text.size() + accepted.origin.size() +
      (accepted.skipped ? bytes_of(*accepted.skipped) : 0));
}

int64_t bytes_of(const bridge::FormedBatch& batch) {
  size_t bytes = 128 + 4 * batch.row_starts.size() + 20 * batch.samples.size();
  for (const bridge::FailedSample& failed : batch.failed) {
    bytes += 32 + failed.key.prompt_id.text.size() + bytes_of(failed.error);
  }
  return static_cast<int64_t>(bytes);
}

bool are_rows_of(const bridge::FormedBatch& batch) {
  const std::vector<int32_t>& rows = batch.row_starts;
  if (batch.step == 0) return rows.empty() && batch.dp_rank == -1;
  return batch.dp_rank >= 0 && batch.dp_rank < batch.dp_size && !rows.empty() &&
         rows.front() == 0 && std::ranges::is_sorted(rows) &&
         rows.back() == static_cast<int32_t>(batch.samples.size());
}

}  // namespace

bool LiveSet::Group::is_formed() const {
  return std::ranges::any_of(states, [](SampleState s) { return s != SampleState::kOpen; });
}

void LiveSet::apply(Record record) {
  std::visit([this](auto& known) { apply_one(known); }, record);
}

void LiveSet::apply_one(record::Header&) {
  contradict("a second header");
}

void LiveSet::apply_one(record::Counters& counters) {
  counters_.num_requests = std::max(counters_.num_requests, counters.num_requests);
  counters_.last_batch_seq = std::max(counters_.last_batch_seq, counters.last_batch_seq);
  counters_.num_steps = std::max(counters_.num_steps, counters.num_steps);
  counters_.weight_version = counters.weight_version;
}

void LiveSet::apply_one(record::Accepted& accepted) {
  // The next request takes the number after it.
  if (accepted.request_id < 0 || accepted.request_id == std::numeric_limits<int64_t>::max())
    contradict(fmt::format("request {}", accepted.request_id));
  std::set<int32_t> seen;
  for (const record::Group& group : accepted.groups) {
    const bridge::SampleKey& key = group.accepted.request.key;
    const bool is_right = key.request_id == accepted.request_id && key.prompt_index >= 0 &&
                          key.group_size >= 1 && key.group_size <= kMaxGroupSize &&
                          seen.insert(key.prompt_index).second &&
                          !groups_.contains({key.request_id, key.prompt_index});
    if (!is_right)
      contradict(fmt::format("group {} of request {}", key.prompt_index, accepted.request_id));
    std::set<int32_t> released;
    for (const int32_t sample : group.released) {
      if (sample < 0 || sample >= key.group_size || !released.insert(sample).second) {
        contradict(fmt::format("sample {} of request {}", sample, accepted.request_id));
      }
    }
    if (released.size() == static_cast<size_t>(key.group_size))
      contradict("a group without samples");
  }
  for (record::Group& taken : accepted.groups) {
    const bridge::SampleKey& key = taken.accepted.request.key;
    Group group{.states = std::vector(static_cast<size_t>(key.group_size), SampleState::kOpen),
                .num_left = key.group_size - static_cast<int32_t>(taken.released.size()),
                .num_bytes = bytes_of(taken)};
    for (const int32_t sample : taken.released) {
      group.states[static_cast<size_t>(sample)] = SampleState::kReleased;
    }
    group.record = std::move(taken);
    group.record.released.clear();
    num_bytes_ += group.num_bytes;
    groups_.emplace(GroupKey{key.request_id, key.prompt_index}, std::move(group));
  }
  counters_.num_requests = std::max(counters_.num_requests, accepted.request_id + 1);
}

// What is in a batch already ends as that batch says.
void LiveSet::apply_one(record::Aborted& aborted) {
  const auto& id = aborted.request_id;
  const auto first = id ? groups_.lower_bound({*id, 0}) : groups_.begin();
  for (auto it = first; it != groups_.end() && (!id || it->first.first == *id); ++it) {
    if (!it->second.is_formed()) it->second.record.is_aborted = true;
  }
}

void LiveSet::check(const record::Formed& formed) const {
  std::set<uint64_t> batches;
  std::set<std::tuple<int64_t, int32_t, int32_t>> samples;
  int32_t node = 0;
  const auto is_open = [&](int64_t request, int32_t prompt, int32_t sample) {
    const auto found = groups_.find({request, prompt});
    return found != groups_.end() && found->second.node() == node && sample >= 0 &&
           sample < static_cast<int32_t>(found->second.states.size()) &&
           found->second.states[static_cast<size_t>(sample)] == SampleState::kOpen &&
           samples.insert({request, prompt, sample}).second;
  };
  for (const bridge::FormedBatch& batch : formed.batches) {
    node = record::node_of(batch.batch_seq);
    bool is_right = record::without_node(batch.batch_seq) > 0 &&
                    (batch.step == 0 || record::node_of(batch.step) == node) &&
                    !batches_.contains(batch.batch_seq) && batches.insert(batch.batch_seq).second &&
                    are_rows_of(batch);
    for (const bridge::FormedSample& s : batch.samples) {
      is_right =
          is_right && s.num_tokens >= -1 && is_open(s.request_id, s.prompt_index, s.sample_index);
    }
    for (const bridge::FailedSample& s : batch.failed) {
      is_right = is_right && is_open(s.key.request_id, s.key.prompt_index, s.key.sample_index);
    }
    if (!is_right) contradict(fmt::format("batch {}", batch.batch_seq));
  }
}

void LiveSet::apply_one(record::Formed& formed) {
  check(formed);
  for (bridge::FormedBatch& batch : formed.batches) form(std::move(batch));
}

void LiveSet::form(bridge::FormedBatch batch) {
  for (const bridge::FormedSample& sample : batch.samples) {
    Group& group = groups_.at({sample.request_id, sample.prompt_index});
    group.states[static_cast<size_t>(sample.sample_index)] = SampleState::kFormed;
    if (sample.num_tokens >= 0) group.cut_lengths[sample.sample_index] = sample.num_tokens;
  }
  for (const bridge::FailedSample& failed : batch.failed) {
    groups_.at({failed.key.request_id, failed.key.prompt_index})
        .states[static_cast<size_t>(failed.key.sample_index)] = SampleState::kFailed;
  }
  count(record::node_of(batch.batch_seq), record::without_node(batch.batch_seq),
        record::without_node(batch.step));
  const int64_t num_bytes = bytes_of(batch);
  num_bytes_ += num_bytes;
  const uint64_t batch_seq = batch.batch_seq;
  batches_.emplace(batch_seq, Batch{std::move(batch), num_bytes});
}

void LiveSet::apply_one(record::Released& released) {
  const auto found = batches_.find(released.batch_seq);
  if (found == batches_.end()) {
    contradict(fmt::format("a release of batch {}, which is not there", released.batch_seq));
  }
  num_bytes_ -= found->second.num_bytes;
  const bridge::FormedBatch batch = std::move(found->second.record);
  batches_.erase(found);
  for (const bridge::FormedSample& s : batch.samples) {
    release_sample(s.request_id, s.prompt_index, s.sample_index);
  }
  for (const bridge::FailedSample& s : batch.failed) {
    release_sample(s.key.request_id, s.key.prompt_index, s.key.sample_index);
  }
}

void LiveSet::release_sample(int64_t request_id, int32_t prompt_index, int32_t sample_index) {
  const auto found = groups_.find({request_id, prompt_index});
  Group& group = found->second;
  group.states[static_cast<size_t>(sample_index)] = SampleState::kReleased;
  group.cut_lengths.erase(sample_index);
  if (--group.num_left > 0) return;
  num_bytes_ -= group.num_bytes;
  groups_.erase(found);
}

void LiveSet::apply_one(record::Switched& switched) {
  counters_.weight_version = switched.weight_version;
}

void LiveSet::apply_one(record::NodeAccepted& accepted) {
  if (accepted.node < 1 || accepted.node > record::kMaxNode) {
    contradict(fmt::format("a request of node {}", accepted.node));
  }
  for (record::Group& group : accepted.accepted.groups) {
    group.accepted.request.key.node = accepted.node;
  }
  apply_one(accepted.accepted);
}

void LiveSet::apply_one(record::NodeCounters& counters) {
  if (counters.node < 1 || counters.node > record::kMaxNode) {
    contradict(fmt::format("counters of node {}", counters.node));
  }
  count(counters.node, counters.last_batch_seq, counters.num_steps);
}

void LiveSet::count(int32_t node, uint64_t batch_seq, uint64_t step) {
  if (node == 0) {
    counters_.last_batch_seq = std::max(counters_.last_batch_seq, batch_seq);
    counters_.num_steps = std::max(counters_.num_steps, step);
    return;
  }
  const auto [found, is_new] = node_counters_.try_emplace(node);
  if (is_new) num_bytes_ += 48;
  record::NodeCounters& counters = found->second;
  counters.node = node;
  counters.last_batch_seq = std::max(counters.last_batch_seq, batch_seq);
  counters.num_steps = std::max(counters.num_steps, step);
}

void LiveSet::skip_numbers(int64_t count) {
  counters_.last_batch_seq += static_cast<uint64_t>(count);
  counters_.num_steps += static_cast<uint64_t>(count);
  for (auto& [node, counters] : node_counters_) {
    counters.last_batch_seq += static_cast<uint64_t>(count);
    counters.num_steps += static_cast<uint64_t>(count);
  }
}

std::vector<Record> LiveSet::records() const {
  std::vector<Record> records{counters_};
  for (const auto& [node, counters] : node_counters_) records.emplace_back(counters);
  record::Accepted* accepted = nullptr;
  for (const auto& [key, group] : groups_) {
    if (accepted == nullptr || accepted->request_id != key.first) {
      if (group.node() == 0) {
        records.push_back(record::Accepted{.request_id = key.first});
        accepted = &std::get<record::Accepted>(records.back());
      } else {
        records.push_back(record::NodeAccepted{group.node(), {.request_id = key.first}});
        accepted = &std::get<record::NodeAccepted>(records.back()).accepted;
      }
    }
    record::Group& kept = accepted->groups.emplace_back(group.record);
    for (size_t i = 0; i < group.states.size(); ++i) {
      if (group.states[i] != SampleState::kReleased) continue;
      kept.released.push_back(static_cast<int32_t>(i));
    }
  }
  for (const auto& [batch_seq, batch] : batches_) {
    records.push_back(record::Formed{.batches = {batch.record}});
  }
  return records;
}

RestoredRequests LiveSet::requests() const {
  RestoredRequests restored{.num_requests = counters_.num_requests,
                            .weight_version = counters_.weight_version};
  for (const auto& [key, group] : groups_) {
    RestoredGroup& kept = restored.groups.emplace_back();
    kept.accepted = group.record.accepted;
    kept.is_formed = group.is_formed();
    kept.is_aborted = group.record.is_aborted && !kept.is_formed;
    kept.cut_lengths = group.cut_lengths;
    for (const SampleState state : group.states) {
      kept.is_done.push_back(state == SampleState::kFailed || state == SampleState::kReleased);
    }
  }
  return restored;
}

int32_t LiveSet::last_node() const {
  int32_t last = batches_.empty() ? 0 : record::node_of(batches_.rbegin()->first);
  for (const auto& [key, group] : groups_) last = std::max(last, group.node());
  return last;
}

bridge::RestoredDelivery LiveSet::delivery(int32_t node) const {
  bridge::RestoredDelivery restored{.last_batch_seq = counters_.last_batch_seq,
                                    .num_steps = counters_.num_steps};
  if (node > 0) {
    const auto found = node_counters_.find(node);
    const auto counters = found == node_counters_.end() ? record::NodeCounters{} : found->second;
    restored.last_batch_seq = counters.last_batch_seq;
    restored.num_steps = counters.num_steps;
  }
  for (auto it = batches_.lower_bound(record::at_node(node, 0));
       it != batches_.end() && record::node_of(it->first) == node; ++it) {
    bridge::FormedBatch& batch = restored.batches.emplace_back(it->second.record);
    batch.batch_seq = record::without_node(batch.batch_seq);
    batch.step = record::without_node(batch.step);
  }
  for (const auto& [key, group] : groups_) {
    if (group.is_formed() || group.node() != node) continue;
    if (restored.unformed.empty() || restored.unformed.back().request_id != key.first) {
      restored.unformed.push_back({.request_id = key.first});
    }
    restored.unformed.back().prompt_indices.push_back(key.second);
  }
  return restored;
}

}  // namespace rollpack::rollout
