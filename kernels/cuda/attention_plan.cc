#include "kernels/cuda/attention_plan.h"

#include <algorithm>
#include <numeric>
#include <span>

namespace rollpack::kernels::cuda {
namespace {

// Consecutive live rows of one sequence, at positions [first_position, last_position].
struct Tile {
  int32_t sequence = 0;
  int32_t first_row = 0;
  int32_t num_rows = 0;
  int32_t first_position = 0;
  int32_t num_chunks = 0;
  int32_t num_shared_chunks = 0;  // leading ones that tiles of other sequences see as well

  // States that the tile needs where its chunks are items of their own.
  int32_t num_states() const { return num_rows * num_chunks; }
};

class Planner {
 public:
  Planner(const StepPlan& plan, const AttentionLimits& limits) : plan_(plan), limits_(limits) {}

  AttentionPlan run() {
    result_.row_states.assign(static_cast<size_t>(plan_.num_rows()), kNoState);
    cut_tiles();
    find_shared_chunks();
    choose_stored();
    list_shared_chunks();
    for (size_t t = 0; t < tiles_.size(); ++t) list_own_chunks(tiles_[t], is_stored_[t] != 0);
    std::ranges::stable_sort(result_.items, std::greater<>(), [](const AttentionItem& item) {
      return item.end_chunk - item.begin_chunk;
    });
    return std::move(result_);
  }

 private:
  std::span<const int32_t> table_of(const Tile& tile) const {
    const StepSequence& sequence = plan_.sequences[static_cast<size_t>(tile.sequence)];
    return std::span(plan_.page_tables)
        .subspan(static_cast<size_t>(sequence.page_table_begin),
                 static_cast<size_t>(sequence.num_pages));
  }

  void cut_tiles() {
    const int32_t max_rows = query_rows_per_item(limits_.group);
    for (size_t s = 0; s < plan_.sequences.size(); ++s) {
      const StepSequence& sequence = plan_.sequences[s];
      const int32_t end = sequence.row_begin + sequence.num_rows;
      for (int32_t row = sequence.row_begin; row < end; ++row) {
        const int32_t position = plan_.positions[static_cast<size_t>(row)];
        if (position == kPadPosition) {
          result_.pad_rows.push_back(row);
          continue;
        }
        Tile* last = tiles_.empty() ? nullptr : &tiles_.back();
        const bool joins = last != nullptr && last->sequence == static_cast<int32_t>(s) &&
                           last->num_rows < max_rows && row == last->first_row + last->num_rows;
        if (!joins) {
          tiles_.push_back(
              {.sequence = static_cast<int32_t>(s), .first_row = row, .first_position = position});
          last = &tiles_.back();
        }
        ++last->num_rows;
        last->num_chunks = position / kChunkKeys + 1;
      }
    }
    is_stored_.assign(tiles_.size(), 0);
  }

  // Leading chunks that both see whole and that lie in the same pages.
  int32_t common_chunks(const Tile& a, const Tile& b) const {
    const int32_t whole =
        std::min(a.first_position + 1, b.first_position + 1) / kChunkKeys * kChunkKeys;
    const auto num_pages = static_cast<size_t>(whole / limits_.page_tokens);
    const auto first = table_of(a).first(num_pages), second = table_of(b).first(num_pages);
    const auto common = std::ranges::mismatch(first, second).in1 - first.begin();
    return static_cast<int32_t>(common) * limits_.page_tokens / kChunkKeys;
  }

  // Tiles that fill no item of their own, by page tables: common beginnings are neighbours then.
  void find_shared_chunks() {
    const int32_t max_rows = query_rows_per_item(limits_.group);
    for (size_t t = 0; t < tiles_.size(); ++t) {
      if (2 * tiles_[t].num_rows <= max_rows && tiles_[t].num_chunks > 1) {
        order_.push_back(static_cast<int32_t>(t));
      }
    }
    std::ranges::stable_sort(order_, [this](int32_t a, int32_t b) {
      const auto first = table_of(tiles_[static_cast<size_t>(a)]);
      const auto second = table_of(tiles_[static_cast<size_t>(b)]);
      return std::ranges::lexicographical_compare(first, second);
    });
    common_.assign(order_.size(), 0);
    for (size_t i = 1; i < order_.size(); ++i) {
      Tile& a = tiles_[static_cast<size_t>(order_[i - 1])];
      Tile& b = tiles_[static_cast<size_t>(order_[i])];
      common_[i] = common_chunks(a, b);
      a.num_shared_chunks = std::max(a.num_shared_chunks, common_[i]);
      b.num_shared_chunks = std::max(b.num_shared_chunks, common_[i]);
    }
  }

  bool try_store(size_t tile) {
    if (is_stored_[tile] != 0) return true;
    if (tiles_[tile].num_states() > limits_.max_states - num_planned_states_) return false;
    num_planned_states_ += tiles_[tile].num_states();
    is_stored_[tile] = 1;
    return true;
  }

  // Which tiles keep a state a chunk: those that share chunks, then those that would still run
  // when all others are done, longest first, as far as memory goes.
  void choose_stored() {
    for (size_t t = 0; t < tiles_.size(); ++t) {
      if (tiles_[t].num_shared_chunks > 0 && !try_store(t)) tiles_[t].num_shared_chunks = 0;
    }
    int64_t total = 0;
    for (const Tile& tile : tiles_) total += tile.num_chunks;
    const int64_t fair = (total * limits_.num_kv_heads + limits_.wanted_blocks - 1) /
                         std::max(limits_.wanted_blocks, 1);
    std::vector<int32_t> longest(tiles_.size());
    std::iota(longest.begin(), longest.end(), 0);
    std::ranges::stable_sort(longest, std::greater<>(), [this](int32_t t) {
      return tiles_[static_cast<size_t>(t)].num_chunks;
    });
    for (const int32_t t : longest) {
      if (tiles_[static_cast<size_t>(t)].num_chunks <= std::max<int64_t>(fair, 1)) break;
      if (!try_store(static_cast<size_t>(t))) break;
    }
  }

  // Chunk by chunk, the runs of neighbours that have it in common; a tile without memory for its
  // states ends a run.
  void list_shared_chunks() {
    const int32_t max_rows = query_rows_per_item(limits_.group);
    int32_t most = 0;
    for (const int32_t common : common_) most = std::max(most, common);
    for (int32_t chunk = 0; chunk < most; ++chunk) {
      for (size_t begin = 0; begin < order_.size();) {
        size_t end = begin + 1;
        while (end < order_.size() && common_[end] > chunk) ++end;
        list_run(begin, end, chunk, max_rows);
        begin = end;
      }
    }
  }

  void list_run(size_t begin, size_t end, int32_t chunk, int32_t max_rows) {
    AttentionItem item;
    const auto flush = [&] {
      if (item.num_rows > 0) result_.items.push_back(item);
      item = {};
    };
    for (size_t i = begin; i < end; ++i) {
      const Tile& tile = tiles_[static_cast<size_t>(order_[i])];
      if (tile.num_shared_chunks <= chunk) continue;
      if (item.num_rows + tile.num_rows > max_rows) flush();
      if (item.num_rows == 0) {
        item = {.first_row = static_cast<int32_t>(result_.item_rows.size()),
                .page_table = plan_.sequences[static_cast<size_t>(tile.sequence)].page_table_begin,
                .begin_chunk = chunk,
                .end_chunk = chunk + 1};
      }
      for (int32_t row = 0; row < tile.num_rows; ++row) {
        result_.item_rows.push_back(tile.first_row + row);
      }
      item.num_rows += tile.num_rows;
    }
    flush();
  }

  void list_own_chunks(const Tile& tile, bool is_stored) {
    AttentionItem item{
        .first_row = static_cast<int32_t>(result_.item_rows.size()),
        .num_rows = tile.num_rows,
        .page_table = plan_.sequences[static_cast<size_t>(tile.sequence)].page_table_begin,
        .end_chunk = tile.num_chunks,
        .is_direct = is_stored ? 0 : 1};
    for (int32_t row = 0; row < tile.num_rows; ++row) {
      result_.item_rows.push_back(tile.first_row + row);
    }
    if (!is_stored) {
      result_.items.push_back(item);
      return;
    }
    for (int32_t chunk = tile.num_shared_chunks; chunk < tile.num_chunks; ++chunk) {
      item.begin_chunk = chunk;
      item.end_chunk = chunk + 1;
      result_.items.push_back(item);
    }
    for (int32_t i = 0; i < tile.num_rows; ++i) {
      result_.row_states[static_cast<size_t>(tile.first_row + i)] = result_.num_states;
      result_.num_states += (tile.first_position + i) / kChunkKeys + 1;
    }
  }

  const StepPlan& plan_;
  const AttentionLimits limits_;
  AttentionPlan result_;
  std::vector<Tile> tiles_;
  std::vector<uint8_t> is_stored_;  // [tiles] keeps a state a chunk
  std::vector<int32_t> order_;      // tiles that may share, by page tables
  std::vector<int32_t> common_;     // [order_] chunks in common with the one before
  int32_t num_planned_states_ = 0;
};

}  // namespace

AttentionPlan plan_attention(const StepPlan& plan, const AttentionLimits& limits) {
  return Planner(plan, limits).run();
}

}  // namespace rollpack::kernels::cuda
