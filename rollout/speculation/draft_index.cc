#include "rollout/speculation/draft_index.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace rollpack::rollout {

DraftIndex::DraftIndex(std::span<const int32_t> prompt) : texts_(1) {
  const size_t taken = std::min(prompt.size(), static_cast<size_t>(kMaxTokens));
  texts_[0].tokens.assign(prompt.end() - static_cast<ptrdiff_t>(taken), prompt.end());
  num_tokens_ = static_cast<int64_t>(taken);
  texts_[0].is_indexed = false;
  unindexed_.push_back(0);
}

void DraftIndex::extend(int32_t sample_index, std::span<const int32_t> response) {
  const size_t index = static_cast<size_t>(sample_index) + 1;
  if (texts_.size() <= index) texts_.resize(index + 1);
  Text& text = texts_[index];
  if (text.tokens.empty()) {
    // Matches may reach back into the prompt, whose end stands before every response.
    const std::vector<int32_t>& prompt = texts_[0].tokens;
    text.num_context = static_cast<int32_t>(std::min<size_t>(prompt.size(), kMaxMatch));
    text.num_indexed = std::max(0, text.num_context - 1);  // what follows the prompt is new
    text.tokens.assign(prompt.end() - text.num_context, prompt.end());
  }
  const size_t num_known = text.tokens.size() - static_cast<size_t>(text.num_context);
  if (response.size() <= num_known) return;
  if (std::exchange(text.is_indexed, false)) unindexed_.push_back(static_cast<int32_t>(index));
  const auto num_more =
      std::min(static_cast<int64_t>(response.size() - num_known), kMaxTokens - num_tokens_);
  text.tokens.insert(text.tokens.end(), response.begin() + static_cast<ptrdiff_t>(num_known),
                     response.begin() + static_cast<ptrdiff_t>(num_known) + num_more);
  num_tokens_ += num_more;
}

void DraftIndex::propose(int32_t sample_index, int32_t max_tokens, std::vector<int32_t>& draft) {
  draft.clear();
  const size_t own_index = static_cast<size_t>(sample_index) + 1;
  if (own_index >= texts_.size() || num_tokens_ >= kMaxTokens) return;
  index_new_tokens();
  const Text& own = texts_[own_index];
  const auto own_end = static_cast<int32_t>(own.tokens.size());
  if (own_end < kGram || newest_.empty()) return;
  int32_t best_length = 0;
  Place best;
  int32_t next = newest_[bucket_of(own.tokens.data() + own_end - kGram)];
  for (int32_t i = 0; i < kMaxCandidates && next >= 0 && best_length < kMaxMatch; ++i) {
    const Place& place = places_[static_cast<size_t>(next)];
    next = place.previous;
    const Text& text = texts_[static_cast<size_t>(place.text)];
    if (place.end == static_cast<int32_t>(text.tokens.size())) continue;  // nothing follows yet
    const int32_t length = match_length(own, own_end, text, place.end);
    if (length <= best_length) continue;
    best_length = length;
    best = place;
  }
  if (best_length < kGram) return;  // the bucket has other grams too
  copy_continuation(best, own, std::min(best_length, max_tokens), draft);
}

void DraftIndex::copy_continuation(Place place, const Text& own, int32_t num_tokens,
                                   std::vector<int32_t>& draft) const {
  const Text* text = &texts_[static_cast<size_t>(place.text)];
  const auto own_end = static_cast<int32_t>(own.tokens.size());
  for (int32_t at = place.end; static_cast<int32_t>(draft.size()) < num_tokens; ++at) {
    if (text == &texts_[0] && at == static_cast<int32_t>(text->tokens.size())) {
      text = &own;  // behind the prompt stands the own response
      at = own.num_context;
    }
    if (at < static_cast<int32_t>(text->tokens.size())) {
      draft.push_back(text->tokens[static_cast<size_t>(at)]);
    } else if (text == &own) {  // a loop: the draft goes on with its own beginning
      draft.push_back(draft[static_cast<size_t>(at - own_end)]);
    } else {
      return;
    }
  }
}

void DraftIndex::index_new_tokens() {
  for (const int32_t t : unindexed_) {
    Text& text = texts_[static_cast<size_t>(t)];
    const auto size = static_cast<int32_t>(text.tokens.size());
    for (int32_t end = std::max(text.num_indexed + 1, kGram); end <= size; ++end) {
      add_place({.text = t, .end = end});
    }
    text.num_indexed = size;
    text.is_indexed = true;
  }
  unindexed_.clear();
}

void DraftIndex::add_place(Place place) {
  const auto link = [this](size_t index) {
    Place& added = places_[index];
    const Text& text = texts_[static_cast<size_t>(added.text)];
    int32_t& newest = newest_[bucket_of(text.tokens.data() + added.end - kGram)];
    added.previous = newest;
    newest = static_cast<int32_t>(index);
  };
  places_.push_back(place);
  if (places_.size() <= newest_.size()) {
    link(places_.size() - 1);
    return;
  }
  newest_.assign(std::bit_ceil(std::max<size_t>(64, places_.size())), -1);
  for (size_t i = 0; i < places_.size(); ++i) link(i);
}

size_t DraftIndex::bucket_of(const int32_t* gram) const {
  uint64_t hash = 0;
  // Odd multipliers of 64 random bits; the top half of a product depends on all lower ones.
  for (int32_t i = 0; i < kGram; ++i) {
    hash = (hash ^ static_cast<uint32_t>(gram[i])) * 0x9E3779B97F4A7C15ull;
    hash ^= hash >> 32;
  }
  return static_cast<size_t>(hash) & (newest_.size() - 1);
}

int32_t DraftIndex::match_length(const Text& a, int32_t a_end, const Text& b, int32_t b_end) {
  const int32_t max = std::min({a_end, b_end, kMaxMatch});
  int32_t length = 0;
  while (length < max && a.tokens[static_cast<size_t>(a_end - 1 - length)] ==
                             b.tokens[static_cast<size_t>(b_end - 1 - length)]) {
    ++length;
  }
  return length;
}

}  // namespace rollpack::rollout
