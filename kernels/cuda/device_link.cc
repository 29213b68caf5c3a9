#include "kernels/cuda/device_link.h"

#include <fmt/format.h>

#include <array>
#include <cstring>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/cuda/nccl_communicator.h"
#include "kernels/cuda/staged_communicator.h"

namespace rollpack::kernels::cuda {
namespace {

// What a rank says of itself before they choose.
struct Standing {
  std::array<std::byte, 16> device{};
  uint8_t has_nccl = 0;
};

// Empty, or why these ranks do without NCCL.
std::string find_obstacle(std::span<const Standing> ranks) {
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    if (ranks[rank].has_nccl == 0) return fmt::format("rank {} has no NCCL", rank);
    for (size_t other = 0; other < rank; ++other) {
      if (ranks[other].device == ranks[rank].device) {
        return fmt::format("ranks {} and {} share a device, which NCCL refuses", other, rank);
      }
    }
  }
  return "";
}

}  // namespace

std::vector<std::byte> make_nccl_link(const OpenNccl& open) {
  const NcclId id = open()->make_id();
  const auto bytes = std::as_bytes(std::span(id.bytes));
  return {bytes.begin(), bytes.end()};
}

std::unique_ptr<DeviceCommunicator> link_devices(Device& device, Stream stream,
                                                 std::shared_ptr<Communicator> host,
                                                 std::span<const std::byte> link,
                                                 const OpenNccl& open) {
  if (link.empty()) return std::make_unique<StagedCommunicator>(device, stream, std::move(host));
  NcclId id;
  if (link.size() != id.bytes.size()) fail_invariant("a link of other bytes than NCCL's");
  std::memcpy(id.bytes.data(), link.data(), link.size());
  std::shared_ptr<const NcclLibrary> library;
  std::string own_reason;
  try {
    library = open();
  } catch (const Error& error) {
    own_reason = error.what();
  }
  const Standing mine{.device = device.info().id, .has_nccl = library ? uint8_t{1} : uint8_t{0}};
  std::vector<Standing> all(static_cast<size_t>(host->size()));
  host->all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
  std::string obstacle = find_obstacle(all);
  if (obstacle.empty()) {
    return std::make_unique<NcclCommunicator>(device, stream, std::move(host),
                                              NcclOptions{.library = std::move(library), .id = id});
  }
  if (!own_reason.empty()) obstacle += ": " + own_reason;
  return std::make_unique<StagedCommunicator>(device, stream, std::move(host), std::move(obstacle));
}

}  // namespace rollpack::kernels::cuda
