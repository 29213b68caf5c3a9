#include "kernels/communicator/shared_memory_communicator.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::kernels {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSpins = 400;  // pauses of some 50 ns
constexpr std::chrono::milliseconds kYieldTime{2};
constexpr std::chrono::microseconds kSleep{100};
constexpr std::chrono::milliseconds kLossInterval{10};

template <class T>
void combine(T* into, const std::byte* from, int64_t count, Reduction reduction) {
  for (int64_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, from + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    if (reduction == Reduction::kMax) {
      into[i] = value > into[i] ? value : into[i];
    } else if (reduction == Reduction::kMin) {
      into[i] = value < into[i] ? value : into[i];
    } else if constexpr (std::is_integral_v<T>) {
      using Unsigned = std::make_unsigned_t<T>;
      into[i] = static_cast<T>(static_cast<Unsigned>(into[i]) + static_cast<Unsigned>(value));
    }
  }
}

// Calls visit(T{}) for the number's type.
template <class Visit>
void with_type(Number number, const Visit& visit) {
  switch (number) {
    case Number::kU8:
      return visit(uint8_t{});
    case Number::kI32:
      return visit(int32_t{});
    case Number::kI64:
      return visit(int64_t{});
    case Number::kU32:
      return visit(uint32_t{});
    case Number::kU64:
      return visit(uint64_t{});
    case Number::kF32:
      return visit(float{});
    case Number::kF64:
      return visit(double{});
  }
}

}  // namespace

// What a rank shows the others; written by itself alone.
struct alignas(64) SharedMemoryCommunicator::RankState {
  uint64_t posted = 0;         // its last round
  uint32_t given_up = 0;       // 1 + the rank for which it goes on no more, itself where it failed
  uint64_t calls[2] = {0, 0};  // what it does in the round of the slot
};

// One call: its name, its deadline, and its arguments as a number that all ranks have in common.
class SharedMemoryCommunicator::Call {
 public:
  Call(SharedMemoryCommunicator& communicator, const char* name,
       std::initializer_list<int64_t> arguments)
      : name(name),
        start(Clock::now()),
        deadline(start + communicator.options_.timeout),
        communicator_(communicator) {
    if (communicator.has_failed_) {
      throw Error({.code = ErrorCode::kFailedPrecondition,
                   .field = name,
                   .message = "an earlier call between the ranks of this replica has failed"});
    }
    digest = 14695981039346656037ull;
    for (const char* c = name; *c != '\0'; ++c) mix(static_cast<uint64_t>(*c));
    for (const int64_t argument : arguments) mix(static_cast<uint64_t>(argument));
  }
  ~Call() {
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    // Relaxed: a figure for reports; only the rank's own thread adds to it.
    communicator_.seconds_.store(communicator_.seconds() + seconds, std::memory_order_relaxed);
  }

  const char* const name;
  const Clock::time_point start, deadline;
  uint64_t digest = 0;

 private:
  void mix(uint64_t value) { digest = (digest ^ value) * 1099511628211ull; }

  SharedMemoryCommunicator& communicator_;
};

int64_t SharedMemoryCommunicator::region_bytes(int32_t size, int64_t slot_bytes) {
  return size * (static_cast<int64_t>(sizeof(RankState)) + 2 * slot_bytes);
}

SharedMemoryCommunicator::SharedMemoryCommunicator(std::shared_ptr<std::byte> region,
                                                   SharedMemoryOptions options, int64_t slot_bytes)
    : region_(std::move(region)), options_(std::move(options)), slot_bytes_(slot_bytes) {
  if (slot_bytes <= 0 || slot_bytes % 64 != 0) fail_invariant("a slot is whole cache lines");
}

SharedMemoryCommunicator::~SharedMemoryCommunicator() = default;

SharedMemoryCommunicator::RankState& SharedMemoryCommunicator::state(int32_t rank) const {
  return reinterpret_cast<RankState*>(region_.get())[rank];
}

std::byte* SharedMemoryCommunicator::slot(int32_t rank) const {
  const int64_t states = size() * static_cast<int64_t>(sizeof(RankState));
  const int64_t index = 2 * int64_t{rank} + static_cast<int64_t>(round_ % 2);
  return region_.get() + states + index * slot_bytes_;
}

bool SharedMemoryCommunicator::has_posted(int32_t rank) const {
  // Acquire: pairs with the release in round(), so that the slot's bytes are there.
  return std::atomic_ref(state(rank).posted).load(std::memory_order_acquire) >= round_;
}

void SharedMemoryCommunicator::give_up(int32_t missing) {
  uint32_t unset = 0;
  // Release: pairs with the load in wait_for_all(). The first reason stays.
  std::atomic_ref(state(rank()).given_up)
      .compare_exchange_strong(unset, static_cast<uint32_t>(missing) + 1, std::memory_order_release,
                               std::memory_order_relaxed);
}

int32_t SharedMemoryCommunicator::find_lost_rank() const {
  for (int32_t peer = 0; peer < size(); ++peer) {
    // Acquire: pairs with the store in give_up().
    const uint32_t given_up = std::atomic_ref(state(peer).given_up).load(std::memory_order_acquire);
    if (given_up != 0) return static_cast<int32_t>(given_up) - 1;
  }
  return options_.find_lost_rank();
}

void SharedMemoryCommunicator::abandon() {
  give_up(rank());
}

void SharedMemoryCommunicator::fail(const Call& call, bool is_late, int32_t lost) {
  std::vector<int32_t> missing;
  for (int32_t peer = 0; peer < size(); ++peer) {
    if (peer == lost || (lost < 0 && !has_posted(peer))) missing.push_back(peer);
  }
  has_failed_ = true;
  give_up(missing.empty() ? rank() : missing.front());
  const auto waited =
      std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - call.start);
  // Never deadline_exceeded: to whoever waits for a step that means "not yet".
  throw Error({.code = ErrorCode::kUnavailable,
               .field = call.name,
               .value = fmt::format("rank {} of {} ranks of this replica is missing",
                                    fmt::join(missing, ", "), size()),
               .message = is_late          ? fmt::format("it did not come in {} ms", waited.count())
                          : lost == rank() ? "the others have given it up"
                                           : "it has failed, or its process has ended"});
}

void SharedMemoryCommunicator::wait_for_all(const Call& call) {
  int spins = 0;
  Clock::time_point loss_due{}, sleep_from{};
  for (int32_t peer = 0; peer < size(); ++peer) {
    while (!has_posted(peer)) {
      if (++spins < kSpins) {
        _mm_pause();
        continue;
      }
      const Clock::time_point now = Clock::now();
      if (spins == kSpins) {
        sleep_from = now + kYieldTime;
        loss_due = now + kLossInterval;
      }
      for (int32_t other = 0; other < size(); ++other) {
        // Acquire: pairs with the store in give_up().
        const uint32_t given_up =
            std::atomic_ref(state(other).given_up).load(std::memory_order_acquire);
        if (given_up == 0 || has_posted(peer)) continue;
        fail(call, /*is_late=*/false, static_cast<int32_t>(given_up) - 1);
      }
      if (now >= loss_due) {
        loss_due = now + kLossInterval;
        const int32_t lost = options_.find_lost_rank();
        if (lost >= 0 && !has_posted(peer)) fail(call, /*is_late=*/false, lost);
      }
      if (now >= call.deadline) fail(call, /*is_late=*/true, -1);
      if (now < sleep_from) {
        ::sched_yield();
      } else {
        std::this_thread::sleep_for(kSleep);
      }
    }
  }
}

// write(slot) fills this rank's slot; read(rank, slot) is called for every rank, in rank order.
template <class Write, class Read>
void SharedMemoryCommunicator::round(const Call& call, const Write& write, const Read& read) {
  ++round_;
  write(slot(rank()));
  state(rank()).calls[round_ % 2] = call.digest;
  std::atomic_ref(state(rank()).posted).store(round_, std::memory_order_release);
  wait_for_all(call);
  for (int32_t peer = 0; peer < size(); ++peer) {
    if (state(peer).calls[round_ % 2] == call.digest) continue;
    has_failed_ = true;
    abandon();
    throw Error({.code = ErrorCode::kInternal,
                 .field = call.name,
                 .value = fmt::format("rank {} makes another call than rank {}", peer, rank()),
                 .message = "the ranks of this replica do not compute the same step"});
  }
  for (int32_t peer = 0; peer < size(); ++peer) read(peer, slot(peer));
}

void SharedMemoryCommunicator::gather_columns(const GatherColumnsArgs& args) {
  const std::span<const int64_t> starts = args.starts;
  if (static_cast<int32_t>(starts.size()) != size() + 1) fail_invariant("a start for every rank");
  int64_t widest = 0;
  for (int32_t peer = 0; peer < size(); ++peer) {
    const auto index = static_cast<size_t>(peer);
    widest = std::max(widest, starts[index + 1] - starts[index]);
  }
  Call call(*this, "gather_columns", {args.rows, starts.back(), widest});
  if (args.rows == 0 || widest == 0) return;
  const int64_t max_rows = std::max<int64_t>(1, slot_bytes_ / widest);
  // Bytes [begin, end) of each row's part; rows longer than a slot go in several rounds.
  for (int64_t row = 0; row < args.rows; row += max_rows) {
    const int64_t rows = std::min(max_rows, args.rows - row);
    for (int64_t begin = 0; begin < widest; begin += slot_bytes_) {
      const auto width_of = [&](int32_t peer) {
        const auto index = static_cast<size_t>(peer);
        const int64_t width = starts[index + 1] - starts[index];
        return std::max<int64_t>(0, std::min(width, begin + slot_bytes_) - begin);
      };
      const auto* in = static_cast<const std::byte*>(args.in) + row * args.in_stride + begin;
      round(
          call,
          [&](std::byte* slot) {
            const auto width = static_cast<size_t>(width_of(rank()));
            for (int64_t r = 0; width > 0 && r < rows; ++r) {
              std::memcpy(slot + r * static_cast<int64_t>(width), in + r * args.in_stride, width);
            }
          },
          [&](int32_t peer, const std::byte* slot) {
            const auto width = static_cast<size_t>(width_of(peer));
            std::byte* out = static_cast<std::byte*>(args.out) + row * args.out_stride +
                             starts[static_cast<size_t>(peer)] + begin;
            if (width == 0 || (peer == rank() && out == in)) return;
            for (int64_t r = 0; r < rows; ++r) {
              std::memcpy(out + r * args.out_stride, slot + r * static_cast<int64_t>(width), width);
            }
          });
    }
  }
}

void SharedMemoryCommunicator::broadcast(std::span<std::byte> values, int32_t root) {
  const auto bytes = static_cast<int64_t>(values.size());
  if (root < 0 || root >= size()) fail_invariant("broadcast: no such rank");
  Call call(*this, "broadcast", {bytes, root});
  for (int64_t begin = 0; begin < bytes; begin += slot_bytes_) {
    const auto length = static_cast<size_t>(std::min(slot_bytes_, bytes - begin));
    round(
        call,
        [&](std::byte* slot) {
          if (rank() == root) std::memcpy(slot, values.data() + begin, length);
        },
        [&](int32_t peer, const std::byte* slot) {
          if (peer == root && rank() != root) std::memcpy(values.data() + begin, slot, length);
        });
  }
}

void SharedMemoryCommunicator::barrier() {
  Call call(*this, "barrier", {});
  round(
      call, [](std::byte*) {}, [](int32_t, const std::byte*) {});
}

void SharedMemoryCommunicator::reduce(const AllReduceArgs& args) {
  Call call(*this, "all_reduce",
            {args.count, static_cast<int64_t>(args.number), static_cast<int64_t>(args.reduction)});
  with_type(args.number, [&](auto zero) {
    using T = decltype(zero);
    T* const values = static_cast<T*>(args.values);
    const int64_t at_once = slot_bytes_ / static_cast<int64_t>(sizeof(T));
    for (int64_t begin = 0; begin < args.count; begin += at_once) {
      const int64_t count = std::min(at_once, args.count - begin);
      const size_t bytes = static_cast<size_t>(count) * sizeof(T);
      round(
          call, [&](std::byte* slot) { std::memcpy(slot, values + begin, bytes); },
          [&](int32_t peer, const std::byte* slot) {
            // From rank 0 on, so that every rank gets the same bits of floats too.
            if (peer == 0) {
              std::memcpy(values + begin, slot, bytes);
            } else {
              combine(values + begin, slot, count, args.reduction);
            }
          });
    }
  });
}

std::vector<std::unique_ptr<Communicator>> make_thread_communicators(
    int32_t size, std::chrono::milliseconds timeout, int64_t slot_bytes) {
  const auto bytes =
      static_cast<size_t>(SharedMemoryCommunicator::region_bytes(size, slot_bytes) + 63) / 64 * 64;
  std::shared_ptr<std::byte> region(static_cast<std::byte*>(std::aligned_alloc(64, bytes)),
                                    std::free);
  if (region == nullptr) throw std::bad_alloc();
  std::memset(region.get(), 0, bytes);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int32_t rank = 0; rank < size; ++rank) {
    ranks.push_back(std::make_unique<SharedMemoryCommunicator>(
        region, SharedMemoryOptions{.at = {rank, size}, .timeout = timeout}, slot_bytes));
  }
  return ranks;
}

}  // namespace rollpack::kernels
