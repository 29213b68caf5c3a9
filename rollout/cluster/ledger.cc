#include "rollout/cluster/ledger.h"

namespace rollpack::rollout {

void Ledger::accept(GroupRequest request, std::string origin) {
  const GroupKey key{request.key.request_id, request.key.prompt_index};
  const int32_t size = request.key.group_size;
  Entry entry{.origin = std::move(origin), .num_left = size, .is_done = std::vector<bool>(size)};
  entry.expected_tokens = static_cast<int64_t>(request.prompt_ids->size());
  for (int32_t i = 0; i < size; ++i) entry.expected_tokens += request.response_limit(i);
  if (!entry.origin.empty()) live_prompt_ids_[request.key.prompt_id.text] = entry.origin;
  entry.request = std::move(request);
  num_open_samples_ += size;
  entry.precedence = longest_first_ ? entry.expected_tokens : 0;
  queue_.insert(queue_key(key, entry));
  entries_.emplace(key, std::move(entry));
}

std::optional<std::string> Ledger::live_origin(const std::string& prompt_id) const {
  const auto found = live_prompt_ids_.find(prompt_id);
  if (found == live_prompt_ids_.end()) return std::nullopt;
  return found->second;
}

std::optional<Ledger::GroupKey> Ledger::next() const {
  if (queue_.empty()) return std::nullopt;
  return GroupKey{std::get<0>(*queue_.begin()), std::get<2>(*queue_.begin())};
}

GroupRequest Ledger::assign(const GroupKey& key, int32_t worker) {
  Entry& entry = entries_.at(key);
  queue_.erase(queue_key(key, entry));
  entry.worker = worker;
  return entry.request;
}

std::optional<int64_t> Ledger::commit(const bridge::SampleKey& key, int32_t worker) {
  const auto found = entries_.find({key.request_id, key.prompt_index});
  const bool counts = found != entries_.end() && found->second.worker == worker &&
                      key.sample_index >= 0 &&
                      key.sample_index < found->second.request.key.group_size &&
                      !found->second.is_done[key.sample_index];
  if (!counts) {
    ++num_dropped_;
    return std::nullopt;
  }
  Entry& entry = found->second;
  entry.is_done[key.sample_index] = true;
  --num_open_samples_;
  int64_t expected_tokens = entry.request.response_limit(key.sample_index);
  if (--entry.num_left == 0) {
    expected_tokens += static_cast<int64_t>(entry.request.prompt_ids->size());
    erase(found);
  }
  return expected_tokens;
}

std::vector<GroupRequest> Ledger::take_queued(std::optional<int64_t> request_id) {
  std::vector<GroupRequest> taken;
  for (auto it = queue_.begin(); it != queue_.end();) {
    const GroupKey key{std::get<0>(*it), std::get<2>(*it)};
    if (request_id && key.first != *request_id) {
      ++it;
      continue;
    }
    it = queue_.erase(it);
    const auto entry = entries_.find(key);
    num_open_samples_ -= entry->second.num_left;
    taken.push_back(std::move(entry->second.request));
    if (!entry->second.origin.empty()) live_prompt_ids_.erase(taken.back().key.prompt_id.text);
    entries_.erase(entry);
  }
  return taken;
}

int64_t Ledger::num_open_samples(int64_t request_id) const {
  int64_t count = 0;
  for (auto it = entries_.lower_bound({request_id, 0});
       it != entries_.end() && it->first.first == request_id; ++it) {
    count += it->second.num_left;
  }
  return count;
}

void Ledger::erase(std::map<GroupKey, Entry>::iterator entry) {
  if (!entry->second.origin.empty()) {
    live_prompt_ids_.erase(entry->second.request.key.prompt_id.text);
  }
  entries_.erase(entry);
}

}  // namespace rollpack::rollout
