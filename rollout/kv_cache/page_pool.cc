#include "rollout/kv_cache/page_pool.h"

#include "kernels/base/error.h"

namespace rollpack::rollout {

PagePool::PagePool(int32_t num_pages) : references_(num_pages, 0) {
  free_.reserve(num_pages);
  for (int32_t page = num_pages - 1; page >= 0; --page) free_.push_back(page);
}

bool PagePool::try_allocate(int32_t count, std::vector<int32_t>& pages) {
  if (count > num_free()) return false;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t page = free_.back();
    free_.pop_back();
    references_[page] = 1;
    pages.push_back(page);
  }
  return true;
}

void PagePool::add_reference(int32_t page) {
  if (references_[page] == 0) fail_invariant("a free KV page was shared");
  ++references_[page];
}

void PagePool::release(int32_t page) {
  if (references_[page] == 0) fail_invariant("a KV page was released twice");
  if (--references_[page] == 0) free_.push_back(page);
}

void PagePool::release_all(std::vector<int32_t>& pages) {
  for (const int32_t page : pages) release(page);
  pages.clear();
}

}  // namespace rollpack::rollout
