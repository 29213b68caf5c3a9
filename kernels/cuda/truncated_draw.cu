// Draws from a support: what min_tokens, top-k, top-p and min-p leave of a row whose logits are
// kept. A block works on one query. Nothing is sorted: a limit in the order (x descending, id
// ascending) is found by halving the candidates into 256 bins at a time.
//
// Masses are integers, exp(x - max) in units of 2^-44: their sums have no rounding and no order, so
// whichever thread adds first the cut is the same. A mass below half a unit, 3e-14 of the largest,
// counts as nothing.
//
// Order: stop tokens that min_tokens keeps out leave the support, then top-k, then top-p on what it
// left (the token that reaches it is kept), then min-p relative to the largest probability left.
// The draw is the inverse CDF at u over the kept tokens in the order of their ids.
#include "kernels/cuda/head_kernels.h"
#include "kernels/philox.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {
namespace {

using Mass = unsigned long long;

// Most threads of a block; small vocabularies have no work for more than a warp.
constexpr int kMaxThreads = 256;
constexpr int kMaxWarps = kMaxThreads / static_cast<int>(kWarp);
constexpr int64_t kSmallVocabulary = 8192;
constexpr int kBins = 256;
constexpr float kMassUnit = 0x1p44f;  // a vocabulary of 2^18 tokens of mass 1 fits into 63 bits
constexpr int32_t kNoId = 0x7fffffff;

// Integers in the order of the floats that they stand for; -0 and +0 are one.
__device__ __forceinline__ uint32_t order_of(float value) {
  const auto bits = bits_as<uint32_t>(value + 0.0f);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ Mass mass_of(float e) {
  return static_cast<Mass>(e * kMassUnit + 0.5f);
}

__device__ __forceinline__ void add_to_bin(Mass* bin, Mass mass) {
#ifdef ROLLPACK_SIMT_EMULATION
  *bin += mass;  // one thread of the host runs all of a block
#else
  atomicAdd(bin, mass);
#endif
}

// The last token kept, in the order of (x descending, id ascending).
struct Cut {
  uint32_t order;
  int32_t id;

  __device__ bool keeps(uint32_t of_token, int32_t token) const {
    return of_token > order || (of_token == order && token <= id);
  }
};

// What the threads of a block share; the masses of panels follow it.
struct Shared {
  Mass bins[kBins];
  Mass warp_values[kMaxWarps];
  Mass above;   // weight of tokens before the bin that was chosen
  int32_t bin;  // -1: all weights together do not reach the target
};

class Query {
 public:
  __device__ Query(const HeadWork& work, const HeadQuery& query, const float* logits,
                   Shared& shared)
      : work_(work),
        slots_(work.in.slots),
        query_(query),
        logits_(logits),
        V_(static_cast<int32_t>(work.V())),
        thread_(static_cast<int>(threadIdx.x)),
        num_threads_(static_cast<int>(blockDim.x)),
        shared_(shared) {}

  __device__ TruncatedDraw run();

 private:
  __device__ bool is_allowed(int32_t token) const {
    return query_.is_banned == 0 || !slots_.is_stop(query_.slot, token);
  }
  __device__ float x_of(int32_t token) const { return logits_[token] * query_.scale; }
  __device__ int num_warps() const { return num_threads_ / static_cast<int>(kWarp); }
  __device__ Mass sum_of_block(Mass value);
  __device__ bool find_largest();
  // Weight of a token that the cut keeps: its mass, or 1.
  __device__ Mass weight_of(float x, bool by_mass) const {
    return by_mass ? mass_of(exp_f32(x - max_)) : Mass{1};
  }
  template <class Visit>
  __device__ void visit_kept(Visit visit) const {
    for (int32_t token = thread_; token < V_; token += num_threads_) {
      if (!is_allowed(token)) continue;
      const float x = x_of(token);
      if (cut_.keeps(order_of(x), token)) visit(token, x);
    }
  }
  template <class Select>
  __device__ bool choose_bin(double target, Mass above, Select select);
  __device__ void cut_at(double target, bool by_mass);
  __device__ int32_t id_of_rank(uint32_t order, Mass rank);
  __device__ int32_t draw(TruncatedDraw& result, Mass* panel_masses);

  const HeadWork& work_;
  const Slots& slots_;
  const HeadQuery& query_;
  const float* logits_;
  const int32_t V_;
  const int thread_, num_threads_;
  Shared& shared_;
  Cut cut_ = {0, kNoId};
  float max_ = 0;
  int32_t best_ = 0;
};

// The sum of one value a thread, for all threads.
__device__ Mass Query::sum_of_block(Mass value) {
  value = warp_sum(value);
  __syncthreads();
  if (thread_ % static_cast<int>(kWarp) == 0) {
    shared_.warp_values[thread_ / static_cast<int>(kWarp)] = value;
  }
  __syncthreads();
  Mass sum = 0;
  for (int warp = 0; warp < num_warps(); ++warp) sum += shared_.warp_values[warp];
  return sum;
}

// The lowest id of the largest allowed x; false where none is allowed.
__device__ bool Query::find_largest() {
  Mass best = 0;
  for (int32_t token = thread_; token < V_; token += num_threads_) {
    if (!is_allowed(token)) continue;
    const Mass key =
        static_cast<Mass>(order_of(x_of(token))) << 32 | static_cast<uint32_t>(kNoId - token);
    best = key > best ? key : best;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const Mass other = __shfl_xor_sync(kAllLanes, best, lanes);
    best = other > best ? other : best;
  }
  if (thread_ % static_cast<int>(kWarp) == 0) {
    shared_.warp_values[thread_ / static_cast<int>(kWarp)] = best;
  }
  __syncthreads();
  for (int warp = 0; warp < num_warps(); ++warp) {
    best = shared_.warp_values[warp] > best ? shared_.warp_values[warp] : best;
  }
  if (best == 0) return false;
  best_ = kNoId - static_cast<int32_t>(best & 0xffffffffu);
  max_ = x_of(best_);
  return true;
}

// Fills the bins by select(token, x, add), which calls add(bin, weight) for tokens that count, and
// chooses the highest bin at which the weight, `above` included, reaches the target.
template <class Select>
__device__ bool Query::choose_bin(double target, Mass above, Select select) {
  __syncthreads();  // what the pass before left is read
  for (int bin = thread_; bin < kBins; bin += num_threads_) shared_.bins[bin] = 0;
  __syncthreads();
  visit_kept([&](int32_t token, float x) {
    select(token, x, [&](int bin, Mass weight) {
      if (weight != 0) add_to_bin(&shared_.bins[bin], weight);
    });
  });
  __syncthreads();
  if (thread_ == 0) {
    int bin = kBins - 1;
    for (; bin >= 0; --bin) {
      if (static_cast<double>(above + shared_.bins[bin]) >= target) break;
      above += shared_.bins[bin];
    }
    shared_.bin = bin;
    shared_.above = above;
  }
  __syncthreads();
  return shared_.bin >= 0;
}

// The id of the rank-th (from 1) kept token of this x, ids ascending.
__device__ int32_t Query::id_of_rank(uint32_t order, Mass rank) {
  int32_t first = 0;  // ids [first, first + 256 << shift) are left
  Mass before = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    // The bins are chosen from the highest on: low ids go there.
    choose_bin(static_cast<double>(rank), before, [&](int32_t token, float x, auto add) {
      const int32_t offset = token - first;
      if (order_of(x) != order || offset < 0 || offset >> shift >= kBins) return;
      add(kBins - 1 - (offset >> shift), Mass{1});
    });
    first += (kBins - 1 - shared_.bin) << shift;
    before = shared_.above;
  }
  return first;
}

// Cuts behind the first token, in descending order, at which the running weight reaches `target`.
__device__ void Query::cut_at(double target, bool by_mass) {
  const auto near_bin = [this](float x) {
    const float distance = (max_ - x) * (kBins / 32.0f);
    return distance < kBins - 1 ? kBins - 1 - static_cast<int>(distance) : 0;
  };
  if (!choose_bin(target, 0,
                  [&](int32_t, float x, auto add) { add(near_bin(x), weight_of(x, by_mass)); })) {
    return;  // rounding, or fewer tokens than top_k: all are kept
  }
  const int chosen = shared_.bin;
  Mass above = shared_.above;
  uint32_t order = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    const uint32_t high = shift == 24 ? 0 : ~uint32_t{0} << (shift + 8);
    choose_bin(target, above, [&](int32_t, float x, auto add) {
      const uint32_t own = order_of(x);
      if (near_bin(x) != chosen || (own & high) != (order & high)) return;
      add(static_cast<int>(own >> shift & 0xffu), weight_of(x, by_mass));
    });
    order |= static_cast<uint32_t>(shared_.bin) << shift;
    above = shared_.above;
  }
  // All candidates left have one x. How many of them does it take?
  const float x = bits_as<float>((order >> 31) != 0 ? order & 0x7fffffffu : ~order);
  const Mass each = weight_of(x, by_mass);
  Mass count = 0;
  visit_kept([&](int32_t, float of_token) { count += order_of(of_token) == order ? 1 : 0; });
  count = sum_of_block(count);
  const double short_of = target - static_cast<double>(above);
  Mass rank =
      each == 0 || short_of <= 0 ? 1 : static_cast<Mass>(short_of / static_cast<double>(each));
  rank = rank == 0 ? 1 : rank;
  while (rank < count && static_cast<double>(above + rank * each) < target) ++rank;
  const int32_t last = rank < count ? id_of_rank(order, rank) : kNoId;
  // Where the cut before lies at the same x it is the nearer one.
  cut_ = {order, order == cut_.order && cut_.id < last ? cut_.id : last};
}

__device__ int32_t Query::draw(TruncatedDraw& result, Mass* panel_masses) {
  const SlotState& slot = slots_.states[query_.slot];
  const float min_p = slot.min_p;
  const auto kept_mass = [&](int32_t token) {
    if (token >= V_ || !is_allowed(token)) return Mass{0};
    const float x = x_of(token);
    const float e = exp_f32(x - max_);
    return cut_.keeps(order_of(x), token) && e >= min_p ? mass_of(e) : Mass{0};
  };
  // Masses of panels, and how many tokens are kept.
  Mass count = 0;
  visit_kept([&](int32_t, float x) { count += exp_f32(x - max_) >= min_p ? 1 : 0; });
  count = sum_of_block(count);
  const auto num_panels = static_cast<int32_t>(work_.memory.num_panels);
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarp);
  Mass total = 0;
  for (int32_t panel = thread_ / static_cast<int>(kWarp); panel < num_panels;
       panel += num_warps()) {
    const int32_t first = panel * kPanelColumns + lane;
    const Mass mass = warp_sum(kept_mass(first) + kept_mass(first + 32));
    if (lane == 0) {
      panel_masses[panel] = mass;
      total += mass;
    }
  }
  total = sum_of_block(total);  // and all panels are written
  // Runs of panels, a thread each, so that one thread has short ways to go.
  const int32_t run = (num_panels + num_threads_ - 1) / num_threads_;
  Mass of_run = 0;
  for (int32_t i = thread_ * run; i < (thread_ + 1) * run && i < num_panels; ++i) {
    of_run += panel_masses[i];
  }
  shared_.bins[thread_] = of_run;
  __syncthreads();
  result.kept = static_cast<double>(total) / static_cast<double>(kMassUnit);
  result.max = max_;
  result.is_whole = count == static_cast<Mass>(V_) ? 1 : 0;
  if (thread_ != 0) return -1;
  const double u = sampling_uniform(slot.seed, slot.prompt_hash, slot.sample_index,
                                    static_cast<uint32_t>(query_.position));
  const double target = u * static_cast<double>(total);
  Mass running = 0;
  // The first of [0, count) whose running mass exceeds the target; there is one, or the last of
  // non-zero mass is taken.
  const auto pick = [&](int32_t items, auto mass_at) {
    int32_t last = 0;
    Mass before_last = running;
    for (int32_t i = 0; i < items; ++i) {
      const Mass mass = mass_at(i);
      if (mass == 0) continue;
      last = i;
      before_last = running;
      running += mass;
      if (static_cast<double>(running) > target) break;
    }
    running = before_last;
    return last;
  };
  const int32_t first_panel = run * pick(num_threads_, [&](int32_t i) { return shared_.bins[i]; });
  const int32_t panels_left = num_panels - first_panel < run ? num_panels - first_panel : run;
  const int32_t panel =
      first_panel + pick(panels_left, [&](int32_t i) { return panel_masses[first_panel + i]; });
  const int32_t token =
      pick(kPanelColumns, [&](int32_t i) { return kept_mass(panel * kPanelColumns + i); });
  return panel * kPanelColumns + token;
}

// The result, in thread 0.
__device__ TruncatedDraw Query::run() {
  TruncatedDraw result = {.kept = 0, .max = 0, .token = -1, .is_whole = 0};
  if (!find_largest()) return result;
  if (query_.is_greedy != 0) {
    result.token = best_;
    return result;
  }
  const SlotState& slot = slots_.states[query_.slot];
  if (slot.top_k > 0 && slot.top_k < V_) cut_at(slot.top_k, false);
  if (slot.top_p < 1.0f) {
    Mass total = 0;
    visit_kept([&](int32_t, float x) { total += mass_of(exp_f32(x - max_)); });
    total = sum_of_block(total);
    cut_at(static_cast<double>(slot.top_p) * static_cast<double>(total), true);
  }
  __syncthreads();  // bins are read
  result.token = draw(result, reinterpret_cast<Mass*>(&shared_ + 1));
  return result;
}

__global__ void __launch_bounds__(kMaxThreads, 4) draw_truncated_queries(HeadWork work) {
  const auto q = static_cast<int32_t>(blockIdx.x);
  const HeadQuery query = work.memory.queries[q];
  if (query.slot < 0 || (query.is_cut == 0 && query.is_banned == 0)) return;
  // Logits that are not finite have no order.
  if (work.memory.row_stats[query.row].is_finite == 0 ||
      work.memory.row_stats[query.distribution].is_finite == 0) {
    return;
  }
  Query truncated(work, query, work.memory.logits + query.row * work.memory.logits_stride(),
                  *reinterpret_cast<Shared*>(dynamic_shared()));
  const TruncatedDraw drawn = truncated.run();
  if (threadIdx.x == 0) work.memory.draws[q] = drawn;
}

}  // namespace

void draw_truncated(Stream stream, const HeadWork& work) {
  launch(draw_truncated_queries,
         {.kernel = "draw_truncated_queries",
          .grid = {.x = static_cast<uint32_t>(work.group.num_queries)},
          .block = work.V() <= kSmallVocabulary ? kWarp : kMaxThreads,
          .shared_bytes = static_cast<int64_t>(sizeof(Shared)) +
                          work.memory.num_panels * static_cast<int64_t>(sizeof(Mass))},
         stream, work);
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
