// Which KV pages are in use, and by how many sequences. Bookkeeping only: page memory belongs to
// the backend, and because its steps run in order, a page may be reused as soon as it is free here.
//
// A page is in use (sequences refer to it), idle (none does, but its leading slots are kept: they
// may be asked for again), or free. Idle pages are listed by when they fell idle. All operations
// take constant time a page.
//
// A sequence gets pages with consecutive numbers where it can, since backends read those as one
// stream: it goes on behind its last page, and where it cannot, it begins a run of 16 free pages.
// Runs that are not free as a whole are broken into only when there are no others.
#pragma once

#include <cstdint>
#include <vector>

namespace rollpack::rollout {

class PagePool {
 public:
  explicit PagePool(int32_t num_pages);

  int32_t num_pages() const { return static_cast<int32_t>(pages_.size()); }
  int32_t num_free() const { return num_free_; }
  int32_t num_idle() const { return num_idle_; }
  // Pages that can be had: the free ones, and the idle ones once they are forgotten.
  int32_t num_available() const { return num_free() + num_idle_; }

  // Appends `count` free pages with one reference each, behind the last of `pages` where possible;
  // or changes nothing and returns false.
  bool try_allocate(int32_t count, std::vector<int32_t>& pages);
  // One reference more to a page in use or idle.
  void add_reference(int32_t page);
  // Drops one reference; with the last one a page falls idle where it is kept, free where not.
  void release(int32_t page);
  // Releases the last page first: of pages falling idle together, the end of a sequence is older.
  void release_all(std::vector<int32_t>& pages);

  // Keeps slots [0, num_slots) of a page in use, until forget().
  void keep(int32_t page, int32_t num_slots);
  // Keeps nothing of the page any more; an idle one becomes free.
  void forget(int32_t page);
  // The page that fell idle first; -1: none is idle.
  int32_t oldest_idle() const { return oldest_; }

  int32_t num_references(int32_t page) const { return pages_[page].num_references; }
  bool is_kept(int32_t page) const { return pages_[page].num_kept > 0; }
  // Whether the one sequence that holds `page` may write slots from `first_slot` on: no other
  // sequence reads the page, and what is kept of it lies before them.
  bool is_writable(int32_t page, int32_t first_slot) const {
    return pages_[page].num_references == 1 && pages_[page].num_kept <= first_slot;
  }

 private:
  struct Page {
    int32_t num_references = 0;
    int32_t num_kept = 0;            // leading slots that must stay as they are
    int32_t older = -1, newer = -1;  // neighbours among the idle pages
  };

  // A whole chunk of keys of the cpu backend, of one head: 64 KiB and more in one stream.
  static constexpr int32_t kRunPages = 16;
  // Pages [kRunPages r, kRunPages (r + 1)).
  struct Run {
    uint32_t free = 0;                // a bit a page
    int32_t before = -1, after = -1;  // neighbours in its list
  };

  bool is_free(int32_t page) const {
    return (runs_[page / kRunPages].free >> (page % kRunPages) & 1) != 0;
  }
  // All pages of run r as bits; the last run may be short.
  uint32_t whole(int32_t run) const;
  // The free page to use behind `last` (-1: behind none).
  int32_t choose(int32_t last) const;
  // Marks a page as free or not, and lists its run where it belongs.
  void set_free(int32_t page, bool is_free);
  int32_t* list_of(int32_t run);  // null: no page is free
  void append_idle(int32_t page);
  void remove_idle(int32_t page);

  std::vector<Page> pages_;
  std::vector<Run> runs_;
  int32_t whole_runs_ = -1, broken_runs_ = -1;  // first of those with all pages free, with some
  int32_t num_free_ = 0;
  int32_t oldest_ = -1, newest_ = -1;
  int32_t num_idle_ = 0;
};

}  // namespace rollpack::rollout
