// Weights as a model declares them, and the rows of each that this process holds: what a store of
// packed weights keeps, whatever its layout and memory.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/backend.h"

namespace rollpack::kernels {

struct DeclaredWeight {
  WeightSpec spec;
  int64_t offset = 0;  // bytes, of the store's set
  int64_t bytes = 0;
  // Rows of each part that this process holds: as declared, or fixed by the part's first load.
  std::vector<std::optional<int64_t>> local_rows;

  int32_t num_parts() const { return static_cast<int32_t>(spec.part_rows.size()); }
  // Rows held of the parts before `part`; of all of them for num_parts().
  int64_t first_row(int32_t part) const;
};

class DeclaredWeights {
 public:
  // [weight][part]
  using Flags = std::vector<std::vector<bool>>;

  // A weight without a place yet: the store fills in bytes and offset, and hands it to add().
  // Errors: invalid_argument naming the weight.
  static DeclaredWeight checked(const WeightSpec& spec);
  WeightId add(DeclaredWeight weight);

  bool empty() const { return all_.empty(); }
  // Errors: invalid_argument naming `op` and the id.
  const DeclaredWeight& at(WeightId id, const char* op) const;
  DeclaredWeight& at(WeightId id, const char* op);

  // Before a part is loaded: whether source and shard are those of the part; the first shard of a
  // part without one fixes its rows.
  // Errors: invalid_argument naming weight and part; failed_precondition where a shard would move
  // parts that are loaded.
  static void begin_load(DeclaredWeight& weight, int32_t part, const WeightSource& source,
                         ShardRange shard);
  // What was neither declared nor loaded as a shard is held wholly from now on.
  void hold_rest();

  Flags flags(bool value) const;
  // Errors: failed_precondition naming the first part that is not loaded.
  void require_loaded(const Flags& is_loaded) const;
  // 64-bit hash of names, kinds, sizes and rows held, behind `layout`, which says all else that
  // decides where a set's bytes lie.
  uint64_t layout_hash(std::string layout) const;

 private:
  std::vector<DeclaredWeight> all_;
};

[[noreturn]] void fail_weight_state(std::string field, std::string value, std::string message);
[[noreturn]] void fail_weight_argument(std::string field, std::string value, std::string allowed);

}  // namespace rollpack::kernels
