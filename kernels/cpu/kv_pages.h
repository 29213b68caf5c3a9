// The KV cache: pages of 16 tokens, each holding K and V of all layers and KV heads in the layouts
// that attention reads (attention_bodies.h).
//
//   cache  [L][G][pages] blocks: what one layer reads lies together, and pages of consecutive
//          numbers are one stream (random 4 KiB blocks come at a third of the read bandwidth)
//   block  K, then V
//   bf16   K [K / 2][16][2]         V [8][value_columns][2]
//   f32    K [K][16]                V [16][value_columns]
// value_columns is K rounded up to a multiple of 16. Padding is 0 and stays 0.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/arena.h"

namespace rollpack::kernels::cpu {

class KvPages {
 public:
  // Takes as many pages as options.kv_cache_bytes holds.
  // Errors: resource_exhausted, naming the bytes of one page, if that is none.
  KvPages(const ModelShape& shape, int64_t kv_cache_bytes);

  int32_t num_pages() const { return num_pages_; }
  int64_t page_bytes() const { return page_bytes_; }
  int64_t value_columns() const { return value_columns_; }
  // Steps of a score's chain: pairs of K in bf16, elements in f32.
  int64_t score_steps() const { return score_steps_; }

  template <class Element>
  Element* keys(int32_t page, int64_t layer, int64_t head) const {
    return reinterpret_cast<Element*>(block(page, layer, head));
  }
  template <class Element>
  Element* values(int32_t page, int64_t layer, int64_t head) const {
    return reinterpret_cast<Element*>(block(page, layer, head) + key_bytes_);
  }
  // K and V of one page, layer and head lie one after the other.
  const std::byte* block_at(int32_t page, int64_t layer, int64_t head) const {
    return block(page, layer, head);
  }
  int64_t block_bytes() const { return block_bytes_; }
  std::byte* data() const { return arena_.data(); }  // of the whole cache
  // Gives all pages back to the system, or takes them again, zeroed, at the same addresses.
  void sleep() { arena_.release(); }
  void wake_up() { arena_.take(); }
  bool is_asleep() const { return arena_.is_released(); }
  int64_t held_bytes() const { return arena_.is_released() ? 0 : arena_.bytes(); }

  // Writes K values of one token: k and v already rounded to Element.
  template <class Element>
  void write(int32_t page, int64_t layer, int64_t head, int32_t slot, const Element* k,
             const Element* v) const;

  // Brings the cache lines that write() of this slot needs to this core. A token's keys alone lie
  // in as many lines as a score's chain has steps, and steps lie too far apart for a store to wait
  // for each: asked for at once, they come at the memory's speed instead of its latency.
  void prefetch(int32_t page, int64_t layer, int64_t head, int32_t slot) const;

  // Blocks of a page, one a layer and KV head.
  int64_t num_blocks() const { return page_bytes_ / block_bytes_; }
  // Copies the first copy.num_tokens tokens of one block; the target's others keep their values.
  void copy_block(int64_t block, const PageCopy& copy) const;

 private:
  std::byte* block(int32_t page, int64_t layer, int64_t head) const {
    return arena_.data() + ((layer * G_ + head) * num_pages_ + page) * block_bytes_;
  }

  int64_t G_ = 0, K_ = 0;
  bool is_bf16_ = false;
  int64_t score_steps_ = 0;
  int64_t value_columns_ = 0;
  int64_t key_bytes_ = 0;
  int64_t block_bytes_ = 0;
  int64_t page_bytes_ = 0;
  int32_t num_pages_ = 0;
  Arena arena_;
};

}  // namespace rollpack::kernels::cpu
