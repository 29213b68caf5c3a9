// Draws by inverse CDF, a warp a query: the vocabulary's block, then the panel of that block, then
// the token, whose panel alone is computed once more. Then the query's result; and, when all groups
// of the step are done, which of its draws count.
#include "kernels/cuda/head_kernels.h"
#include "kernels/philox.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {
namespace {

// What the lanes of a warp share; the masses of all blocks follow it.
struct Shared {
  double token_mass[kPanelColumns];
  double panel_mass[kBlockPanels];
  float logits[kPanelColumns];
  int32_t block;
  int32_t panel;
  int32_t token;
  double before;  // running mass of what lies before the block, then before the panel
};

// logits[c] of a row against panel columns, the bits of vocabulary_bf16.cu: the row alone on the
// MMA's N side, the same chain over k.
__device__ void panel_logits(const HeadWork& work, int64_t row, int64_t first,
                             const uint16_t* /*element*/, float* logits) {
  const auto lane = static_cast<int>(threadIdx.x % kWarp);
  const int g = lane / 4, t = lane % 4 * 2;
  const DeviceMatrix& weight = work.in.weight;
  const auto* const weights = static_cast<const uint16_t*>(weight.data);
  const uint16_t* const in = static_cast<const uint16_t*>(work.in.in) + row * weight.K_in;
  const auto weight_pair = [&](int64_t column, int64_t k) -> uint32_t {
    if (column >= weight.N || k >= weight.row_stride) return 0;
    return *reinterpret_cast<const uint32_t*>(weights + column * weight.row_stride + k);
  };
  const auto row_element = [&](int64_t k) -> uint32_t { return k < weight.K_in ? in[k] : 0; };
  for (int m = 0; m < kPanelColumns / 16; ++m) {
    const int64_t column = first + m * 16 + g;
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    ROLLPACK_UNROLL(4)
    for (int64_t k = 0; k < weight.K_in; k += 16) {
      const uint32_t a[4] = {weight_pair(column, k + t), weight_pair(column + 8, k + t),
                             weight_pair(column, k + t + 8), weight_pair(column + 8, k + t + 8)};
      uint32_t b[2] = {0, 0};
      if (g == 0) {
        b[0] = row_element(k + t) | row_element(k + t + 1) << 16;
        b[1] = row_element(k + t + 8) | row_element(k + t + 9) << 16;
      }
      mma_bf16_m16n8k16(acc, a, b);
    }
    if (lane % 4 == 0) {
      logits[m * 16 + g] = acc[0];
      logits[m * 16 + g + 8] = acc[2];
    }
  }
  __syncwarp();
}

__device__ void panel_logits(const HeadWork& work, int64_t row, int64_t first,
                             const float* /*element*/, float* logits) {
  const DeviceMatrix& weight = work.in.weight;
  const float* const in = static_cast<const float*>(work.in.in) + row * weight.K_in;
  for (int c = static_cast<int>(threadIdx.x % kWarp); c < kPanelColumns; c += 32) {
    float sum = 0;
    if (first + c < weight.N) {
      const float* const column =
          static_cast<const float*>(weight.data) + (first + c) * weight.row_stride;
      for (int64_t k = 0; k < weight.K_in; ++k) sum = fmaf(in[k], column[k], sum);
    }
    logits[c] = sum;
  }
  __syncwarp();
}

// The first of `count` items whose running mass, which starts at `running`, exceeds `target`; where
// rounding leaves none, the last of non-zero mass. `running` is left at what lies before it.
__device__ int32_t pick_item(const double* masses, int64_t count, double target, double& running) {
  int32_t last = 0;
  double before_last = running;
  for (int64_t i = 0; i < count; ++i) {
    const double mass = masses[i];
    if (!(mass > 0)) continue;
    last = static_cast<int32_t>(i);
    before_last = running;
    running += mass;
    if (running > target) break;
  }
  running = before_last;
  return last;
}

template <class Element>
class Drawing {
 public:
  __device__ Drawing(const HeadWork& work, const HeadQuery& query, Shared& shared)
      : work_(work),
        memory_(work.memory),
        query_(query),
        shared_(shared),
        lane_(static_cast<int>(threadIdx.x % kWarp)),
        row_(memory_.row_stats[query.distribution]) {}

  // By inverse CDF at u.
  __device__ TokenChoice draw(double u) const {
    const int64_t at = query_.distribution * memory_.num_blocks;
    auto* const masses = reinterpret_cast<double*>(&shared_ + 1);
    for (int64_t block = lane_; block < memory_.num_blocks; block += kWarp) {
      masses[block] = memory_.block_masses[at + block];
    }
    __syncwarp();
    const double target = u * row_.total;
    double running = 0;
    if (lane_ == 0) {
      shared_.block = pick_item(masses, memory_.num_blocks, target, running);
      shared_.before = running;
    }
    __syncwarp();
    if (!work_.holds_block(shared_.block)) return {0, 0.0f};
    const int64_t first_panel = (shared_.block - memory_.first_block) * kBlockPanels;
    if (lane_ < kBlockPanels) {
      double mass = 0;
      if (first_panel + lane_ < memory_.held_panels) {
        const PanelStats& panel = panels()[first_panel + lane_];
        mass = static_cast<double>(panel.sum) * static_cast<double>(exp_f32(panel.max - row_.max));
      }
      shared_.panel_mass[lane_] = mass;
    }
    __syncwarp();
    if (lane_ == 0) {
      running = shared_.before;
      shared_.panel = pick_item(shared_.panel_mass, kBlockPanels, target, running);
      shared_.before = running;
    }
    __syncwarp();
    const int64_t first = (first_panel + shared_.panel) * kPanelColumns;
    compute_panel(first);
    for (int c = lane_; c < kPanelColumns; c += static_cast<int>(kWarp)) {
      const float x = shared_.logits[c] * query_.scale;
      shared_.token_mass[c] = first + c < work_.held_columns() ? exp_f32(x - row_.max) : 0.0f;
    }
    __syncwarp();
    if (lane_ == 0) {
      running = shared_.before;
      shared_.token = pick_item(shared_.token_mass, kPanelColumns, target, running);
    }
    __syncwarp();
    return chosen(first);
  }

  // The lowest id of the largest logit.
  __device__ TokenChoice greedy() const {
    const BlockStats* const blocks = memory_.blocks + query_.distribution * memory_.num_blocks;
    if (lane_ == 0) {
      int32_t block = 0;
      while (blocks[block].max != row_.max && block + 1 < memory_.num_blocks) ++block;
      shared_.block = block;
      if (work_.holds_block(block)) {
        auto panel = static_cast<int32_t>(block - memory_.first_block) * kBlockPanels;
        while (panels()[panel].max != row_.max && panel + 1 < memory_.held_panels) ++panel;
        shared_.panel = panel;
      }
    }
    __syncwarp();
    if (!work_.holds_block(shared_.block)) return {0, 0.0f};
    const int64_t first = static_cast<int64_t>(shared_.panel) * kPanelColumns;
    compute_panel(first);
    if (lane_ == 0) {
      int32_t token = 0;
      while (shared_.logits[token] != row_.max && token + 1 < kPanelColumns) ++token;
      shared_.token = token;
    }
    __syncwarp();
    return chosen(first);
  }

 private:
  __device__ void compute_panel(int64_t first) const {
    panel_logits(work_, work_.group.first_row + query_.row, first,
                 static_cast<const Element*>(nullptr), shared_.logits);
  }
  __device__ const PanelStats* panels() const {
    return memory_.panels + query_.distribution * memory_.held_panels;
  }
  // Of the panel that begins at this column of those held.
  __device__ TokenChoice chosen(int64_t first) const {
    const int64_t token = work_.in.part.held.begin + first + shared_.token;
    return {static_cast<int32_t>(token), shared_.logits[shared_.token]};
  }

  const HeadWork& work_;
  const HeadMemory& memory_;
  const HeadQuery& query_;
  Shared& shared_;
  const int lane_;
  const RowStats row_;
};

// log softmax of a logit, which is scaled and rounded already; rounded once.
__device__ __forceinline__ float logprob_of(const RowStats& row, float x) {
  return static_cast<float>(static_cast<double>(x) - static_cast<double>(row.max) - row.log_total);
}

// What finish_query does: all of it, or what comes before and after ranks exchange choices.
enum class Finish : uint8_t { kAll, kChoose, kConclude };

__device__ bool is_from_support(const HeadQuery& query) {
  return query.is_cut != 0 || query.is_banned != 0;
}

// Whether the query has a token: all logits are finite, and min_tokens leaves some.
__device__ bool has_token(const HeadMemory& memory, const HeadQuery& query, int32_t q) {
  return memory.row_stats[query.row].is_finite != 0 &&
         memory.row_stats[query.distribution].is_finite != 0 &&
         !(is_from_support(query) && memory.draws[q].token < 0);
}

// The query's token and logit; zeros where another rank holds it.
template <class Element>
__device__ TokenChoice choose_token(const HeadWork& work, const HeadQuery& query, int32_t q) {
  const HeadMemory& memory = work.memory;
  if (query.slot < 0) return memory.choices[q];
  if (!has_token(memory, query, q)) return {0, 0.0f};
  if (is_from_support(query)) {
    const int32_t token = memory.draws[q].token;
    if (!work.holds_token(token)) return {0, 0.0f};
    return {token, memory.logits[query.row * memory.logits_stride() + token]};
  }
  const Drawing<Element> drawing(work, query, *reinterpret_cast<Shared*>(dynamic_shared()));
  if (query.is_greedy != 0) return drawing.greedy();
  const SlotState& slot = work.in.slots.states[query.slot];
  return drawing.draw(sampling_uniform(slot.seed, slot.prompt_hash, slot.sample_index,
                                       static_cast<uint32_t>(query.position)));
}

__device__ HeadResult conclude(const HeadWork& work, const HeadQuery& query, int32_t q,
                               const TokenChoice& choice) {
  const HeadMemory& memory = work.memory;
  const RowStats unit = memory.row_stats[query.row];
  const RowStats scaled = memory.row_stats[query.distribution];
  HeadResult result;
  result.slot = query.slot;
  result.position = query.position;
  result.token = query.token;
  result.entropy = bits_as<float>(0x7fc00000u);
  result.is_finite = has_token(memory, query, q);
  if (!result.is_finite) return result;
  result.token = choice.token;
  // Of an exchange that broke off: the step fails, and nothing may read beyond the vocabulary.
  if (choice.token < 0 || choice.token >= work.V()) result.token = 0;
  result.logprob = logprob_of(unit, choice.logit);
  result.scaled_logprob = logprob_of(scaled, choice.logit * query.scale);
  if (query.wants_entropy != 0) {
    result.entropy = static_cast<float>(scaled.log_total - scaled.weighted / scaled.total);
  }
  if (is_from_support(query) && query.is_greedy == 0 && memory.draws[q].is_whole == 0) {
    const TruncatedDraw& drawn = memory.draws[q];
    const double shift = static_cast<double>(drawn.max) - static_cast<double>(scaled.max);
    const auto mass = static_cast<float>(log_f64(drawn.kept) + shift - scaled.log_total);
    result.support_logmass = mass < 0.0f ? mass : 0.0f;
  }
  return result;
}

// A block of one warp a query.
template <class Element>
__global__ void __launch_bounds__(kWarp) finish_query(HeadWork work, Finish part) {
  const auto q = static_cast<int32_t>(blockIdx.x);
  const HeadQuery query = work.memory.queries[q];
  if (query.is_skipped != 0) return;
  const TokenChoice choice =
      part == Finish::kConclude ? work.memory.choices[q] : choose_token<Element>(work, query, q);
  if (threadIdx.x != 0) return;
  if (part == Finish::kChoose) {
    work.memory.choices[q] = choice;
  } else {
    work.in.head.results[query.result] = conclude(work, query, q, choice);
  }
}

// A thread a slot that draws: the draws of a slot follow each other, and each counts if the one
// before counts, goes on and drew the token in this one's row; none if an earlier step has finished
// the sample.
__global__ void accept_draws(LmHeadInputs in) {
  const HeadRows& head = in.head;
  int32_t i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= head.num_samples || head.sample_draw[i] != 0) return;
  const int32_t index = head.sample_slot[i];
  if (index < 0) return;  // of a row that is skipped
  SlotState& slot = in.slots.states[index];
  bool counts = slot.is_finished == 0;
  for (; i < head.num_samples && head.sample_slot[i] == index; ++i) {
    HeadResult& result = head.results[i];
    if (!counts) {
      result = HeadResult{};
      result.slot = index;
      result.is_rejected = true;
      continue;
    }
    slot.pending_token = result.token;
    slot.next_position = result.position + 1;
    if (result.is_finite) {
      if (slot.num_stop_tokens > 0 && in.slots.is_stop(index, result.token)) {
        result.finish = SlotFinish::kStop;
      } else if (slot.next_position >= slot.end_position) {
        result.finish = SlotFinish::kLength;
      }
    }
    const bool goes_on = result.is_finite && result.finish == SlotFinish::kRunning;
    slot.is_finished = goes_on ? 0 : 1;
    counts = i + 1 < head.num_samples && head.sample_slot[i + 1] == index && goes_on &&
             result.token == in.rows.input_ids[head.rows[head.sample_head_row[i + 1]]];
  }
}

void finish(Stream stream, const HeadWork& work, Finish part) {
  const LaunchShape shape{
      .kernel = "finish_query",
      .grid = {.x = static_cast<uint32_t>(work.group.num_queries)},
      .block = kWarp,
      .shared_bytes = static_cast<int64_t>(sizeof(Shared)) +
                      work.memory.num_blocks * static_cast<int64_t>(sizeof(double))};
  launch(work.in.dtype == DType::kBF16 ? finish_query<uint16_t> : finish_query<float>, shape,
         stream, work, part);
}

}  // namespace

void finish_queries(Stream stream, const HeadWork& work) {
  finish(stream, work, Finish::kAll);
}

void choose_tokens(Stream stream, const HeadWork& work) {
  finish(stream, work, Finish::kChoose);
}

void conclude_queries(Stream stream, const HeadWork& work) {
  finish(stream, work, Finish::kConclude);
}

void advance_slots(Stream stream, const LmHeadInputs& in) {
  if (in.head.num_samples == 0) return;
  constexpr uint32_t kThreads = 128;
  launch(accept_draws,
         {.kernel = "accept_draws",
          .grid = {.x = (static_cast<uint32_t>(in.head.num_samples) + kThreads - 1) / kThreads},
          .block = kThreads},
         stream, in);
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
