// Which KV pages are in use, and by how many sequences. Bookkeeping only: page memory belongs to
// the backend, and because its steps run in order, a page may be reused as soon as it is free here.
#pragma once

#include <cstdint>
#include <vector>

namespace rollpack::rollout {

class PagePool {
 public:
  explicit PagePool(int32_t num_pages);

  int32_t num_pages() const { return static_cast<int32_t>(references_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }

  // Appends `count` pages with one reference each, or changes nothing and returns false.
  bool try_allocate(int32_t count, std::vector<int32_t>& pages);
  void add_reference(int32_t page);
  // Drops one reference; the page is free when none is left.
  void release(int32_t page);
  void release_all(std::vector<int32_t>& pages);
  bool is_shared(int32_t page) const { return references_[page] > 1; }

 private:
  std::vector<int32_t> references_;  // [num_pages]
  std::vector<int32_t> free_;        // stack; lowest page on top at the start
};

}  // namespace rollpack::rollout
