// What the samples of one prompt have said so far, and where in it the last tokens of a text stood
// before: what followed there is a draft of what follows now. Guesses only; nothing of a result
// depends on them.
// The match finder of LZ77: a hash of the last kGram tokens leads to the places that end in them,
// newest first, and the longest match of the few newest wins. A token costs O(1) to add, a search
// O(kMaxCandidates * kMaxMatch) comparisons, whatever the length of the texts.
// Source: Saxena, "Prompt Lookup Decoding", 2023 (the text itself as draft); Oliaro et al.,
//   "SuffixDecoding", 2024 (drafts as long as their match); Qin et al., "Seer", 2025 (siblings).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace rollpack::rollout {

class DraftIndex {
 public:
  // Tokens that must match before anything is proposed. 12 prompts of prose, code and lists to
  // SmolLM2-135M, greedy, drafts of up to 5: two make 1.95 tokens a step, three 1.84, four 1.72;
  // at temperature 1, where half a token of a draft comes true, 1.06, 1.03 and 1.02.
  static constexpr int32_t kGram = 2;
  static constexpr int32_t kMaxMatch = 32;
  static constexpr int32_t kMaxCandidates = 16;
  // Of all texts together. A token takes at most 24 bytes: 24 MiB a group, once.
  static constexpr int64_t kMaxTokens = int64_t{1} << 20;

  explicit DraftIndex(std::span<const int32_t> prompt);

  // `response` is all that sample `sample_index` has drawn so far; it never changes, only grows.
  // Past kMaxTokens nothing more is taken in.
  void extend(int32_t sample_index, std::span<const int32_t> response);

  // Fills `draft` with at most `max_tokens` tokens that may follow what extend() was told last of
  // `sample_index`: no more than have matched before them. Empty where nothing matches.
  void propose(int32_t sample_index, int32_t max_tokens, std::vector<int32_t>& draft);

  int64_t num_tokens() const { return num_tokens_; }

 private:
  // A place where some kGram tokens end.
  struct Place {
    int32_t text = 0;
    int32_t end = 0;        // behind the last of them
    int32_t previous = -1;  // older place of the same hash
  };
  struct Text {
    std::vector<int32_t> tokens;
    int32_t num_context = 0;  // leading tokens that stand for the prompt's end
    int32_t num_indexed = 0;  // places up to here are known
    bool is_indexed = true;   // false: it is in unindexed_
  };

  // Appends what follows `place`, for the text that `own` is.
  void copy_continuation(Place place, const Text& own, int32_t num_tokens,
                         std::vector<int32_t>& draft) const;
  void index_new_tokens();
  void add_place(Place place);
  size_t bucket_of(const int32_t* gram) const;
  // Tokens that are equal before the ends of two texts, at most kMaxMatch.
  static int32_t match_length(const Text& a, int32_t a_end, const Text& b, int32_t b_end);

  std::vector<Text> texts_;         // the prompt, then one a sample
  std::vector<int32_t> unindexed_;  // texts with tokens whose places are not known yet
  std::vector<Place> places_;
  std::vector<int32_t> newest_;  // by bucket: index into places_, -1: none; a power of two
  int64_t num_tokens_ = 0;
};

}  // namespace rollpack::rollout
