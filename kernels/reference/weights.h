// Weights of the reference backend: row-major parts in the compute dtype (vectors in f32), held as
// a committed set that steps read and a staged set that the next commit swaps in.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "kernels/backend.h"

namespace rollpack::kernels::reference {

struct WeightPart {
  bool is_loaded = false;
  ShardRange rows;                 // rows of the full part that are held
  std::vector<std::byte> numbers;  // [rows.end - rows.begin, cols]

  int64_t num_rows() const { return rows.end - rows.begin; }
};

struct Weight {
  WeightSpec spec;
  DType dtype = DType::kF32;
  std::vector<WeightPart> parts;

  int64_t num_rows() const;
  // Element i of a kVector, over its stacked parts.
  double vector_element(int64_t i) const;
};

class WeightStore {
 public:
  explicit WeightStore(DType compute_dtype) : compute_dtype_(compute_dtype) {}

  // Errors: invalid_argument naming weight and field; failed_precondition after staging has begun.
  WeightId declare(const WeightSpec& spec);
  void begin();
  // Errors: failed_precondition without begin(); invalid_argument naming weight, part and shape.
  void load(WeightId id, int32_t part, const WeightSource& source, ShardRange shard);
  void copy_committed();
  // Errors: failed_precondition naming the first part that is missing.
  void commit();
  void discard() { staged_.reset(); }
  // Lets the committed set go. Errors: failed_precondition where a set is staged.
  void drop();

  bool has_committed() const { return committed_ != nullptr; }
  const Weight& committed(WeightId id) const;
  uint64_t hash() const;
  uint64_t staged_hash() const;

 private:
  using Set = std::vector<Weight>;

  Set empty_set() const;
  void require_staging(const char* call) const;
  void require_complete(const char* call) const;
  static uint64_t hash_of(const Set& set);

  DType compute_dtype_;
  std::vector<WeightSpec> specs_;
  std::unique_ptr<Set> committed_;
  std::unique_ptr<Set> staged_;
};

}  // namespace rollpack::kernels::reference
