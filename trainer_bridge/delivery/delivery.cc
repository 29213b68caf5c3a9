#include "trainer_bridge/delivery/delivery.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

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

ErrorInfo too_big(const Group& group, int64_t bytes, int64_t slot_bytes) {
  const SampleKey& key = group.samples.front().key;
  return {.code = ErrorCode::kResourceExhausted,
          .field = "bridge.slot_bytes",
          .value = std::to_string(slot_bytes),
          .origin = fmt::format("request {}, prompt {}", key.request_id, key.prompt_index),
          .allowed = fmt::format("at least {}, the bytes of this group's {} samples", bytes,
                                 group.samples.size()),
          .message = "a group is never split: raise bridge.slot_bytes or lower n or the lengths"};
}

}  // namespace

void Delivery::commit(Sample sample) {
  if (groups_.add(std::move(sample))) check_last_finished();
}

void Delivery::fail(FailedSample sample) {
  if (groups_.add(std::move(sample))) check_last_finished();
}

// Every finished group fits a slot by itself from here on.
void Delivery::check_last_finished() {
  Group& group = groups_.finished().back();
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
  fail_all(group.samples, too_big(group, bytes, slots_.slot_bytes()), group.failed);
}

bool Delivery::fits(int64_t num_groups) const {
  std::vector<const Sample*> samples;
  size_t num_failed = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    const Group& group = groups_.finished()[static_cast<size_t>(g)];
    for (const Sample& sample : group.samples) samples.push_back(&sample);
    num_failed += group.failed.size();
  }
  if (num_failed > kMaxFailedPerBatch) return false;
  if (samples.empty()) return true;
  try {
    return layout_.batch_bytes(samples) <= slots_.slot_bytes();
  } catch (const Error&) {
    return false;  // e.g. offsets beyond i32: too many for one batch
  }
}

// Doubles, then bisects: a measurement looks at every sample, so one a group would be quadratic.
int64_t Delivery::num_fitting(int64_t limit) const {
  int64_t fitting = 1, refused = limit + 1;
  while (fitting < limit) {
    const int64_t next = std::min(2 * fitting, limit);
    if (!fits(next)) {
      refused = next;
      break;
    }
    fitting = next;
  }
  while (refused - fitting > 1 && fitting < limit) {
    const int64_t middle = fitting + (refused - fitting) / 2;
    (fits(middle) ? fitting : refused) = middle;
  }
  return fitting;
}

std::optional<BatchNotice> Delivery::redeliver(uint64_t client) {
  if (left_behind_.empty()) return std::nullopt;
  BatchNotice notice = std::move(left_behind_.extract(left_behind_.begin()).mapped());
  slots_.deliver(*notice.lease, client);
  delivered_[notice.lease->slot] = notice;
  ++num_redelivered_;
  return notice;
}

std::optional<BatchNotice> Delivery::next_batch(uint64_t client,
                                                std::optional<int64_t> num_groups) {
  if (auto again = redeliver(client)) return again;
  const auto num_finished = static_cast<int64_t>(groups_.finished().size());
  if (num_finished < num_groups.value_or(1)) return std::nullopt;
  const int64_t take = num_fitting(num_groups.value_or(num_finished));
  const auto last = groups_.finished().begin() + take;
  const bool has_samples = std::any_of(groups_.finished().begin(), last,
                                       [](const Group& group) { return !group.samples.empty(); });
  std::optional<SlotLease> lease;
  if (has_samples && !(lease = slots_.acquire())) return std::nullopt;
  BatchNotice notice;
  notice.num_groups = take;
  std::vector<Sample> samples;
  for (int64_t g = 0; g < take; ++g) {
    Group group = groups_.pop();
    std::move(group.samples.begin(), group.samples.end(), std::back_inserter(samples));
    std::move(group.failed.begin(), group.failed.end(), std::back_inserter(notice.failed));
  }
  if (lease) write(notice, std::move(samples), *lease);
  if (!notice.lease) return notice;
  slots_.deliver(*notice.lease, client);
  delivered_[notice.lease->slot] = notice;
  ++num_delivered_;
  num_samples_delivered_ += notice.num_samples;
  return notice;
}

// A layout that refuses now what it measured before is a bug; its samples are reported all the
// same, so that their request ends.
void Delivery::write(BatchNotice& notice, std::vector<Sample> samples, SlotLease lease) {
  try {
    notice.bytes = layout_.write(pointers_to(samples), last_batch_seq_ + 1, lease.generation,
                                 slots_.bytes(lease), notice.crc32);
  } catch (const Error& error) {
    slots_.cancel(lease);
    fail_all(samples, error.info, notice.failed);
    return;
  }
  notice.lease = lease;
  notice.batch_seq = ++last_batch_seq_;
  notice.num_samples = static_cast<int64_t>(samples.size());
}

void Delivery::release(uint64_t client, SlotLease lease, uint64_t batch_seq) {
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
}

void Delivery::client_gone(uint64_t client, GoneClient memory) {
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
          {"num_samples_delivered", number(num_samples_delivered_)},
          {"num_samples_held", number(num_held_samples())},
          {"num_duplicate_samples", number(groups_.num_duplicates())},
          {"num_open_groups", number(groups_.num_open_groups())},
          {"num_finished_groups", number(groups_.finished().size())}};
}

}  // namespace rollpack::bridge
