// Causal attention over paged keys and values, one code path for prefill and decode. Threads claim
// (tile of query rows, KV head) pairs; the tile's rows are its query rows times the H / G heads
// that share the KV head. Numerics: kernels/cpu/README.md.
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
  Attention(const KernelTable& kernels, const ModelShape& shape, const KvPages& pages,
            int num_threads);

  void run(ThreadPool& pool, const StepContext& step, const AttentionArgs& args);

  // Bytes of one thread's workspace.
  int64_t workspace_bytes() const;

 private:
  // One thread's memory, for one tile at a time.
  struct Workspace {
    std::vector<Element> q;           // [tile rows][K]
    std::vector<float> o, o_chunk;    // [tile rows][value_columns], [kTileRows][value_columns]
    std::vector<float> max, sum;      // [tile rows]: m and l of the chunks merged so far
    std::vector<uint8_t> is_started;  // [tile rows]: some chunk was merged
    std::vector<Element> last_values; // one value page, zeros past the last visible key
    std::vector<float> scores;        // [kTileRows][kChunkKeys]
    std::vector<Element> p;           // [kTileRows][kChunkKeys]
  };
  // The tile at hand.
  struct Tile {
    const StepContext* step = nullptr;
    const AttentionArgs* args = nullptr;
    const AttentionTile* rows = nullptr;
    int64_t head = 0;            // KV head
    int32_t first_position = 0;  // of the tile's first query row
    int32_t num_rows = 0;        // query rows * H / G
  };
  // Pages of one chunk that the tile sees: absolute pages [first, first + count).
  struct ChunkPages {
    int32_t first = 0;
    int count = 0;
    const Element* keys[kChunkPages];
    const Element* values[kChunkPages];
  };

  void run_tile(const Tile& tile, Workspace& work) const;
  void load_queries(const Tile& tile, Workspace& work) const;
  void find_pages(const Tile& tile, int32_t chunk, Workspace& work, ChunkPages& pages) const;
  void run_chunk(const Tile& tile, const ChunkPages& pages, int first_row, int num_rows,
                 Workspace& work) const;
  void merge(int row, int row_of_chunk, float max, float sum, Workspace& work) const;
  void store(const Tile& tile, Workspace& work) const;

  int32_t position_of(const Tile& tile, int row) const {
    return tile.first_position + row / group_;
  }
  int32_t first_visible(const Tile& tile, int32_t position) const {
    return tile.args->window > 0 ? std::max(0, position - tile.args->window + 1) : 0;
  }

  const KernelTable& kernels_;
  const ElementKernels<Element>& of_;
  const ModelShape shape_;
  const KvPages& pages_;
  const int32_t group_;  // H / G
  std::vector<Workspace> workspaces_;
};

extern template class Attention<uint16_t>;
extern template class Attention<float>;

}  // namespace rollpack::kernels::cpu
