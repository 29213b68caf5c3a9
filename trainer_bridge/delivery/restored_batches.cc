#include "trainer_bridge/delivery/restored_batches.h"

#include <algorithm>
#include <utility>

namespace rollpack::bridge {

void RestoredBatches::add(FormedBatch record) {
  const uint64_t batch_seq = record.batch_seq;
  for (size_t i = 0; i < record.samples.size(); ++i) {
    const FormedSample& sample = record.samples[i];
    awaited_[{sample.request_id, sample.prompt_index, sample.sample_index}] = {batch_seq, i};
  }
  Batch batch{.samples = std::vector<Sample>(record.samples.size()),
              .num_missing = static_cast<int64_t>(record.samples.size())};
  batch.record = std::move(record);
  batches_.emplace(batch_seq, std::move(batch));
}

std::optional<RestoredBatches::Place> RestoredBatches::claim(const SampleKey& key) {
  const auto found = awaited_.find({key.request_id, key.prompt_index, key.sample_index});
  if (found == awaited_.end()) return std::nullopt;
  const Place place = found->second;
  awaited_.erase(found);
  --batches_.at(place.batch_seq).num_missing;
  ++num_held_samples_;
  return place;
}

bool RestoredBatches::take(Sample& sample) {
  const auto place = claim(sample.key);
  if (!place) return false;
  batches_.at(place->batch_seq).samples[place->index] = std::move(sample);
  return true;
}

// Its place stays empty, without a prompt.
bool RestoredBatches::take(FailedSample& sample) {
  const auto place = claim(sample.key);
  if (!place) return false;
  batches_.at(place->batch_seq).record.failed.push_back(std::move(sample));
  return true;
}

const RestoredBatches::Batch* RestoredBatches::first(
    const std::function<bool(const FormedBatch&)>& is_wanted) const {
  const auto found = std::find_if(batches_.begin(), batches_.end(),
                                  [&](const auto& each) { return is_wanted(each.second.record); });
  return found == batches_.end() ? nullptr : &found->second;
}

RestoredBatches::Batch RestoredBatches::pop(uint64_t batch_seq) {
  Batch batch = std::move(batches_.extract(batch_seq).mapped());
  num_held_samples_ -= static_cast<int64_t>(batch.samples.size());
  const auto is_missing = [](const Sample& sample) { return sample.prompt_ids == nullptr; };
  int32_t num_out = 0;
  size_t row = 1;  // that ends next
  std::vector<int32_t>& starts = batch.record.row_starts;
  for (size_t i = 0; i <= batch.samples.size(); ++i) {
    for (; row < starts.size() && starts[row] == static_cast<int32_t>(i); ++row) {
      starts[row] -= num_out;
    }
    if (i < batch.samples.size() && is_missing(batch.samples[i])) ++num_out;
  }
  std::erase_if(batch.samples, is_missing);
  return batch;
}

int64_t RestoredBatches::num_shares() const {
  return std::count_if(batches_.begin(), batches_.end(),
                       [](const auto& each) { return each.second.record.step > 0; });
}

}  // namespace rollpack::bridge
