// The packed weights: what was declared, the committed set that steps read, and the staged set that
// the next commit makes current. A set is one contiguous arena: a header, then every weight in the
// order of declaration, so that two processes with equal declarations can share it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/arena.h"
#include "kernels/cpu/packing.h"
#include "kernels/step/declared_weights.h"

namespace rollpack::kernels::cpu {

// A set's first page is its header's.
inline constexpr int64_t kHeaderBytes = 4096;

class WeightStore {
 public:
  WeightStore(const KernelTable& kernels, DType compute, bool is_shared)
      : kernels_(kernels), compute_(compute), is_shared_(is_shared) {}

  // The calls of backend.h, with its errors. pool may be null: then the caller packs alone.
  WeightId declare(const WeightSpec& spec);
  void begin_staging();
  void load(WeightId id, int32_t part, const WeightSource& source, ShardRange shard,
            ThreadPool* pool);
  void copy_committed_to_staged(ThreadPool* pool);
  // Errors: failed_precondition naming the first part that was not loaded.
  void require_complete() const;
  void commit();
  void discard();
  // Lets the committed set go for good. Where ranks share one copy its memory is free once all of
  // them have.
  // Errors: failed_precondition where a set is staged.
  void drop();
  // Of the sets that are this store's own.
  int64_t held_bytes() const;
  uint64_t committed_hash(ThreadPool* pool) const;
  uint64_t staged_hash();
  int export_staged();
  void adopt_staged(int fd);

  // Bytes of one set as declared so far.
  int64_t set_bytes() const { return next_offset_; }

  bool has_committed() const;
  // Share of the committed set that lies in huge pages; see Arena.
  double huge_page_share() const;
  // Views of the committed set. Errors: failed_precondition before the first commit,
  // invalid_argument for an id or a kind that does not fit the op.
  PackedMatrix matrix(WeightId id, const char* op) const;
  const float* vector(WeightId id, int64_t expected, const char* op) const;

 private:
  struct Set {
    Arena arena;
    bool is_adopted = false;  // the memory is another process's
    DeclaredWeights::Flags is_loaded;
    std::vector<bool> is_populated;  // [windows of the arena]
    // Of blocks of kHashBlock bytes behind the header, where it is known.
    std::vector<std::optional<uint64_t>> block_hashes;
    std::optional<uint64_t> hash;  // of them all, once it was asked for, and nothing loaded since
  };

  int64_t bytes_of(const DeclaredWeight& weight) const;
  PackedMatrix view(const DeclaredWeight& weight, std::byte* base) const;
  // Backs bytes [begin, end) of the arena with memory.
  void populate(Set& set, int64_t begin, int64_t end, ThreadPool* pool) const;
  // Bytes [begin, end) of the arena change, or have been written for good: their hash is forgotten,
  // or taken while they are in some core's cache.
  static void forget_hashes(Set& set, int64_t begin, int64_t end);
  static void take_hashes(Set& set, int64_t begin, int64_t end, ThreadPool* pool);
  void load_matrix(Set& set, const DeclaredWeight& weight, const PackTarget& target,
                   const WeightSource& source, ShardRange shard, bool is_last_part,
                   ThreadPool* pool);
  Set& staged();
  size_t num_hash_blocks() const;
  uint64_t hash_of(const Set& set, ThreadPool* pool) const;
  uint64_t layout_hash() const;

  const KernelTable& kernels_;
  DType compute_;
  bool is_shared_;
  DeclaredWeights weights_;
  int64_t next_offset_ = kHeaderBytes;
  std::optional<Set> committed_;
  std::optional<Set> staged_;
};

}  // namespace rollpack::kernels::cpu
