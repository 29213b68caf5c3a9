// A communicator over memory that its ranks share: threads of one process, or processes of one host
// that map the same region. A call goes in rounds. In a round each rank writes into a slot of its
// own, posts the round's number, waits for the others' numbers and reads their slots. Slots come in
// pairs: whoever posts round n + 1 has read round n, so round n + 2 may overwrite it.
//
// A rank that waits spins for some 20 us, then yields, then sleeps: gathers come four times a layer
// and mostly find their peers there; beside a busy neighbour the core is given away.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "kernels/communicator/communicator.h"

namespace rollpack::kernels {

struct SharedMemoryOptions {
  ReplicaRank at;
  std::chrono::milliseconds timeout{30000};  // of one call
  // Asked some 100 times a second while a call waits: a rank known to be dead, or -1.
  std::function<int32_t()> find_lost_rank = [] { return -1; };
};

class SharedMemoryCommunicator final : public Communicator {
 public:
  // A slot: what a rank gives in a round. 512 KiB stay in L2 between being written and being read.
  static constexpr int64_t kSlotBytes = int64_t{512} << 10;

  static int64_t region_bytes(int32_t size, int64_t slot_bytes = kSlotBytes);

  // `region` has region_bytes() bytes, zeros before the first rank uses it, aligned to 64.
  SharedMemoryCommunicator(std::shared_ptr<std::byte> region, SharedMemoryOptions options,
                           int64_t slot_bytes = kSlotBytes);
  ~SharedMemoryCommunicator() override;

  ReplicaRank at() const override { return options_.at; }
  void gather_columns(const GatherColumnsArgs& args) override;
  void broadcast(std::span<std::byte> values, int32_t root) override;
  void barrier() override;
  std::chrono::milliseconds timeout() const override { return options_.timeout; }
  int32_t find_lost_rank() const override;
  void abandon() override;
  double seconds() const override { return seconds_.load(std::memory_order_relaxed); }
  void reduce(const AllReduceArgs& args) override;

 private:
  struct RankState;
  class Call;

  RankState& state(int32_t rank) const;
  std::byte* slot(int32_t rank) const;  // of the round at hand
  template <class Write, class Read>
  void round(const Call& call, const Write& write, const Read& read);
  void wait_for_all(const Call& call);
  bool has_posted(int32_t rank) const;
  void give_up(int32_t missing);
  [[noreturn]] void fail(const Call& call, bool is_late, int32_t lost);

  const std::shared_ptr<std::byte> region_;
  const SharedMemoryOptions options_;
  const int64_t slot_bytes_;
  uint64_t round_ = 0;
  bool has_failed_ = false;
  std::atomic<double> seconds_ = 0;
};

// Ranks 0 to size - 1 as threads of this process, each to be used by one of them.
std::vector<std::unique_ptr<Communicator>> make_thread_communicators(
    int32_t size, std::chrono::milliseconds timeout,
    int64_t slot_bytes = SharedMemoryCommunicator::kSlotBytes);

}  // namespace rollpack::kernels
