#include "trainer_bridge/delivery/dp_ranks.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "kernels/base/error.h"
#include "trainer_bridge/packing/dp_plan.h"

namespace rollpack::bridge {
namespace {

bool is_same_split(const DpMember& a, const DpMember& b) {
  return a.size == b.size && a.keeps_groups_whole == b.keeps_groups_whole;
}

std::string split_text(const DpMember& member) {
  return fmt::format("dp_size {}{}", member.size,
                     member.keeps_groups_whole ? " with whole_groups" : "");
}

int64_t num_samples(const Share& share) {
  return static_cast<int64_t>(share.samples.size() + share.failed.size());
}

std::pair<int64_t, int32_t> group_of(const SampleKey& key) {
  return {key.request_id, key.prompt_index};
}

}  // namespace

std::vector<SharePlan> plan_shares(const std::vector<Group*>& groups, const DpMember& member,
                                   int64_t max_tokens_per_row, int64_t parity_tokens) {
  std::vector<Sample*> samples;
  std::vector<int64_t> lengths, numbers;
  for (size_t g = 0; g < groups.size(); ++g) {
    for (Sample& sample : groups[g]->samples) {
      samples.push_back(&sample);
      lengths.push_back(
          static_cast<int64_t>(sample.prompt_ids->size() + sample.response_ids.size()));
      numbers.push_back(static_cast<int64_t>(g));
    }
  }
  std::vector<SharePlan> shares;
  for (const RankRows& rows : plan_ranks(lengths, numbers,
                                         {.dp_size = member.size,
                                         .max_tokens_per_row = max_tokens_per_row,
                                         .parity_tokens = parity_tokens,
                                         .keeps_groups_whole = member.keeps_groups_whole})) {
    SharePlan& share = shares.emplace_back();
    share.row_starts.push_back(0);
    for (const std::vector<int32_t>& row : rows) {
      for (const int32_t s : row) share.samples.push_back(samples[s]);
      share.row_starts.push_back(static_cast<int32_t>(share.samples.size()));
    }
  }
  return shares;
}

void DpRanks::join(uint64_t client, const DpMember& member, int64_t num_held) {
  const int64_t num_unacknowledged = num_held + num_shares();
  if (!is_same_split(member, split_) && (!members_.empty() || num_unacknowledged > 0)) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "dp_size",
                 .value = split_text(member),
                 .origin = "hello",
                 .allowed = split_text(split_),
                 .message = members_.empty()
                                ? fmt::format("{} batches split so are not acknowledged: take them "
                                              "with such ranks, or without dp_rank",
                                              num_unacknowledged)
                                : fmt::format("{} clients are ranks of it", members_.size())});
  }
  split_ = member;
  members_[client] = member;
}

const DpMember* DpRanks::member(uint64_t client) const {
  const auto found = members_.find(client);
  return found == members_.end() ? nullptr : &found->second;
}

bool DpRanks::may_have(uint64_t client, int32_t rank) const {
  const DpMember* self = member(client);
  return self ? self->rank == rank : members_.empty();
}

const Share* DpRanks::next_share(uint64_t client) const {
  const Share* oldest = nullptr;
  for (const auto& [rank, queue] : shares_) {
    if (queue.empty() || !may_have(client, rank)) continue;
    if (!oldest || queue.front().step < oldest->step) oldest = &queue.front();
  }
  return oldest;
}

Share DpRanks::pop(const Share& share) {
  std::deque<Share>& queue = shares_.at(share.rank);
  Share taken = std::move(queue.front());
  queue.pop_front();
  num_held_samples_ -= num_samples(taken);
  return taken;
}

std::vector<Share*> DpRanks::put_step(std::vector<Group> groups, const DpMember& member,
                                      int64_t max_tokens_per_row, int64_t parity_tokens) {
  std::vector<Group*> pointers;
  for (Group& group : groups) pointers.push_back(&group);
  const std::vector<SharePlan> plans =
      plan_shares(pointers, member, max_tokens_per_row, parity_tokens);
  const auto num_complete =
      std::count_if(groups.begin(), groups.end(), [](const Group& g) { return g.is_complete(); });
  const bool needs_slot =
      std::any_of(groups.begin(), groups.end(), [](const Group& g) { return !g.samples.empty(); });
  ++num_steps_;
  std::vector<Share> shares;
  // By request and prompt: the least sample_index there is, and its rank.
  std::map<std::pair<int64_t, int32_t>, std::pair<int32_t, size_t>> first_of_group;
  for (size_t r = 0; r < plans.size(); ++r) {
    Share& share = shares.emplace_back();
    share.step = num_steps_;
    share.rank = static_cast<int32_t>(r);
    share.row_starts = plans[r].row_starts;
    share.num_groups = static_cast<int64_t>(groups.size());
    share.num_complete_groups = num_complete;
    share.needs_slot = needs_slot;
    for (Sample* sample : plans[r].samples) {
      share.samples.push_back(std::move(*sample));
      const SampleKey& key = share.samples.back().key;
      const std::pair place = {key.sample_index, r};
      const auto [first, is_new] = first_of_group.try_emplace(group_of(key), place);
      if (!is_new) first->second = std::min(first->second, place);
    }
  }
  for (Group& group : groups) {
    for (FailedSample& failure : group.failed) {
      const auto found = first_of_group.find(group_of(failure.key));
      const size_t rank = found == first_of_group.end() ? 0 : found->second.second;
      shares[rank].failed.push_back(std::move(failure));
    }
  }
  std::vector<Share*> put;
  for (Share& share : shares) {
    num_held_samples_ += num_samples(share);
    std::deque<Share>& queue = shares_[share.rank];
    queue.push_back(std::move(share));
    put.push_back(&queue.back());
  }
  return put;
}

void DpRanks::restore(const DpMember& split, uint64_t num_steps) {
  split_ = split;
  num_steps_ = num_steps;
}

int64_t DpRanks::num_shares() const {
  int64_t num = 0;
  for (const auto& [rank, queue] : shares_) num += static_cast<int64_t>(queue.size());
  return num;
}

}  // namespace rollpack::bridge
