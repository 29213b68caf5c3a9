// A tensor of a weight update that is packed out of its sender's memory, a panel's rows at a time.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/weight_source.h"
#include "rollout/model/weights.h"
#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/shared_memory/peer_memory.h"

namespace rollpack::rollout {

class LentTensor final : public kernels::WeightSource {
 public:
  // Both outlive it.
  LentTensor(const bridge::WeightTensor& tensor, const bridge::PeerMemory& lender)
      : WeightSource(tensor.dtype, matrix_shape(tensor.shape)[0], matrix_shape(tensor.shape)[1]),
        name_(tensor.name),
        address_(tensor.address),
        lender_(lender) {}

  // Errors: those of PeerMemory::read, naming the tensor.
  const std::byte* read_rows(int64_t begin, int64_t end,
                             std::vector<std::byte>& scratch) const override {
    scratch.resize(static_cast<size_t>((end - begin) * row_bytes()));
    try {
      lender_.read(address_ + static_cast<uint64_t>(begin * row_bytes()), scratch);
    } catch (const Error& error) {
      ErrorInfo info = error.info;
      info.field = name_;
      throw Error(std::move(info));
    }
    return scratch.data();
  }

 private:
  const std::string name_;
  const uint64_t address_;
  const bridge::PeerMemory& lender_;
};

}  // namespace rollpack::rollout
