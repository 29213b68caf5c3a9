#include "kernels/cuda/staged_communicator.h"

#include <algorithm>
#include <chrono>
#include <span>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::kernels::cuda {
namespace {

using Clock = std::chrono::steady_clock;

// What a call brings over at a time.
constexpr int64_t kPieceBytes = int64_t{4} << 20;
// Of the work before a call; a step takes milliseconds.
constexpr std::chrono::minutes kStreamLimit{2};

}  // namespace

// A call, from the end of the work before it on.
class StagedCommunicator::Exchange {
 public:
  explicit Exchange(StagedCommunicator& of) : of_(of) {
    wait();
    begin_ = Clock::now();
  }
  ~Exchange() {
    const std::chrono::duration<double> taken = Clock::now() - begin_;
    of_.seconds_.store(of_.seconds() + taken.count(), std::memory_order_relaxed);
  }
  void wait() const { of_.device_.wait(of_.stream_, Clock::now() + kStreamLimit); }

 private:
  StagedCommunicator& of_;
  Clock::time_point begin_;
};

StagedCommunicator::StagedCommunicator(Device& device, Stream stream,
                                       std::shared_ptr<Communicator> host, std::string reason)
    : device_(device), stream_(stream), host_(std::move(host)), reason_(std::move(reason)) {}

// Copies that read it have ended.
std::byte* StagedCommunicator::room_for(int64_t bytes) {
  if (bytes > bounce_.bytes()) {
    bounce_ = {};
    bounce_ = HostMemory(device_, std::max(bytes, 2 * kPieceBytes), "what ranks exchange");
  }
  return bounce_.as<>();
}

void StagedCommunicator::gather_columns(const GatherColumnsArgs& args) {
  const Exchange exchange(*this);
  const auto rank = static_cast<size_t>(this->rank());
  const int64_t own = args.starts[rank + 1] - args.starts[rank], all = args.starts.back();
  if (args.rows == 0 || all == 0) return;
  const int64_t at_once = std::clamp<int64_t>(kPieceBytes / all, 1, args.rows);
  std::byte* const gathered = room_for(at_once * (all + own));
  std::byte* const mine = gathered + at_once * all;
  for (int64_t row = 0; row < args.rows; row += at_once) {
    const int64_t count = std::min(at_once, args.rows - row);
    if (own > 0) {
      device_.copy_rows_to_host(stream_, mine,
                                static_cast<const std::byte*>(args.in) + row * args.in_stride,
                                args.in_stride, own, count);
    }
    exchange.wait();  // what the piece before brings up is done too
    host_->gather_columns({.in = mine,
                           .in_stride = own,
                           .out = gathered,
                           .out_stride = all,
                           .rows = count,
                           .starts = args.starts});
    device_.copy_rows_to_device(stream_, static_cast<std::byte*>(args.out) + row * args.out_stride,
                                args.out_stride, gathered, all, count);
  }
}

void StagedCommunicator::broadcast(std::span<std::byte> values, int32_t root) {
  const Exchange exchange(*this);
  for (size_t at = 0; at < values.size(); at += kPieceBytes) {
    const std::span piece = values.subspan(at, std::min<size_t>(kPieceBytes, values.size() - at));
    const auto bytes = static_cast<int64_t>(piece.size());
    std::byte* const data = room_for(bytes);
    if (rank() == root) device_.copy_to_host(stream_, data, piece.data(), bytes);
    exchange.wait();
    host_->broadcast({data, piece.size()}, root);
    device_.copy_to_device(stream_, piece.data(), data, bytes);
  }
}

void StagedCommunicator::reduce(const AllReduceArgs& args) {
  const Exchange exchange(*this);
  const int64_t each = number_bytes(args.number), at_once = kPieceBytes / each;
  for (int64_t at = 0; at < args.count; at += at_once) {
    const int64_t count = std::min(at_once, args.count - at);
    std::byte* const values = static_cast<std::byte*>(args.values) + at * each;
    std::byte* const data = room_for(count * each);
    device_.copy_to_host(stream_, data, values, count * each);
    exchange.wait();
    host_->reduce(
        {.values = data, .count = count, .number = args.number, .reduction = args.reduction});
    device_.copy_to_device(stream_, values, data, count * each);
  }
}

}  // namespace rollpack::kernels::cuda
