#include "rollout/kv_cache/page_pool.h"

#include "kernels/base/error.h"

namespace rollpack::rollout {

PagePool::PagePool(int32_t num_pages) : pages_(num_pages) {
  free_.reserve(num_pages);
  for (int32_t page = num_pages - 1; page >= 0; --page) free_.push_back(page);
}

bool PagePool::try_allocate(int32_t count, std::vector<int32_t>& pages) {
  if (count > num_free()) return false;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t page = free_.back();
    free_.pop_back();
    pages_[page].num_references = 1;
    pages.push_back(page);
  }
  return true;
}

void PagePool::add_reference(int32_t page) {
  if (pages_[page].num_references == 0) {
    if (!is_kept(page)) fail_invariant("a free KV page was shared");
    remove_idle(page);
  }
  ++pages_[page].num_references;
}

void PagePool::release(int32_t page) {
  if (pages_[page].num_references == 0) fail_invariant("a KV page was released twice");
  if (--pages_[page].num_references > 0) return;
  if (is_kept(page)) {
    append_idle(page);
  } else {
    free_.push_back(page);
  }
}

void PagePool::release_all(std::vector<int32_t>& pages) {
  for (size_t i = pages.size(); i-- > 0;) release(pages[i]);
  pages.clear();
}

void PagePool::keep(int32_t page, int32_t num_slots) {
  if (pages_[page].num_references == 0) fail_invariant("a KV page in no use was to be kept");
  pages_[page].num_kept = num_slots;
}

void PagePool::forget(int32_t page) {
  if (!is_kept(page)) fail_invariant("a KV page was forgotten twice");
  pages_[page].num_kept = 0;
  if (pages_[page].num_references > 0) return;
  remove_idle(page);
  free_.push_back(page);
}

void PagePool::append_idle(int32_t page) {
  pages_[page].older = newest_;
  pages_[page].newer = -1;
  (newest_ < 0 ? oldest_ : pages_[newest_].newer) = page;
  newest_ = page;
  ++num_idle_;
}

void PagePool::remove_idle(int32_t page) {
  const auto [references, kept, older, newer] = pages_[page];
  (older < 0 ? oldest_ : pages_[older].newer) = newer;
  (newer < 0 ? newest_ : pages_[newer].older) = older;
  --num_idle_;
}

}  // namespace rollpack::rollout
