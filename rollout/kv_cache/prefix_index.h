// Which cached pages hold the keys and values of which tokens: prompts that begin alike, and
// prompts that go on from an earlier response, find the pages computed before.
//
// A tree of pages: a node is one page, its edge the tokens of that page, its path from the root
// all tokens before. Only the last page of a path may hold fewer tokens than a page has slots.
// Nodes are found by comparing token ids in the order of the tree, never by a hash. A page of
// another path that begins with the wanted tokens serves as far as they agree; whoever goes on from
// there writes into a copy (PagePool::is_writable).
//
// Who holds a page also holds the pages before it (insert() exchanges pages computed twice), and
// releases them last page first. So the page that fell idle first is always a leaf, and eviction
// takes the least recently used one in O(log n). A node is a page: there are never more.
// Source: SGLang's radix cache (Zheng et al., arXiv:2312.07104), with pages for edges.
#pragma once

#include <cstdint>
#include <set>
#include <span>
#include <vector>

#include "rollout/kv_cache/page_pool.h"

namespace rollpack::rollout {

class PrefixIndex {
 public:
  // `pool` must outlive the index.
  PrefixIndex(PagePool& pool, int32_t page_tokens);
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  struct Match {
    int32_t num_tokens = 0;
    // [ceil(num_tokens / page_tokens)]; slots of the last one past the match hold something else.
    std::vector<int32_t> pages;
  };
  // The longest cached beginning of `tokens` computed with weights `version`. Takes no reference.
  Match find(int64_t version, std::span<const int32_t> tokens) const;

  // Files pages under the tokens whose keys and values, computed with weights `version`, they hold:
  // pages[i] those from i * page_tokens on. The first `num_filed` pages are in the index, as an
  // earlier call has left them. A whole page that was filed by someone else is exchanged for that
  // one in `pages`, which the caller must hold references to. Returns how many whole pages are
  // filed: `num_filed` of the next call.
  int32_t insert(int64_t version, std::span<const int32_t> tokens, int32_t num_filed,
                 std::vector<int32_t>& pages);

  // Evicts least recently used pages until `count` are free; so many must be available.
  void make_free(int32_t count);
  // Weights changed: forgets everything. No sequence may hold a filed page.
  void begin_version(int64_t version);

  int32_t num_pages() const { return static_cast<int32_t>(order_.size()); }
  // Counts insertions and begun versions: while it stands, find() finds no more than it did.
  uint64_t num_changes() const { return num_changes_; }
  // Checks all that is promised above, in O(n). Errors: a broken invariant, named.
  void check() const;

 private:
  static constexpr int32_t kRoot = -1;

  struct Node {
    int32_t parent = kRoot;
    int32_t num_tokens = 0;  // 0: the page is no node
    int32_t num_children = 0;
  };
  struct Key {
    int32_t parent;
    std::span<const int32_t> tokens;
  };
  struct Order {  // by parent, then by tokens
    using is_transparent = void;
    const PrefixIndex* index;
    static bool less(const Key& a, const Key& b);
    bool operator()(int32_t a, int32_t b) const { return less(index->key(a), index->key(b)); }
    bool operator()(int32_t a, const Key& b) const { return less(index->key(a), b); }
    bool operator()(const Key& a, int32_t b) const { return less(a, index->key(b)); }
  };
  struct Likeness {
    int32_t page = kRoot;    // kRoot: no child has a token in common
    int32_t num_common = 0;  // leading tokens
  };

  Key key(int32_t page) const;
  // The child of `parent` that agrees longest with `tokens`.
  Likeness closest(int32_t parent, std::span<const int32_t> tokens) const;
  void add(int32_t page, int32_t parent, std::span<const int32_t> tokens);
  void remove(int32_t page);

  PagePool& pool_;
  const int32_t page_tokens_;
  int64_t version_ = 0;
  uint64_t num_changes_ = 0;
  std::vector<Node> nodes_;         // [num_pages]
  std::vector<int32_t> tokens_;     // [num_pages][page_tokens]
  std::set<int32_t, Order> order_;  // no node's tokens begin with those of a sibling
};

}  // namespace rollpack::rollout
