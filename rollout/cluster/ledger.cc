#include "rollout/cluster/ledger.h"

#include <algorithm>

namespace rollpack::rollout {

void Ledger::accept(GroupRequest request, std::string origin, Taken taken) {
  const GroupKey key{request.key.request_id, request.key.prompt_index};
  taken.is_done.resize(static_cast<size_t>(request.key.group_size));
  const auto num_left = static_cast<int32_t>(std::ranges::count(taken.is_done, false));
  Entry entry{.origin = std::move(origin),
              .must_finish = taken.must_finish,
              .num_left = num_left,
              .is_done = std::move(taken.is_done)};
  if (!entry.origin.empty()) live_prompt_ids_[request.key.prompt_id.text] = entry.origin;
  entry.request = std::move(request);
  num_open_samples_ += num_left;
  entry.precedence = longest_first_ ? open_tokens(entry) : 0;
  enqueue(key, entry);
  entries_.emplace(key, std::move(entry));
}

int64_t Ledger::open_tokens(const Entry& entry) {
  auto tokens = static_cast<int64_t>(entry.request.prompt_ids->size());
  for (size_t i = 0; i < entry.is_done.size(); ++i) {
    if (!entry.is_done[i]) tokens += entry.request.response_limit(static_cast<int32_t>(i));
  }
  return tokens;
}

GroupRequest Ledger::open_request(const Entry& entry) {
  GroupRequest request = entry.request;
  request.attempt = entry.attempt;
  if (entry.num_left == request.key.group_size) return request;
  for (size_t i = 0; i < entry.is_done.size(); ++i) {
    if (!entry.is_done[i]) request.sample_indices.push_back(static_cast<int32_t>(i));
  }
  return request;
}

void Ledger::enqueue(const GroupKey& key, const Entry& entry) {
  num_queued_samples_ += entry.num_left;
  if (entry.num_deaths >= kDeathsOfSuspect) {
    suspects_.insert(key);
  } else {
    queues_[entry.request.key.node].insert(queue_key(key, entry));
    ++num_in_queues_;
  }
}

// A group that is not queued stays as it is.
void Ledger::dequeue(const GroupKey& key, const Entry& entry) {
  size_t num_taken = suspects_.erase(key);
  const auto queue = queues_.find(entry.request.key.node);
  if (queue != queues_.end() && queue->second.erase(queue_key(key, entry)) > 0) {
    if (queue->second.empty()) queues_.erase(queue);
    --num_in_queues_;
    ++num_taken;
  }
  if (num_taken > 0) num_queued_samples_ -= entry.num_left;
}

std::optional<std::string> Ledger::live_origin(const std::string& prompt_id) const {
  const auto found = live_prompt_ids_.find(prompt_id);
  if (found == live_prompt_ids_.end()) return std::nullopt;
  return found->second;
}

std::optional<Ledger::GroupKey> Ledger::next(int32_t node) const {
  if (queues_.empty()) return std::nullopt;
  auto queue = queues_.find(node);
  if (queue == queues_.end()) {  // it helps others: as many as there are nodes
    queue = std::ranges::min_element(queues_, {},
                                     [](const auto& each) { return *each.second.begin(); });
  }
  const QueueKey& first = *queue->second.begin();
  return GroupKey{std::get<0>(first), std::get<2>(first)};
}

std::optional<Ledger::GroupKey> Ledger::next_suspect() const {
  if (suspects_.empty()) return std::nullopt;
  return *suspects_.begin();
}

GroupRequest Ledger::assign(const GroupKey& key, int32_t worker) {
  Entry& entry = entries_.at(key);
  dequeue(key, entry);
  entry.worker = worker;
  ++entry.attempt;
  return open_request(entry);
}

// end() where the result is late, of a fenced attempt, unknown or a second one.
Ledger::Entries::iterator Ledger::running(const bridge::SampleKey& key, int32_t worker,
                                          int32_t attempt) {
  const auto found = entries_.find({key.request_id, key.prompt_index});
  const bool counts = found != entries_.end() && found->second.worker == worker &&
                      found->second.attempt == attempt && key.sample_index >= 0 &&
                      key.sample_index < found->second.request.key.group_size &&
                      !found->second.is_done[key.sample_index] &&
                      !found->second.given_back.contains(key.sample_index);
  return counts ? found : entries_.end();
}

int64_t Ledger::settle(Entries::iterator found, int32_t sample_index) {
  Entry& entry = found->second;
  int64_t expected_tokens = entry.request.response_limit(sample_index);
  if (entry.num_left > static_cast<int32_t>(entry.given_back.size())) return expected_tokens;
  expected_tokens += static_cast<int64_t>(entry.request.prompt_ids->size());
  if (entry.num_left == 0) {
    erase(found);
  } else {
    entry.worker = -1;
    entry.given_back.clear();
    enqueue(found->first, entry);
  }
  return expected_tokens;
}

std::optional<int64_t> Ledger::commit(const bridge::SampleKey& key, int32_t worker,
                                      int32_t attempt) {
  const auto found = running(key, worker, attempt);
  if (found == entries_.end()) {
    ++num_dropped_;
    return std::nullopt;
  }
  found->second.is_done[key.sample_index] = true;
  --num_open_samples_;
  --found->second.num_left;
  return settle(found, key.sample_index);
}

std::optional<int64_t> Ledger::give_back(const bridge::SampleKey& key, int32_t worker,
                                         int32_t attempt) {
  const auto found = running(key, worker, attempt);
  if (found == entries_.end() || !found->second.must_finish) return std::nullopt;
  found->second.given_back.insert(key.sample_index);
  return settle(found, key.sample_index);
}

Ledger::Fenced Ledger::fence(int32_t worker, bool blames) {
  Fenced fenced;
  for (auto next = entries_.begin(); next != entries_.end();) {
    const auto it = next++;
    Entry& entry = it->second;
    if (entry.worker != worker) continue;
    entry.worker = -1;
    entry.given_back.clear();
    entry.num_deaths += blames ? 1 : 0;
    if (entry.is_aborted) {
      fenced.aborted.push_back(take(it));
    } else if (entry.num_deaths >= kDeathsOfCulprit) {
      fenced.culprits.push_back(take(it));
    } else {
      enqueue(it->first, entry);
      ++fenced.num_requeued;
    }
  }
  return fenced;
}

std::vector<GroupRequest> Ledger::abort(std::optional<int64_t> request_id) {
  std::vector<GroupRequest> taken;
  const auto first = request_id ? entries_.lower_bound({*request_id, 0}) : entries_.begin();
  for (auto next = first; next != entries_.end();) {
    const auto it = next++;
    if (request_id && it->first.first != *request_id) break;
    if (it->second.must_finish) continue;
    if (it->second.worker == -1) {
      taken.push_back(take(it));
    } else {
      it->second.is_aborted = true;
    }
  }
  return taken;
}

std::vector<GroupRequest> Ledger::take_suspects() {
  std::vector<GroupRequest> taken;
  while (!suspects_.empty()) taken.push_back(take(entries_.find(*suspects_.begin())));
  return taken;
}

GroupRequest Ledger::take(Entries::iterator entry) {
  dequeue(entry->first, entry->second);
  num_open_samples_ -= entry->second.num_left;
  GroupRequest request = open_request(entry->second);
  erase(entry);
  return request;
}

std::vector<int64_t> Ledger::open_requests(int32_t node) const {
  std::vector<int64_t> requests;
  for (const auto& [key, entry] : entries_) {
    if (entry.request.key.node != node) continue;
    if (requests.empty() || requests.back() != key.first) requests.push_back(key.first);
  }
  return requests;
}

int64_t Ledger::num_open_samples(int64_t request_id) const {
  int64_t count = 0;
  for (auto it = entries_.lower_bound({request_id, 0});
       it != entries_.end() && it->first.first == request_id; ++it) {
    count += it->second.num_left;
  }
  return count;
}

void Ledger::erase(Entries::iterator entry) {
  if (!entry->second.origin.empty()) {
    live_prompt_ids_.erase(entry->second.request.key.prompt_id.text);
  }
  entries_.erase(entry);
}

}  // namespace rollpack::rollout
