#include "rollout/kv_cache/prefix_index.h"

#include <algorithm>
#include <iterator>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

int32_t num_common_tokens(std::span<const int32_t> a, std::span<const int32_t> b) {
  return static_cast<int32_t>(std::ranges::mismatch(a, b).in1 - a.begin());
}

}  // namespace

PrefixIndex::PrefixIndex(PagePool& pool, int32_t page_tokens)
    : pool_(pool),
      page_tokens_(page_tokens),
      nodes_(pool.num_pages()),
      tokens_(static_cast<size_t>(pool.num_pages()) * page_tokens),
      order_(Order{this}) {}

bool PrefixIndex::Order::less(const Key& a, const Key& b) {
  if (a.parent != b.parent) return a.parent < b.parent;
  return std::ranges::lexicographical_compare(a.tokens, b.tokens);
}

PrefixIndex::Key PrefixIndex::key(int32_t page) const {
  const Node& node = nodes_[page];
  const int32_t* tokens = tokens_.data() + static_cast<size_t>(page) * page_tokens_;
  return {node.parent, {tokens, static_cast<size_t>(node.num_tokens)}};
}

PrefixIndex::Likeness PrefixIndex::closest(int32_t parent, std::span<const int32_t> tokens) const {
  Likeness best;
  const auto consider = [&](int32_t page) {
    if (nodes_[page].parent != parent) return;
    const int32_t num_common = num_common_tokens(key(page).tokens, tokens);
    if (num_common > best.num_common) best = {page, num_common};
  };
  // In the order of tokens, whatever agrees longest stands next to them.
  const auto next = order_.lower_bound(Key{parent, tokens});
  if (next != order_.end()) consider(*next);
  if (next != order_.begin()) consider(*std::prev(next));
  return best;
}

PrefixIndex::Match PrefixIndex::find(int64_t version, std::span<const int32_t> tokens) const {
  Match match;
  if (version != version_) return match;
  int32_t parent = kRoot;
  while (!tokens.empty()) {
    const auto page = tokens.first(std::min<size_t>(tokens.size(), page_tokens_));
    const Likeness found = closest(parent, page);
    if (found.num_common == 0) break;
    match.num_tokens += found.num_common;
    match.pages.push_back(found.page);
    if (found.num_common < page_tokens_) break;
    parent = found.page;
    tokens = tokens.subspan(page_tokens_);
  }
  return match;
}

int32_t PrefixIndex::insert(int64_t version, std::span<const int32_t> tokens, int32_t num_filed,
                            std::vector<int32_t>& pages) {
  const auto num_whole = static_cast<int32_t>(tokens.size()) / page_tokens_;
  if (version != version_) return num_filed;
  int32_t parent = num_filed == 0 ? kRoot : pages[num_filed - 1];
  for (size_t i = num_filed; i * page_tokens_ < tokens.size(); ++i) {
    const auto rest = tokens.subspan(i * page_tokens_);
    const auto part = rest.first(std::min<size_t>(rest.size(), page_tokens_));
    const Likeness found = closest(parent, part);
    const bool is_known = found.num_common == static_cast<int32_t>(part.size());
    if (is_known && found.page != pages[i] && found.num_common == page_tokens_) {
      // Computed twice, the same bits: one page is enough.
      pool_.add_reference(found.page);
      pool_.release(pages[i]);
      pages[i] = found.page;
    }
    if (!is_known) {
      // The beginning of this page alone needs no node of its own any more.
      if (found.num_common > 0 && found.num_common == nodes_[found.page].num_tokens) {
        remove(found.page);
      }
      add(pages[i], parent, part);
    }
    parent = pages[i];
  }
  return num_whole;
}

void PrefixIndex::add(int32_t page, int32_t parent, std::span<const int32_t> tokens) {
  if (nodes_[page].num_tokens > 0) fail_invariant("a KV page was filed under two prefixes");
  std::ranges::copy(tokens, tokens_.begin() + static_cast<ptrdiff_t>(page) * page_tokens_);
  nodes_[page] = {.parent = parent, .num_tokens = static_cast<int32_t>(tokens.size())};
  order_.insert(page);
  if (parent != kRoot) ++nodes_[parent].num_children;
  pool_.keep(page, static_cast<int32_t>(tokens.size()));
  ++num_changes_;
}

void PrefixIndex::remove(int32_t page) {
  if (nodes_[page].num_children > 0) fail_invariant("a cached KV page went before those after it");
  order_.erase(page);
  if (nodes_[page].parent != kRoot) --nodes_[nodes_[page].parent].num_children;
  nodes_[page] = {};
  pool_.forget(page);
}

void PrefixIndex::make_free(int32_t count) {
  while (pool_.num_free() < count) {
    if (pool_.oldest_idle() < 0) fail_invariant("KV pages that were counted as available are not");
    remove(pool_.oldest_idle());
  }
}

void PrefixIndex::begin_version(int64_t version) {
  while (pool_.oldest_idle() >= 0) remove(pool_.oldest_idle());
  if (!order_.empty()) fail_invariant("weights changed under cached KV pages in use");
  version_ = version;
  ++num_changes_;
}

void PrefixIndex::check() const {
  std::vector<int32_t> num_children(nodes_.size(), 0);
  const auto require = [](bool holds, const char* what) {
    if (!holds) fail_invariant(what);
  };
  int32_t before = kRoot;
  for (const int32_t page : order_) {
    const Node& node = nodes_[page];
    require(pool_.is_kept(page), "a filed KV page is not kept");
    require(node.num_tokens > 0, "a filed KV page has no tokens");
    if (node.parent != kRoot) {
      ++num_children[node.parent];
      require(nodes_[node.parent].num_tokens == page_tokens_, "a KV page follows half a page");
      require(pool_.num_references(page) == 0 || pool_.num_references(node.parent) > 0,
              "a KV page is in use, the page before it is not");
    }
    if (before != kRoot && nodes_[before].parent == node.parent) {
      require(num_common_tokens(key(before).tokens, key(page).tokens) < nodes_[before].num_tokens,
              "a cached KV page begins like the page beside it");
    }
    before = page;
  }
  int32_t num_kept = 0;
  for (size_t page = 0; page < nodes_.size(); ++page) {
    require(nodes_[page].num_children == num_children[page], "children of a KV page miscounted");
    num_kept += pool_.is_kept(static_cast<int32_t>(page)) ? 1 : 0;
  }
  require(num_kept == num_pages(), "a kept KV page is in no index");
}

}  // namespace rollpack::rollout
