#include "trainer_bridge/delivery/delivery.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <limits>

#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

// Failures travel in the reply's frame, some 500 bytes each, and a frame holds 16 MiB.
constexpr size_t kMaxFailedPerBatch = 4096;

std::vector<const Sample*> pointers_to(const std::vector<Sample>& samples) {
  std::vector<const Sample*> pointers;
  pointers.reserve(samples.size());
  for (const Sample& sample : samples) pointers.push_back(&sample);
  return pointers;
}

void fail_all(std::vector<Sample>& samples, const ErrorInfo& error,
              std::vector<FailedSample>& failed) {
  for (Sample& sample : samples) failed.push_back({std::move(sample.key), error});
  samples.clear();
}

// Moves samples that not even a batch of their own can hold to the failures.
void fail_impossible(Group& group, const BatchLayout& layout) {
  std::vector<Sample> possible;
  for (Sample& sample : group.samples) {
    const Sample* const alone[] = {&sample};
    try {
      layout.batch_bytes(alone);
      possible.push_back(std::move(sample));
    } catch (const Error& error) {
      group.failed.push_back({std::move(sample.key), error.info});
    }
  }
  group.samples = std::move(possible);
}

int64_t oldest_version(const Sample& sample, int64_t current) {
  for (const VersionSpan& span : sample.weight_versions) current = std::min(current, span.version);
  return current;
}

ErrorInfo too_big(const std::vector<Sample>& group, int64_t bytes, int64_t slot_bytes) {
  const SampleKey& key = group.front().key;
  return {.code = ErrorCode::kResourceExhausted,
          .field = "bridge.slot_bytes",
          .value = std::to_string(slot_bytes),
          .origin = fmt::format("request {}, prompt {}", key.request_id, key.prompt_index),
          .allowed =
              fmt::format("at least {}, the bytes of this group's {} samples", bytes, group.size()),
          .message = "a group is never split: raise bridge.slot_bytes or lower n or the lengths"};
}

FormedSample name_of(const Sample& sample) {
  const bool is_partial = sample.finish_reason == FinishReason::kAbort;
  return {.request_id = sample.key.request_id,
          .prompt_index = sample.key.prompt_index,
          .sample_index = sample.key.sample_index,
          .num_tokens = is_partial ? static_cast<int32_t>(sample.response_ids.size()) : -1};
}

FormedBatch record_of(uint64_t batch_seq, const std::vector<Sample>& samples,
                      const std::vector<FailedSample>& failed) {
  FormedBatch record{.batch_seq = batch_seq, .needs_slot = !samples.empty(), .failed = failed};
  record.samples.reserve(samples.size());
  for (const Sample& sample : samples) record.samples.push_back(name_of(sample));
  return record;
}

}  // namespace

void Delivery::restore(DeliveryLog& log, RestoredDelivery restored) {
  log_ = &log;
  last_batch_seq_ = restored.last_batch_seq;
  DpMember split;
  for (FormedBatch& batch : restored.batches) {
    if (batch.step > 0) {
      split = {.size = batch.dp_size, .keeps_groups_whole = batch.keeps_groups_whole};
    }
    restored_.add(std::move(batch));
  }
  ranks_.restore(split, restored.num_steps);
  for (const UnformedGroups& groups : restored.unformed) {
    for (const int32_t prompt : groups.prompt_indices) {
      groups_.expect_group(groups.request_id, prompt);
    }
  }
}

void Delivery::commit(Sample sample) {
  if (restored_.take(sample)) return;
  if (groups_.add(std::move(sample))) check_last_finished();
}

void Delivery::fail(FailedSample sample) {
  if (restored_.take(sample)) return;
  if (groups_.add(std::move(sample))) check_last_finished();
}

// Every finished group fits a slot by itself from here on.
void Delivery::check_last_finished() {
  Group& group = groups_.last_finished();
  if (group.samples.empty()) return;
  int64_t bytes = 0;
  try {
    bytes = layout_.batch_bytes(pointers_to(group.samples));
  } catch (const Error&) {
    fail_impossible(group, layout_);
    if (group.samples.empty()) return;
    try {
      bytes = layout_.batch_bytes(pointers_to(group.samples));
    } catch (const Error& error) {  // each for itself is possible, all together are not
      fail_all(group.samples, error.info, group.failed);
      return;
    }
  }
  if (bytes <= slots_.slot_bytes()) return;
  fail_all(group.samples, too_big(group.samples, bytes, slots_.slot_bytes()), group.failed);
}

void Delivery::fail_stale(Group& group) {
  if (options_.max_version_lag < 0) return;
  const int64_t current = options_.weight_version();
  const int64_t oldest_allowed = current - options_.max_version_lag;
  const auto is_fresh = [&](const Sample& s) {
    return oldest_version(s, current) >= oldest_allowed;
  };
  const auto first_stale =
      std::stable_partition(group.samples.begin(), group.samples.end(), is_fresh);
  for (auto sample = first_stale; sample != group.samples.end(); ++sample) {
    ++num_stale_samples_;
    group.failed.push_back(
        {std::move(sample->key),
         {.code = ErrorCode::kFailedPrecondition,
          .field = "weight_version",
          .value = std::to_string(oldest_version(*sample, current)),
          .origin = "bridge.max_version_lag",
          .allowed = fmt::format("{} or later, {} behind the current {}", oldest_allowed,
                                 options_.max_version_lag, current),
          .message = "the sample is too stale to train on"}});
  }
  group.samples.erase(first_stale, group.samples.end());
}

bool Delivery::fits(const std::vector<Group*>& groups, const DpMember* member) const {
  std::vector<const Sample*> samples;
  size_t num_failed = 0;
  for (const Group* group : groups) {
    for (const Sample& sample : group->samples) samples.push_back(&sample);
    num_failed += group->failed.size();
  }
  if (num_failed > kMaxFailedPerBatch) return false;
  if (samples.empty()) return true;
  try {
    if (member == nullptr) return layout_.batch_bytes(samples) <= slots_.slot_bytes();
    const std::vector<SharePlan> shares = plan_shares(groups, *member, layout_.max_tokens_per_row(),
                                                      options_.attention_parity_tokens);
    return std::all_of(shares.begin(), shares.end(), [&](const SharePlan& share) {
      return layout_.batch_bytes(share.samples, share.row_starts) <= slots_.slot_bytes();
    });
  } catch (const Error&) {
    return false;  // e.g. offsets beyond i32: too many for one batch
  }
}

// Doubles, then bisects: a measurement looks at every sample, so one a group would be quadratic.
int64_t Delivery::num_fitting(const std::vector<Group*>& groups, const DpMember* member) const {
  const auto first = [&](int64_t n) { return std::vector(groups.begin(), groups.begin() + n); };
  const auto limit = static_cast<int64_t>(groups.size());
  int64_t fitting = 1, refused = limit + 1;
  while (fitting < limit) {
    const int64_t next = std::min(2 * fitting, limit);
    if (!fits(first(next), member)) {
      refused = next;
      break;
    }
    fitting = next;
  }
  while (refused - fitting > 1 && fitting < limit) {
    const int64_t middle = fitting + (refused - fitting) / 2;
    (fits(first(middle), member) ? fitting : refused) = middle;
  }
  return fitting;
}

bool Delivery::may_have(uint64_t client, std::optional<int32_t> dp_rank) const {
  return dp_rank ? ranks_.may_have(client, *dp_rank) : ranks_.member(client) == nullptr;
}

const RestoredBatches::Batch* Delivery::first_restored(uint64_t client) const {
  return restored_.first([&](const FormedBatch& batch) {
    return may_have(client, batch.step > 0 ? std::optional(batch.dp_rank) : std::nullopt);
  });
}

// Under other weights than before, samples may have grown: what fits no slot any more has to fail,
// as a batch that a client may have seen cannot be split.
std::optional<BatchNotice> Delivery::deliver_restored(uint64_t client,
                                                      const RestoredBatches::Batch& whole) {
  std::optional<SlotLease> lease;
  if (whole.record.needs_slot && !(lease = slots_.acquire())) return std::nullopt;
  RestoredBatches::Batch batch = restored_.pop(whole.record.batch_seq);
  const bool is_share = batch.record.step > 0;
  BatchNotice notice{.batch_seq = batch.record.batch_seq,
                     .num_groups = batch.record.num_groups,
                     .num_complete_groups = batch.record.num_complete_groups,
                     .step = batch.record.step,
                     .failed = std::move(batch.record.failed)};
  if (is_share) notice.dp_rank = batch.record.dp_rank;
  std::vector<int32_t>& row_starts = batch.record.row_starts;
  if (!batch.samples.empty()) {
    int64_t bytes = 0;
    try {
      bytes = layout_.batch_bytes(pointers_to(batch.samples), row_starts);
    } catch (const Error& error) {
      fail_all(batch.samples, error.info, notice.failed);
    }
    if (bytes > slots_.slot_bytes()) {
      const ErrorInfo error = too_big(batch.samples, bytes, slots_.slot_bytes());
      fail_all(batch.samples, error, notice.failed);
    }
    if (batch.samples.empty()) std::fill(row_starts.begin(), row_starts.end(), 0);
  }
  if (lease && batch.samples.empty() && !is_share) {
    slots_.cancel(*lease);
    lease.reset();
  }
  ++num_redelivered_;
  return send(client, std::move(notice), std::move(batch.samples), lease, row_starts);
}

std::optional<BatchNotice> Delivery::next_share(uint64_t client) {
  const Share* next = ranks_.next_share(client);
  if (next == nullptr) return std::nullopt;
  std::optional<SlotLease> lease;
  if (next->needs_slot && !(lease = slots_.acquire())) return std::nullopt;
  Share share = ranks_.pop(*next);
  BatchNotice notice;
  notice.num_groups = share.num_groups;
  notice.num_complete_groups = share.num_complete_groups;
  notice.batch_seq = share.batch_seq;
  notice.step = share.step;
  notice.dp_rank = share.rank;
  notice.failed = std::move(share.failed);
  return send(client, std::move(notice), std::move(share.samples), lease, share.row_starts);
}

std::optional<BatchNotice> Delivery::pending(uint64_t client) {
  const auto left = std::find_if(left_behind_.begin(), left_behind_.end(), [&](const auto& each) {
    return may_have(client, each.second.dp_rank);
  });
  const RestoredBatches::Batch* restored = first_restored(client);
  if (restored != nullptr &&
      (left == left_behind_.end() || restored->record.batch_seq < left->first)) {
    if (restored->num_missing > 0) return std::nullopt;
    return deliver_restored(client, *restored);
  }
  if (left == left_behind_.end()) return next_share(client);
  BatchNotice notice = std::move(left_behind_.extract(left).mapped());
  if (notice.lease) slots_.deliver(*notice.lease, client);
  hold(client, notice);
  ++num_redelivered_;
  return notice;
}

void Delivery::hold(uint64_t client, const BatchNotice& notice) {
  if (notice.lease) {
    delivered_[notice.lease->slot] = notice;
  } else {
    slotless_[notice.batch_seq] = {client, notice};
  }
}

std::optional<BatchNotice> Delivery::next_batch(uint64_t client, const BatchWish& wish) {
  if (auto notice = pending(client)) return notice;
  const DpMember* member = ranks_.member(client);
  // It has to be made anew first, or no slot is free for it.
  if (first_restored(client) != nullptr) return std::nullopt;
  if (ranks_.next_share(client) != nullptr) return std::nullopt;  // no slot is free for it
  const int64_t most = wish.num_groups.value_or(std::numeric_limits<int64_t>::max());
  const std::vector<Group*> ready = groups_.ready(wish.order, most);
  const int64_t least = wish.min_ready.value_or(wish.num_groups.value_or(1));
  if (static_cast<int64_t>(ready.size()) < least) return std::nullopt;
  for (Group* group : ready) fail_stale(*group);
  const int64_t take = num_fitting(ready, member);
  if (member != nullptr) {
    put_step(*member, groups_.take(wish.order, take));
    return next_share(client);
  }
  const bool has_samples = std::any_of(ready.begin(), ready.begin() + take,
                                       [](const Group* group) { return !group->samples.empty(); });
  std::optional<SlotLease> lease;
  if (has_samples && !(lease = slots_.acquire())) return std::nullopt;
  BatchNotice notice;
  notice.num_groups = take;
  std::vector<Sample> samples;
  for (Group& group : groups_.take(wish.order, take)) {
    notice.num_complete_groups += group.is_complete() ? 1 : 0;
    std::move(group.samples.begin(), group.samples.end(), std::back_inserter(samples));
    std::move(group.failed.begin(), group.failed.end(), std::back_inserter(notice.failed));
  }
  return send(client, std::move(notice), std::move(samples), lease, {});
}

// All shares of a step are written down at once: half a step could not be made whole again.
void Delivery::put_step(const DpMember& member, std::vector<Group> groups) {
  const std::vector<Share*> shares = ranks_.put_step(
      std::move(groups), member, layout_.max_tokens_per_row(), options_.attention_parity_tokens);
  if (log_ == nullptr) return;
  std::vector<FormedBatch> records;
  for (Share* share : shares) {
    share->batch_seq = ++last_batch_seq_;
    FormedBatch& record =
        records.emplace_back(record_of(share->batch_seq, share->samples, share->failed));
    record.num_groups = share->num_groups;
    record.num_complete_groups = share->num_complete_groups;
    record.step = share->step;
    record.dp_rank = share->rank;
    record.dp_size = member.size;
    record.keeps_groups_whole = member.keeps_groups_whole;
    record.needs_slot = share->needs_slot;
    record.row_starts = share->row_starts;
  }
  log_->formed(std::move(records));
}

// A layout that refuses now what it measured before is a bug; its samples are reported all the
// same, so that their request ends.
BatchNotice Delivery::send(uint64_t client, BatchNotice notice, std::vector<Sample> samples,
                           std::optional<SlotLease> lease, std::span<const int32_t> row_starts) {
  const bool is_new = notice.batch_seq == 0;
  if (is_new && (lease || log_ != nullptr)) notice.batch_seq = last_batch_seq_ + 1;
  if (lease) {
    try {
      notice.bytes = layout_.write(pointers_to(samples), notice.batch_seq, lease->generation,
                                   slots_.bytes(*lease), notice.crc32, row_starts);
    } catch (const Error& error) {
      slots_.cancel(*lease);
      lease.reset();
      fail_all(samples, error.info, notice.failed);
      if (log_ == nullptr) notice.batch_seq = 0;
    }
  }
  if (is_new && notice.batch_seq > 0) {
    last_batch_seq_ = notice.batch_seq;
    if (log_ != nullptr) {
      FormedBatch record = record_of(notice.batch_seq, samples, notice.failed);
      record.num_groups = notice.num_groups;
      record.num_complete_groups = notice.num_complete_groups;
      log_->formed({std::move(record)});
    }
  }
  if (notice.batch_seq == 0) return notice;
  const int64_t current = options_.weight_version();
  for (const Sample& sample : samples) {
    notice.version_lag = std::max(notice.version_lag, current - oldest_version(sample, current));
  }
  notice.lease = lease;
  notice.num_samples = static_cast<int64_t>(samples.size());
  hold(client, notice);
  if (!lease) return notice;
  slots_.deliver(*lease, client);
  count_delivered(notice, samples);
  return notice;
}

void Delivery::count_delivered(const BatchNotice& notice, const std::vector<Sample>& samples) {
  ++num_delivered_;
  num_samples_delivered_ += notice.num_samples;
  last_version_lag_ = notice.version_lag;
  int64_t num_tokens = 0;
  size_t longest_prompt = 0, longest_response = 0;
  for (const Sample& sample : samples) {
    longest_prompt = std::max(longest_prompt, sample.prompt_ids->size());
    longest_response = std::max(longest_response, sample.response_ids.size());
    num_tokens += static_cast<int64_t>(sample.prompt_ids->size() + sample.response_ids.size());
  }
  const int64_t num_places = layout_.num_places(pointers_to(samples));
  const auto padded = static_cast<int64_t>(samples.size() * (longest_prompt + longest_response));
  num_tokens_delivered_ += num_tokens;
  num_pads_delivered_ += num_places - num_tokens;
  num_pads_avoided_ += std::max<int64_t>(padded - num_places, 0);
}

void Delivery::join(uint64_t client, const DpMember& member) {
  const auto is_share = [](const auto& entry) { return entry.second.dp_rank.has_value(); };
  const auto is_slotless_share = [](const auto& entry) {
    return entry.second.second.dp_rank.has_value();
  };
  ranks_.join(client, member,
              std::count_if(delivered_.begin(), delivered_.end(), is_share) +
                  std::count_if(left_behind_.begin(), left_behind_.end(), is_share) +
                  std::count_if(slotless_.begin(), slotless_.end(), is_slotless_share) +
                  restored_.num_shares());
}

void Delivery::release(uint64_t client, std::optional<SlotLease> given, uint64_t batch_seq) {
  if (!given) {
    const auto found = slotless_.find(batch_seq);
    if (found == slotless_.end() || found->second.first != client) {
      throw Error({.code = ErrorCode::kNotFound,
                   .field = "batch_seq",
                   .value = std::to_string(batch_seq),
                   .origin = "release",
                   .allowed = "a batch without a slot that this client has"});
    }
    slotless_.erase(found);
    if (log_ != nullptr) log_->released(batch_seq);
    return;
  }
  const SlotLease lease = *given;
  const auto found = delivered_.find(lease.slot);
  if (found != delivered_.end() && *found->second.lease == lease &&
      found->second.batch_seq != batch_seq) {
    throw Error(
        {.code = ErrorCode::kFailedPrecondition,
         .field = "batch_seq",
         .value = std::to_string(batch_seq),
         .origin = "release",
         .allowed = fmt::format("{}, which slot {} holds", found->second.batch_seq, lease.slot)});
  }
  slots_.release(lease, client);
  delivered_.erase(lease.slot);
  if (log_ != nullptr) log_->released(batch_seq);
}

void Delivery::client_gone(uint64_t client, GoneClient memory) {
  ranks_.leave(client);
  for (auto next = slotless_.begin(); next != slotless_.end();) {
    const auto it = next++;
    if (it->second.first != client) continue;
    left_behind_.emplace(it->first, std::move(it->second.second));
    slotless_.erase(it);
  }
  for (const SlotLease& lease : slots_.recall_all(client)) {
    BatchNotice notice = std::move(delivered_.extract(lease.slot).mapped());
    const uint64_t batch_seq = notice.batch_seq;
    left_behind_.emplace(batch_seq, std::move(notice));
    if (memory == GoneClient::kKeepMemory) continue;
    try {
      slots_.replace(lease.slot);
    } catch (const Error&) {
      // No memory for a second segment: the batch itself is safe where it is.
    }
  }
}

std::vector<std::pair<std::string, double>> Delivery::stats() const {
  const auto number = [](auto value) { return static_cast<double>(value); };
  return {{"num_slots", number(slots_.num_slots())},
          {"num_slots_in_use", number(slots_.num_slots() - slots_.num_free())},
          {"num_batches_delivered", number(num_delivered_)},
          {"num_batches_redelivered", number(num_redelivered_)},
          {"num_batches_left_behind", number(left_behind_.size())},
          {"num_batches_to_restore", number(restored_.num_batches())},
          {"num_samples_delivered", number(num_samples_delivered_)},
          {"num_samples_held", number(num_held_samples())},
          {"num_stale_samples", number(num_stale_samples_)},
          {"num_tokens_delivered", number(num_tokens_delivered_)},
          {"num_pads_delivered", number(num_pads_delivered_)},
          {"num_pads_avoided", number(num_pads_avoided_)},
          {"batch_version_lag", number(last_version_lag_)},
          {"num_dp_steps", number(ranks_.num_steps())},
          {"num_dp_shares_waiting", number(ranks_.num_shares())},
          {"num_duplicate_samples", number(groups_.num_duplicates())},
          {"num_open_groups", number(groups_.num_open_groups())},
          {"num_finished_groups", number(groups_.num_finished_groups())}};
}

}  // namespace rollpack::bridge
