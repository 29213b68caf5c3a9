// Causal attention over paged keys and values, one code path for prefill and decode. Threads claim
// (tile of query rows, KV head) pairs; a tile's rows are its query rows times the H / G heads that
// share the KV head. Rows of siblings that share pages are one tile: the shared pages are read once
// and multiplied with all of its rows, each sequence's own pages with its own. Numerics:
// kernels/cpu/README.md.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/kv_pages.h"
#include "kernels/cpu/step_context.h"
#include "kernels/cpu/thread_pool.h"

namespace rollpack::kernels::cpu {

template <class Element>
class Attention {
 public:
  // products: the kernels that multiply pages; the others are of `kernels`.
  Attention(const KernelTable& kernels, const KernelTable& products, const ModelShape& shape,
            const KvPages& pages, int num_threads);

  void run(ThreadPool& pool, const StepContext& step, const AttentionArgs& args);

  // Bytes of one thread's workspace.
  int64_t workspace_bytes() const;

 private:
  // One thread's memory, for one tile at a time.
  struct Workspace {
    std::vector<Element> q;            // [rows][K]
    std::vector<float> o, o_chunk;     // [rows][value_columns]
    std::vector<SoftmaxState> states;  // [rows]: of the chunks merged so far
    std::vector<SoftmaxState> chunk;   // [rows]: of the chunk at hand
    std::vector<uint8_t> is_started;   // [rows]: some chunk was merged
    std::vector<uint8_t> is_visible;   // [rows]: some key of the chunk at hand is
    std::vector<Element> last_values;  // one value page, zeros past the last visible key
    std::vector<float> scores;         // [rows][kChunkKeys]
    std::vector<Element> p;            // [rows][kChunkKeys]
    PagesAhead ahead;                  // what is read after the pages at hand
  };
  // The tile and KV head at hand.
  struct Tile {
    const StepContext* step = nullptr;
    const AttentionArgs* args = nullptr;
    const AttentionTile* rows = nullptr;
    int64_t head = 0;  // KV head
    int32_t num_shared_pages = 0;
  };
  // One part of it: rows [first_row, first_row + num_rows) of the products.
  struct Part {
    const TilePart* rows = nullptr;
    int first_row = 0;
    int num_rows = 0;
  };
  // Absolute pages [begin, end) of one sequence.
  struct PageRange {
    int32_t begin = 0, end = 0;
    int count() const { return std::max(end - begin, 0); }
  };
  using PagePointers = const Element* [kChunkPages];

  Tile tile_at(const StepContext& step, const AttentionArgs& args, int64_t item) const;
  void run_tile(const Tile& tile, const Tile* next, Workspace& work) const;
  void load_queries(const Tile& tile, Workspace& work) const;
  void run_chunk(const Tile& tile, int32_t chunk, const Tile* next, Workspace& work) const;
  void run_shared_chunk(const Tile& tile, int32_t chunk, const Tile* next, Workspace& work) const;
  // Sets what is brought into L2 meanwhile: pages of a part; or the first that a chunk reads, of
  // this tile or, after its last chunk, of the next.
  void look_ahead(const Tile& tile, const Part& part, PageRange pages, int num_rows,
                  Workspace& work) const;
  void look_ahead_to_chunk(const Tile& tile, int32_t chunk, const Tile* next, int num_rows,
                           Workspace& work) const;
  void score(const Tile& tile, const Part& part, int32_t chunk, PageRange pages,
             Workspace& work) const;
  void weigh(const Tile& tile, const Part& part, int32_t chunk, PageRange pages, bool continues,
             Workspace& work) const;
  void soften(const Tile& tile, const Part& part, int32_t chunk, PageRange pages,
              Workspace& work) const;
  void clear_past_last_key(int32_t last_key, const Element*& values, Workspace& work) const;
  void merge(const Part& part, Workspace& work) const;
  void store(const Tile& tile, Workspace& work) const;

  template <class Visit>
  void for_parts(const Tile& tile, Visit visit) const;
  Part part_at(const Tile& tile, int32_t index, int first_row) const {
    const TilePart& rows =
        tile.step->tile_parts[static_cast<size_t>(tile.rows->first_part + index)];
    return {.rows = &rows, .first_row = first_row, .num_rows = rows.num_rows * group_};
  }
  PageRange shared_pages(const Tile& tile, int32_t chunk) const {
    return {.begin = chunk * kChunkPages,
            .end = std::min(tile.num_shared_pages, (chunk + 1) * kChunkPages)};
  }
  int32_t first_chunk(const Tile& tile) const;
  int32_t page_at(const Tile& tile, const Part& part, int32_t index) const;
  // Pages of a chunk that some row of the part sees.
  PageRange visible_pages(const Tile& tile, const Part& part, int32_t chunk) const;
  int32_t first_visible(const Tile& tile, int32_t position) const {
    return tile.args->window > 0 ? std::max(0, position - tile.args->window + 1) : 0;
  }

  const KernelTable& kernels_;
  const ElementKernels<Element>& of_;
  const ElementKernels<Element>& products_;
  const ModelShape shape_;
  const KvPages& pages_;
  const int32_t group_;  // H / G
  std::vector<Workspace> workspaces_;
};

extern template class Attention<uint16_t>;
extern template class Attention<float>;

}  // namespace rollpack::kernels::cpu
