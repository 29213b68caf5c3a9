#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/base/error.h"
#include "kernels/cpu/polynomial.h"

namespace rollpack::kernels::cpu {

template <class Element>
Attention<Element>::Attention(const KernelTable& kernels, const ModelShape& shape,
                              const KvPages& pages, int num_threads)
    : kernels_(kernels),
      of_(kernels.of<Element>()),
      shape_(shape),
      pages_(pages),
      group_(static_cast<int32_t>(shape.H / shape.G)),
      workspaces_(static_cast<size_t>(num_threads)) {
  const auto rows = static_cast<size_t>(attention_rows_per_tile(shape) * group_);
  const auto columns = static_cast<size_t>(pages.value_columns());
  for (Workspace& work : workspaces_) {
    work.q.resize(rows * static_cast<size_t>(shape.K));
    work.o.resize(rows * columns);
    work.o_chunk.resize(kTileRows * columns);
    work.max.resize(rows);
    work.sum.resize(rows);
    work.is_started.resize(rows);
    work.last_values.resize(kPageTokens * columns);
    work.scores.resize(kTileRows * kChunkKeys);
    work.p.resize(kTileRows * kChunkKeys);
  }
}

template <class Element>
int64_t Attention<Element>::workspace_bytes() const {
  const Workspace& work = workspaces_.front();
  return static_cast<int64_t>(
      (work.q.size() + work.last_values.size() + work.p.size()) * sizeof(Element) +
      (work.o.size() + work.o_chunk.size() + 2 * work.max.size() + work.scores.size()) *
          sizeof(float));
}

template <class Element>
void Attention<Element>::run(ThreadPool& pool, const StepContext& step, const AttentionArgs& args) {
  const int64_t row_width = shape_.H * shape_.K;
  for (const int32_t row : step.pad_rows) {
    std::fill_n(args.out.as<Element>() + row * row_width, row_width, Element{});
  }
  const auto num_tiles = static_cast<int64_t>(step.tiles.size());
  pool.parallel_for(num_tiles * shape_.G, [&](int64_t task, int thread) {
    const AttentionTile& rows = step.tiles[static_cast<size_t>(task / shape_.G)];
    const int32_t first_row = step.live_rows[static_cast<size_t>(rows.begin)];
    const Tile tile{.step = &step,
                    .args = &args,
                    .rows = &rows,
                    .head = task % shape_.G,
                    .first_position = step.plan().positions[static_cast<size_t>(first_row)],
                    .num_rows = rows.num_rows * group_};
    run_tile(tile, workspaces_[static_cast<size_t>(thread)]);
  });
}

template <class Element>
void Attention<Element>::run_tile(const Tile& tile, Workspace& work) const {
  load_queries(tile, work);
  std::fill_n(work.is_started.begin(), tile.num_rows, uint8_t{0});
  const int32_t last = tile.first_position + tile.rows->num_rows - 1;
  const int32_t end_chunk = last / kChunkKeys + 1;
  ChunkPages pages;
  for (int32_t chunk = first_visible(tile, tile.first_position) / kChunkKeys; chunk < end_chunk;
       ++chunk) {
    find_pages(tile, chunk, work, pages);
    for (int row = 0; row < tile.num_rows; row += kTileRows) {
      run_chunk(tile, pages, row, std::min(kTileRows, tile.num_rows - row), work);
    }
  }
  store(tile, work);
}

template <class Element>
void Attention<Element>::load_queries(const Tile& tile, Workspace& work) const {
  const int64_t K = shape_.K;
  for (int32_t row = 0; row < tile.num_rows; ++row) {
    const int32_t token_row =
        tile.step->live_rows[static_cast<size_t>(tile.rows->begin + row / group_)];
    const int64_t head = tile.head * group_ + row % group_;
    const Element* in = tile.args->q.template as<Element>() + (token_row * shape_.H + head) * K;
    std::memcpy(work.q.data() + row * K, in, static_cast<size_t>(K) * sizeof(Element));
  }
}

template <class Element>
void Attention<Element>::find_pages(const Tile& tile, int32_t chunk, Workspace& work,
                                    ChunkPages& pages) const {
  const StepPlan& plan = tile.step->plan();
  const StepSequence& sequence = plan.sequences[static_cast<size_t>(tile.rows->sequence)];
  const int32_t last = tile.first_position + tile.rows->num_rows - 1;
  const int32_t first_key =
      std::max(chunk * kChunkKeys, first_visible(tile, tile.first_position));
  const int32_t last_key = std::min(last, (chunk + 1) * kChunkKeys - 1);
  pages.first = first_key / kPageTokens;
  pages.count = last_key / kPageTokens - pages.first + 1;
  for (int i = 0; i < pages.count; ++i) {
    const int32_t page =
        plan.page_tables[static_cast<size_t>(sequence.page_table_begin + pages.first + i)];
    if (page < 0 || page >= pages_.num_pages()) {
      fail_invariant("a page table names no page where a visible key stands");
    }
    pages.keys[i] = pages_.template keys<Element>(page, tile.args->layer, tile.head);
    pages.values[i] = pages_.template values<Element>(page, tile.args->layer, tile.head);
  }
  // Slots past the tile's last visible key may hold anything, NaN included, which p = 0 would not
  // take out: they load as 0.
  const int32_t filled = last_key % kPageTokens + 1;
  if (filled == kPageTokens) return;
  const int64_t columns = pages_.value_columns();
  const Element* source = pages.values[pages.count - 1];
  Element* target = work.last_values.data();
  constexpr int32_t kWidth = sizeof(Element) == 2 ? 2 : 1;
  const int32_t whole = filled / kWidth;  // steps of tokens that are filled entirely
  std::copy_n(source, whole * columns * kWidth, target);
  std::fill(target + whole * columns * kWidth, target + kPageTokens * columns, Element{});
  if (filled % kWidth != 0) {
    for (int64_t c = 0; c < columns; ++c) {
      target[(whole * columns + c) * kWidth] = source[(whole * columns + c) * kWidth];
    }
  }
  pages.values[pages.count - 1] = target;
}

template <class Element>
void Attention<Element>::run_chunk(const Tile& tile, const ChunkPages& pages, int first_row,
                                   int num_rows, Workspace& work) const {
  const int32_t begin_key = pages.first * kPageTokens;
  const int32_t num_keys = pages.count * kPageTokens;
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape_.K));
  of_.page_scores(work.q.data() + first_row * shape_.K, shape_.K, num_rows, pages.keys,
                  pages.count, pages_.score_steps(), scale, work.scores.data());
  float max[kTileRows], sum[kTileRows];
  bool is_visible[kTileRows];
  for (int r = 0; r < num_rows; ++r) {
    const int32_t position = position_of(tile, first_row + r);
    const int32_t begin = std::max(first_visible(tile, position) - begin_key, 0);
    const int32_t end = std::min(position + 1 - begin_key, num_keys);
    is_visible[r] = begin < end;
    Element* p = work.p.data() + r * kChunkKeys;
    if (is_visible[r]) {
      of_.chunk_softmax(work.scores.data() + r * kChunkKeys, pages.count, begin, end, p, &max[r],
                        &sum[r]);
    } else {
      std::fill_n(p, num_keys, Element{});
    }
  }
  of_.page_values(work.p.data(), num_rows, pages.values, pages.count, pages_.value_columns(),
                  work.o_chunk.data());
  for (int r = 0; r < num_rows; ++r) {
    if (is_visible[r]) merge(first_row + r, r, max[r], sum[r], work);
  }
}

template <class Element>
void Attention<Element>::merge(int row, int row_of_chunk, float max, float sum,
                               Workspace& work) const {
  const auto index = static_cast<size_t>(row);
  const int64_t columns = pages_.value_columns();
  float* o = work.o.data() + row * columns;
  const float* o_chunk = work.o_chunk.data() + row_of_chunk * columns;
  if (work.is_started[index] == 0) {
    work.is_started[index] = 1;
    work.max[index] = max;
    work.sum[index] = sum;
    std::copy_n(o_chunk, columns, o);
    return;
  }
  const float merged = std::max(work.max[index], max);
  const float a = exp_f32(work.max[index] - merged);
  const float b = exp_f32(max - merged);
  kernels_.merge_chunk(o, o_chunk, a, b, columns);
  work.sum[index] = std::fmaf(work.sum[index], a, sum * b);
  work.max[index] = merged;
}

template <class Element>
void Attention<Element>::store(const Tile& tile, Workspace& work) const {
  const int64_t K = shape_.K;
  for (int32_t row = 0; row < tile.num_rows; ++row) {
    const int32_t token_row =
        tile.step->live_rows[static_cast<size_t>(tile.rows->begin + row / group_)];
    const int64_t head = tile.head * group_ + row % group_;
    Element* out = tile.args->out.template as<Element>() + (token_row * shape_.H + head) * K;
    of_.divide(work.o.data() + row * pages_.value_columns(),
               work.sum[static_cast<size_t>(row)], K, out);
  }
}

template class Attention<uint16_t>;
template class Attention<float>;

}  // namespace rollpack::kernels::cpu
