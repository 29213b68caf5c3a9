#include "kernels/cpu/vocab_exchange.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <utility>

namespace rollpack::kernels::cpu {
namespace {

int64_t parts_of(int64_t columns, int64_t width) {
  return (columns + width - 1) / width;
}

// The `count` largest by (x descending, id ascending) go to the front.
void keep_largest(CandidateList& list) {
  const auto count = static_cast<size_t>(list.count);
  if (list.ids.size() <= count) return;
  std::vector<size_t> order(list.ids.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::nth_element(order.begin(), order.begin() + list.count, order.end(), [&](size_t a, size_t b) {
    return list.x[a] != list.x[b] ? list.x[a] > list.x[b] : list.ids[a] < list.ids[b];
  });
  CandidateList kept{.count = list.count, .x = {}, .ids = {}};
  for (size_t i = 0; i < count; ++i) {
    kept.x.push_back(list.x[order[i]]);
    kept.ids.push_back(list.ids[order[i]]);
  }
  list = std::move(kept);
}

}  // namespace

VocabExchange::VocabExchange(std::shared_ptr<Communicator> communicator, int64_t V)
    : communicator_(communicator && communicator->size() > 1 ? std::move(communicator) : nullptr),
      at_(communicator_ ? communicator_->at() : ReplicaRank{}),
      V_(V) {
  for (int32_t rank = 0; rank <= at_.size; ++rank) {
    const int64_t columns = rank == 0 ? 0 : vocabulary_shard(V, {rank - 1, at_.size}).end;
    block_starts_.push_back(parts_of(columns, kBlockColumns));
    panel_starts_.push_back(parts_of(columns, kPanelColumns));
  }
}

VocabularyPart VocabExchange::part() const {
  return {.V = V_, .first_block = block_starts_[static_cast<size_t>(at_.rank)]};
}

void VocabExchange::merge(std::span<uint32_t> words) {
  if (!words.empty()) communicator_->all_reduce<Reduction::kSum>(words);
}

void VocabExchange::gather(const float* held, int64_t rows, int64_t columns_per_panel, float* all) {
  const auto bytes = columns_per_panel * static_cast<int64_t>(sizeof(float));
  std::vector<int64_t> starts;
  for (const int64_t panel : panel_starts_) starts.push_back(panel * bytes);
  const auto rank = static_cast<size_t>(at_.rank);
  communicator_->gather_columns({.in = held,
                                 .in_stride = starts[rank + 1] - starts[rank],
                                 .out = all,
                                 .out_stride = starts.back(),
                                 .rows = rows,
                                 .starts = starts});
}

void VocabExchange::share_logits(const float* held, int64_t rows, float* all) {
  gather(held, rows, kPanelColumns, all);
}

void VocabExchange::share_panels(const float* held, int64_t rows, float* all) {
  gather(held, rows, 1, all);
}

void VocabExchange::share_exclusions(std::span<Exclusion* const> exclusions) {
  std::vector<uint32_t> words;
  for (const Exclusion* left : exclusions) {
    for (const Exclusion::Changed& changed : left->changed) {
      const auto block = static_cast<size_t>(changed.block);
      const auto sum = std::bit_cast<uint64_t>(left->block_sum[block]);
      words.push_back(std::bit_cast<uint32_t>(left->block_max[block]));
      words.push_back(static_cast<uint32_t>(sum));
      words.push_back(static_cast<uint32_t>(sum >> 32));
    }
  }
  merge(words);
  size_t at = 0;
  for (Exclusion* left : exclusions) {
    for (const Exclusion::Changed& changed : left->changed) {
      const auto block = static_cast<size_t>(changed.block);
      left->block_max[block] = std::bit_cast<float>(words[at]);
      left->block_sum[block] =
          std::bit_cast<double>(words[at + 1] | static_cast<uint64_t>(words[at + 2]) << 32);
      at += 3;
    }
  }
}

void VocabExchange::share_candidates(std::span<CandidateList* const> lists) {
  if (lists.empty()) return;
  // (id, bits of x) a candidate; id -1 where a rank has fewer.
  std::vector<uint32_t> mine;
  for (CandidateList* list : lists) {
    keep_largest(*list);
    for (int32_t i = 0; i < list->count; ++i) {
      const auto index = static_cast<size_t>(i);
      const bool is_there = index < list->ids.size();
      mine.push_back(is_there ? static_cast<uint32_t>(list->ids[index]) : ~uint32_t{0});
      mine.push_back(is_there ? std::bit_cast<uint32_t>(list->x[index]) : 0);
    }
    list->x.clear();
    list->ids.clear();
  }
  std::vector<uint32_t> all(mine.size() * static_cast<size_t>(at_.size));
  communicator_->all_gather(std::as_bytes(std::span(mine)), std::as_writable_bytes(std::span(all)));
  size_t at = 0;
  for (int32_t rank = 0; rank < at_.size; ++rank) {
    for (CandidateList* list : lists) {
      for (int32_t i = 0; i < list->count; ++i, at += 2) {
        if (all[at] == ~uint32_t{0}) continue;
        list->ids.push_back(static_cast<int32_t>(all[at]));
        list->x.push_back(std::bit_cast<float>(all[at + 1]));
      }
    }
  }
}

void VocabExchange::share_choices(std::span<Choice> choices) {
  std::vector<uint32_t> words;
  for (const Choice& choice : choices) {
    const bool is_mine = choice.token >= 0;
    words.push_back(is_mine ? static_cast<uint32_t>(choice.token) + 1 : 0);
    words.push_back(is_mine ? std::bit_cast<uint32_t>(choice.logit) : 0);
    words.push_back(is_mine ? std::bit_cast<uint32_t>(choice.support_logmass) : 0);
  }
  merge(words);
  for (size_t i = 0; i < choices.size(); ++i) {
    choices[i] = {.token = static_cast<int32_t>(words[3 * i]) - 1,
                  .logit = std::bit_cast<float>(words[3 * i + 1]),
                  .support_logmass = std::bit_cast<float>(words[3 * i + 2])};
  }
}

}  // namespace rollpack::kernels::cpu
