#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/base/error.h"
#include "kernels/cpu/panel_shares.h"

namespace rollpack::kernels::cpu {

template <class Element>
Attention<Element>::Attention(const KernelTable& kernels, const KernelTable& products,
                              const ModelShape& shape, const KvPages& pages, int num_threads)
    : kernels_(kernels),
      of_(kernels.of<Element>()),
      products_(products.of<Element>()),
      shape_(shape),
      pages_(pages),
      group_(static_cast<int32_t>(shape.H / shape.G)),
      workspaces_(static_cast<size_t>(num_threads)) {
  const auto rows = static_cast<size_t>(attention_rows_per_tile(shape) * group_);
  const auto columns = static_cast<size_t>(pages.value_columns());
  for (Workspace& work : workspaces_) {
    work.q.resize(rows * static_cast<size_t>(shape.K));
    work.o.resize(rows * columns);
    work.o_chunk.resize(rows * columns);
    work.states.resize(rows);
    work.chunk.resize(rows);
    work.is_started.resize(rows);
    work.is_visible.resize(rows);
    work.last_values.resize(kPageTokens * columns);
    work.scores.resize(rows * kChunkKeys);
    work.p.resize(rows * kChunkKeys);
  }
}

template <class Element>
int64_t Attention<Element>::workspace_bytes() const {
  const Workspace& work = workspaces_.front();
  return static_cast<int64_t>(
      (work.q.size() + work.last_values.size() + work.p.size()) * sizeof(Element) +
      (work.o.size() + work.o_chunk.size() + work.scores.size()) * sizeof(float) +
      (work.states.size() + work.chunk.size()) * sizeof(SoftmaxState));
}

template <class Element>
void Attention<Element>::run(ThreadPool& pool, const StepContext& step, const AttentionArgs& args) {
  const int64_t row_width = shape_.H * shape_.K, stride = args.out.cols();
  for (const int32_t row : step.pad_rows) {
    std::fill_n(args.out.as<Element>() + row * stride + args.out_begin, row_width, Element{});
  }
  PanelShares shares(static_cast<int64_t>(step.tiles.size()) * shape_.G, pool.num_threads());
  shares.run(pool, [&](int64_t item, int64_t next_item, int thread) {
    const Tile next = tile_at(step, args, std::max<int64_t>(next_item, 0));
    run_tile(tile_at(step, args, item), next_item < 0 ? nullptr : &next,
             workspaces_[static_cast<size_t>(thread)]);
  });
}

template <class Element>
typename Attention<Element>::Tile Attention<Element>::tile_at(const StepContext& step,
                                                              const AttentionArgs& args,
                                                              int64_t item) const {
  const AttentionTile& rows = step.tiles[static_cast<size_t>(item / shape_.G)];
  // In a window a page that siblings share may be out of sight for some of them.
  return {.step = &step,
          .args = &args,
          .rows = &rows,
          .head = item % shape_.G,
          .num_shared_pages = args.window > 0 ? 0 : rows.num_shared_pages};
}

template <class Element>
template <class Visit>
void Attention<Element>::for_parts(const Tile& tile, Visit visit) const {
  int first_row = 0;
  for (int32_t i = 0; i < tile.rows->num_parts; ++i) {
    const Part part = part_at(tile, i, first_row);
    visit(part, i);
    first_row += part.num_rows;
  }
}

template <class Element>
int32_t Attention<Element>::first_chunk(const Tile& tile) const {
  int32_t first_key = tile.rows->last_position;
  for_parts(tile, [&](const Part& part, int32_t) {
    first_key = std::min(first_key, first_visible(tile, part.rows->first_position));
  });
  return first_key / kChunkKeys;
}

template <class Element>
void Attention<Element>::run_tile(const Tile& tile, const Tile* next, Workspace& work) const {
  load_queries(tile, work);
  std::fill_n(work.is_started.begin(), tile.rows->num_rows * group_, uint8_t{0});
  const int32_t end_chunk = tile.rows->last_position / kChunkKeys + 1;
  for (int32_t chunk = first_chunk(tile); chunk < end_chunk; ++chunk) {
    if (shared_pages(tile, chunk).count() > 0) {
      run_shared_chunk(tile, chunk, next, work);
    } else {
      run_chunk(tile, chunk, next, work);
    }
  }
  store(tile, work);
}

template <class Element>
void Attention<Element>::load_queries(const Tile& tile, Workspace& work) const {
  const int64_t K = shape_.K;
  for_parts(tile, [&](const Part& part, int32_t) {
    for (int32_t row = 0; row < part.num_rows; ++row) {
      const int32_t token_row =
          tile.step->live_rows[static_cast<size_t>(part.rows->begin + row / group_)];
      const int64_t head = tile.head * group_ + row % group_;
      const Element* in = tile.args->q.template as<Element>() + (token_row * shape_.H + head) * K;
      std::memcpy(work.q.data() + (part.first_row + row) * K, in,
                  static_cast<size_t>(K) * sizeof(Element));
    }
  });
}

template <class Element>
int32_t Attention<Element>::page_at(const Tile& tile, const Part& part, int32_t index) const {
  const StepPlan& plan = tile.step->plan();
  const StepSequence& sequence = plan.sequences[static_cast<size_t>(part.rows->sequence)];
  const int32_t page = plan.page_tables[static_cast<size_t>(sequence.page_table_begin + index)];
  if (page < 0 || page >= pages_.num_pages()) {
    fail_invariant("a page table names no page where a visible key stands");
  }
  return page;
}

template <class Element>
typename Attention<Element>::PageRange Attention<Element>::visible_pages(const Tile& tile,
                                                                         const Part& part,
                                                                         int32_t chunk) const {
  const int32_t last = part.rows->first_position + part.rows->num_rows - 1;
  const int32_t first_key =
      std::max(chunk * kChunkKeys, first_visible(tile, part.rows->first_position));
  const int32_t end_key = std::min(last + 1, (chunk + 1) * kChunkKeys);
  if (first_key >= end_key) return {};
  return {.begin = first_key / kPageTokens, .end = (end_key - 1) / kPageTokens + 1};
}

template <class Element>
void Attention<Element>::look_ahead(const Tile& tile, const Part& part, PageRange pages,
                                    int num_rows, Workspace& work) const {
  PagesAhead& ahead = work.ahead;
  ahead = {.count = pages.count(), .lines_per_page = pages_.block_bytes() / 64};
  for (int i = 0; i < ahead.count; ++i) {
    ahead.pages[i] =
        pages_.block_at(page_at(tile, part, pages.begin + i), tile.args->layer, tile.head);
  }
  // About one call for every four pages of the rows at hand, in scores and in values.
  const int passes = (num_rows + kTileRows - 1) / kTileRows;
  const int64_t calls = std::max(2 * passes * std::max(ahead.count / 4, 1), 1);
  ahead.lines_per_call = (ahead.count * ahead.lines_per_page + calls - 1) / calls;
}

template <class Element>
void Attention<Element>::look_ahead_to_chunk(const Tile& tile, int32_t chunk, const Tile* next,
                                             int num_rows, Workspace& work) const {
  if (chunk > tile.rows->last_position / kChunkKeys) {
    work.ahead = {};
    if (next != nullptr) look_ahead_to_chunk(*next, first_chunk(*next), nullptr, num_rows, work);
    return;
  }
  const Part first = part_at(tile, 0, 0);
  const PageRange shared = shared_pages(tile, chunk);
  look_ahead(tile, first, shared.count() > 0 ? shared : visible_pages(tile, first, chunk), num_rows,
             work);
}

// No page is shared: part by part.
template <class Element>
void Attention<Element>::run_chunk(const Tile& tile, int32_t chunk, const Tile* next,
                                   Workspace& work) const {
  for_parts(tile, [&](const Part& part, int32_t index) {
    if (index + 1 < tile.rows->num_parts) {
      const Part follower = part_at(tile, index + 1, 0);
      look_ahead(tile, follower, visible_pages(tile, follower, chunk), part.num_rows, work);
    } else {
      look_ahead_to_chunk(tile, chunk + 1, next, part.num_rows, work);
    }
    const PageRange pages = visible_pages(tile, part, chunk);
    score(tile, part, chunk, pages, work);
    soften(tile, part, chunk, pages, work);
    weigh(tile, part, chunk, pages, false, work);
    merge(part, work);
  });
}

// Shared pages meet all rows of the tile, then each sequence's other pages its own rows; sums run
// over keys ascending all the same, since what is shared comes first.
template <class Element>
void Attention<Element>::run_shared_chunk(const Tile& tile, int32_t chunk, const Tile* next,
                                          Workspace& work) const {
  const PageRange shared = shared_pages(tile, chunk);
  Part all = part_at(tile, 0, 0);
  all.num_rows = tile.rows->num_rows * group_;
  const auto own_pages = [&](const Part& part) {
    return PageRange{shared.end, std::max(visible_pages(tile, part, chunk).end, shared.end)};
  };
  if (own_pages(part_at(tile, 0, 0)).count() > 0) {
    const Part first = part_at(tile, 0, 0);
    look_ahead(tile, first, own_pages(first), all.num_rows / 2, work);
  } else {
    look_ahead_to_chunk(tile, chunk + 1, next, all.num_rows, work);
  }
  score(tile, all, chunk, shared, work);
  for_parts(tile, [&](const Part& part, int32_t index) {
    if (own_pages(part).count() > 0 && index + 1 < tile.rows->num_parts) {
      const Part follower = part_at(tile, index + 1, 0);
      look_ahead(tile, follower, own_pages(follower), part.num_rows / 2, work);
    }
    score(tile, part, chunk, own_pages(part), work);
    soften(tile, part, chunk, {shared.begin, own_pages(part).end}, work);
  });
  if (own_pages(part_at(tile, 0, 0)).count() > 0) {
    look_ahead_to_chunk(tile, chunk + 1, next, all.num_rows, work);
  }
  weigh(tile, all, chunk, shared, false, work);
  for_parts(tile, [&](const Part& part, int32_t) {
    weigh(tile, part, chunk, own_pages(part), true, work);
    merge(part, work);
  });
}

template <class Element>
void Attention<Element>::score(const Tile& tile, const Part& part, int32_t chunk, PageRange pages,
                               Workspace& work) const {
  if (pages.count() == 0) return;
  PagePointers keys;
  for (int i = 0; i < pages.count(); ++i) {
    keys[i] = pages_.template keys<Element>(page_at(tile, part, pages.begin + i), tile.args->layer,
                                            tile.head);
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape_.K));
  const int64_t column = (pages.begin - chunk * kChunkPages) * kPageTokens;
  products_.page_scores(work.q.data() + part.first_row * shape_.K, shape_.K, part.num_rows, keys,
                        pages.count(), pages_.score_steps(), scale,
                        work.scores.data() + part.first_row * kChunkKeys + column, work.ahead);
}

// Scores to weights; `pages` are all that the part sees of the chunk.
template <class Element>
void Attention<Element>::soften(const Tile& tile, const Part& part, int32_t chunk, PageRange pages,
                                Workspace& work) const {
  const int32_t begin_key = pages.begin * kPageTokens;
  const int32_t num_keys = pages.count() * kPageTokens;
  const int64_t column = (pages.begin - chunk * kChunkPages) * kPageTokens;
  for (int r = 0; r < part.num_rows; ++r) {
    const int row = part.first_row + r;
    const int32_t position = part.rows->first_position + r / group_;
    const int32_t begin = std::max(first_visible(tile, position) - begin_key, 0);
    const int32_t end = std::min(position + 1 - begin_key, num_keys);
    const bool is_visible = begin < end;
    work.is_visible[static_cast<size_t>(row)] = is_visible;
    Element* p = work.p.data() + row * kChunkKeys + column;
    if (is_visible) {
      SoftmaxState& state = work.chunk[static_cast<size_t>(row)];
      of_.chunk_softmax(work.scores.data() + row * kChunkKeys + column, pages.count(), begin, end,
                        p, &state.max, &state.sum);
    } else {
      std::fill_n(p, num_keys, Element{});
    }
  }
}

template <class Element>
void Attention<Element>::weigh(const Tile& tile, const Part& part, int32_t chunk, PageRange pages,
                               bool continues, Workspace& work) const {
  if (pages.count() == 0) return;
  PagePointers values;
  for (int i = 0; i < pages.count(); ++i) {
    values[i] = pages_.template values<Element>(page_at(tile, part, pages.begin + i),
                                                tile.args->layer, tile.head);
  }
  const int32_t last = part.rows->first_position + part.rows->num_rows - 1;
  if (pages.end * kPageTokens > last + 1) {
    clear_past_last_key(last, values[pages.count() - 1], work);
  }
  const int64_t columns = pages_.value_columns();
  const int64_t column = (pages.begin - chunk * kChunkPages) * kPageTokens;
  products_.page_values(work.p.data() + part.first_row * kChunkKeys + column, part.num_rows, values,
                        pages.count(), columns, continues,
                        work.o_chunk.data() + part.first_row * columns, work.ahead);
}

// Slots past the last visible key may hold anything, NaN included, which p = 0 would not take out:
// they load as 0.
template <class Element>
void Attention<Element>::clear_past_last_key(int32_t last_key, const Element*& values,
                                             Workspace& work) const {
  const int32_t filled = last_key % kPageTokens + 1;
  const int64_t columns = pages_.value_columns();
  Element* target = work.last_values.data();
  constexpr int32_t kWidth = sizeof(Element) == 2 ? 2 : 1;
  const int32_t whole = filled / kWidth;  // steps of tokens that are filled entirely
  std::copy_n(values, whole * columns * kWidth, target);
  std::fill(target + whole * columns * kWidth, target + kPageTokens * columns, Element{});
  if (filled % kWidth != 0) {
    for (int64_t c = 0; c < columns; ++c) {
      target[(whole * columns + c) * kWidth] = values[(whole * columns + c) * kWidth];
    }
  }
  values = target;
}

template <class Element>
void Attention<Element>::merge(const Part& part, Workspace& work) const {
  const int64_t columns = pages_.value_columns();
  for (int row = part.first_row; row < part.first_row + part.num_rows; ++row) {
    const auto index = static_cast<size_t>(row);
    if (work.is_visible[index] == 0) continue;
    float* o = work.o.data() + row * columns;
    const float* o_chunk = work.o_chunk.data() + row * columns;
    const SoftmaxState& chunk = work.chunk[index];
    if (work.is_started[index] != 0) {
      kernels_.merge_chunk(o, &work.states[index], o_chunk, chunk.max, chunk.sum, columns);
      continue;
    }
    work.is_started[index] = 1;
    work.states[index] = chunk;
    std::copy_n(o_chunk, columns, o);
  }
}

template <class Element>
void Attention<Element>::store(const Tile& tile, Workspace& work) const {
  const int64_t K = shape_.K;
  for_parts(tile, [&](const Part& part, int32_t) {
    for (int32_t row = 0; row < part.num_rows; ++row) {
      const int32_t token_row =
          tile.step->live_rows[static_cast<size_t>(part.rows->begin + row / group_)];
      const int64_t head = tile.head * group_ + row % group_;
      Element* out = tile.args->out.template as<Element>() + token_row * tile.args->out.cols() +
                     tile.args->out_begin + head * K;
      const int own_row = part.first_row + row;
      of_.divide(work.o.data() + own_row * pages_.value_columns(),
                 work.states[static_cast<size_t>(own_row)].sum, K, out);
    }
  });
}

template class Attention<uint16_t>;
template class Attention<float>;

}  // namespace rollpack::kernels::cpu
