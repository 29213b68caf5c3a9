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

GroupQueue::OpenGroup* GroupQueue::claim(const SampleKey& key) {
  if (key.group_size < 1 || key.sample_index < 0 || key.sample_index >= key.group_size) {
    fail_invariant(fmt::format("sample {} of a group of {} (request {}, prompt {})",
                               key.sample_index, key.group_size, key.request_id, key.prompt_index));
  }
  const auto [found, is_new] = open_.try_emplace({key.request_id, key.prompt_index});
  OpenGroup& open = found->second;
  if (is_new) {
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
  finished_.push_back(std::move(open.group));
  open_.erase({key.request_id, key.prompt_index});
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

Group GroupQueue::pop() {
  Group group = std::move(finished_.front());
  finished_.pop_front();
  num_held_samples_ -= static_cast<int64_t>(group.samples.size() + group.failed.size());
  return group;
}

}  // namespace rollpack::bridge
