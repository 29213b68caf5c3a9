#include "rollout/kv_cache/page_pool.h"

#include <algorithm>
#include <bit>

#include "kernels/base/error.h"

namespace rollpack::rollout {

PagePool::PagePool(int32_t num_pages)
    : pages_(num_pages), runs_((num_pages + kRunPages - 1) / kRunPages) {
  for (int32_t page = num_pages - 1; page >= 0; --page) set_free(page, true);
}

bool PagePool::try_allocate(int32_t count, std::vector<int32_t>& pages) {
  if (count > num_free()) return false;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t page = choose(pages.empty() ? -1 : pages.back());
    set_free(page, false);
    pages_[page].num_references = 1;
    pages.push_back(page);
  }
  return true;
}

uint32_t PagePool::whole(int32_t run) const {
  const int32_t count = std::min(num_pages() - run * kRunPages, kRunPages);
  return (1u << count) - 1;
}

int32_t PagePool::choose(int32_t last) const {
  const int32_t next = last + 1;
  if (last >= 0 && next < num_pages() && is_free(next)) {
    const int32_t run = next / kRunPages;
    // The first page of a run is for who can have all of it.
    if (next % kRunPages != 0 || runs_[run].free == whole(run)) return next;
  }
  const int32_t run = whole_runs_ >= 0 ? whole_runs_ : broken_runs_;
  return run * kRunPages + std::countr_zero(runs_[run].free);
}

int32_t* PagePool::list_of(int32_t run) {
  const uint32_t free = runs_[run].free;
  if (free == 0) return nullptr;
  return free == whole(run) ? &whole_runs_ : &broken_runs_;
}

void PagePool::set_free(int32_t page, bool is_free) {
  const int32_t index = page / kRunPages;
  Run& run = runs_[index];
  if (int32_t* list = list_of(index)) {
    (run.before < 0 ? *list : runs_[run.before].after) = run.after;
    if (run.after >= 0) runs_[run.after].before = run.before;
  }
  run.free ^= 1u << (page % kRunPages);
  num_free_ += is_free ? 1 : -1;
  if (int32_t* list = list_of(index)) {
    run.before = -1;
    run.after = *list;
    if (*list >= 0) runs_[*list].before = index;
    *list = index;
  }
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
    set_free(page, true);
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
  set_free(page, true);
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
