#include "trainer_bridge/delivery/group_queue.h"

#include <fmt/format.h>

#include <algorithm>

#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

template <class T>
void sort_by_index(std::vector<T>& samples) {
  std::sort(samples.begin(), samples.end(),
            [](const T& a, const T& b) { return a.key.sample_index < b.key.sample_index; });
}

}  // namespace

bool Group::is_complete() const {
  return failed.empty() && std::none_of(samples.begin(), samples.end(), [](const Sample& sample) {
           return sample.finish_reason == FinishReason::kAbort;
         });
}

void GroupQueue::expect(int64_t request_id, int64_t num_prompts) {
  for (int64_t p = 0; p < num_prompts; ++p) {
    untaken_.emplace(request_id, static_cast<int32_t>(p));
  }
}

GroupQueue::OpenGroup* GroupQueue::claim(const SampleKey& key) {
  if (key.group_size < 1 || key.sample_index < 0 || key.sample_index >= key.group_size) {
    fail_invariant(fmt::format("sample {} of a group of {} (request {}, prompt {})",
                               key.sample_index, key.group_size, key.request_id, key.prompt_index));
  }
  if (finished_.contains({key.request_id, key.prompt_index})) {
    ++num_duplicates_;
    return nullptr;
  }
  const auto [found, is_new] = open_.try_emplace({key.request_id, key.prompt_index});
  OpenGroup& open = found->second;
  if (is_new) {
    untaken_.emplace(key.request_id, key.prompt_index);
    open.has_sample.resize(static_cast<size_t>(key.group_size));
    open.num_missing = key.group_size;
  }
  if (open.has_sample.size() != static_cast<size_t>(key.group_size)) {
    fail_invariant(fmt::format("request {}, prompt {} has groups of {} and of {}", key.request_id,
                               key.prompt_index, open.has_sample.size(), key.group_size));
  }
  if (open.has_sample[static_cast<size_t>(key.sample_index)]) {
    ++num_duplicates_;
    return nullptr;
  }
  open.has_sample[static_cast<size_t>(key.sample_index)] = true;
  --open.num_missing;
  ++num_held_samples_;
  return &open;
}

bool GroupQueue::close_if_whole(const SampleKey& key, OpenGroup& open) {
  if (open.num_missing > 0) return false;
  sort_by_index(open.group.samples);
  sort_by_index(open.group.failed);
  const Key group_key = {key.request_id, key.prompt_index};
  const uint64_t number = ++num_closed_;
  by_finish_[number] = group_key;
  finished_[group_key] = {std::move(open.group), number};
  open_.erase(group_key);
  return true;
}

bool GroupQueue::add(Sample sample) {
  const SampleKey key = sample.key;
  OpenGroup* open = claim(key);
  if (open == nullptr) return false;
  open->group.samples.push_back(std::move(sample));
  return close_if_whole(key, *open);
}

bool GroupQueue::add(FailedSample sample) {
  const SampleKey key = sample.key;
  OpenGroup* open = claim(key);
  if (open == nullptr) return false;
  open->group.failed.push_back(std::move(sample));
  return close_if_whole(key, *open);
}

Group& GroupQueue::last_finished() {
  return finished_.at(by_finish_.rbegin()->second).group;
}

std::vector<GroupQueue::Key> GroupQueue::ready_keys(GroupOrder order, int64_t limit) const {
  std::vector<Key> keys;
  const auto is_full = [&] { return static_cast<int64_t>(keys.size()) >= limit; };
  if (order == GroupOrder::kCompletion) {
    for (auto each = by_finish_.begin(); each != by_finish_.end() && !is_full(); ++each) {
      keys.push_back(each->second);
    }
    return keys;
  }
  for (auto each = untaken_.begin(); each != untaken_.end() && !is_full(); ++each) {
    if (!finished_.contains(*each)) break;
    keys.push_back(*each);
  }
  return keys;
}

std::vector<Group*> GroupQueue::ready(GroupOrder order, int64_t limit) {
  std::vector<Group*> groups;
  for (const Key& key : ready_keys(order, limit)) groups.push_back(&finished_.at(key).group);
  return groups;
}

std::vector<Group> GroupQueue::take(GroupOrder order, int64_t num_groups) {
  std::vector<Group> groups;
  for (const Key& key : ready_keys(order, num_groups)) {
    FinishedGroup taken = std::move(finished_.extract(key).mapped());
    by_finish_.erase(taken.finish_number);
    untaken_.erase(key);
    num_held_samples_ -=
        static_cast<int64_t>(taken.group.samples.size() + taken.group.failed.size());
    groups.push_back(std::move(taken.group));
  }
  return groups;
}

}  // namespace rollpack::bridge
