#include "rollout/batching/pages_under_way.h"

#include <algorithm>

#include "kernels/base/checksum.h"

namespace rollpack::rollout {

PagesUnderWay::PagesUnderWay(const EngineState& state) : page_tokens_(state.limits.page_tokens) {
  for (const auto& sequence : state.running) {
    if (!sequence->is_finished && !sequence->pages.empty()) add(*sequence);
  }
}

void PagesUnderWay::add(const Sequence& sequence) {
  const int32_t begin = sequence.num_filed * page_tokens_;
  // What lies past the prompt is filed when the sequence ends: nobody can wait for it.
  if (begin + page_tokens_ > sequence.num_prompt || sequence.num_done() >= sequence.num_prompt) {
    return;
  }
  const Page page{.parent = sequence.num_filed == 0 ? -1 : sequence.pages[sequence.num_filed - 1],
                  .tokens = std::span(sequence.tokens).subspan(begin, page_tokens_)};
  pages_.emplace(hash(page), page);
}

bool PagesUnderWay::contains(const Sequence& sequence, std::span<const int32_t> before,
                             int32_t end) const {
  const int32_t begin = static_cast<int32_t>(before.size()) * page_tokens_;
  if (begin + page_tokens_ > end) return false;
  const Page page{.parent = before.empty() ? -1 : before.back(),
                  .tokens = std::span(sequence.tokens).subspan(begin, page_tokens_)};
  const auto found = pages_.find(hash(page));
  return found != pages_.end() && found->second.parent == page.parent &&
         std::ranges::equal(found->second.tokens, page.tokens);
}

uint64_t PagesUnderWay::hash(const Page& page) {
  const std::string_view bytes(reinterpret_cast<const char*>(page.tokens.data()),
                               page.tokens.size_bytes());
  return fnv1a64(bytes) ^ static_cast<uint64_t>(page.parent) * 0x9e3779b97f4a7c15u;
}

}  // namespace rollpack::rollout
