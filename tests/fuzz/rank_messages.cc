// Messages between ranks, as commands and as events; an odd first byte sends a descriptor along.
// What was decoded goes out again as a message that decodes to the same.
#include <fcntl.h>
#include <sys/mman.h>

#include <utility>
#include <vector>

#include "rollout/cluster/message_codec.h"
#include "tests/fuzz/fuzz_input.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace {

using namespace rollpack::bridge;
using namespace rollpack::fuzz;
using namespace rollpack::rollout;

OwnedFd sealed_memfd() {
  OwnedFd fd(::memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  require(fd && ::ftruncate(fd.get(), 64) == 0 &&
              ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) == 0,
          "no sealed memfd");
  return fd;
}

Frame frame_of(const uint8_t* data, size_t size) {
  static const OwnedFd memfd = sealed_memfd();
  Frame frame{.body = {data + 1, data + size}, .fds = {}};
  if (data[0] % 2 == 1) frame.fds.push_back(OwnedFd::duplicate(memfd.get()));
  return frame;
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 1) return 0;
  reads_or_refuses([&] {
    Frame once = encode(decode_command(frame_of(data, size)));
    const std::vector<uint8_t> body = once.body;
    require(encode(decode_command(std::move(once))).body == body, "a command that changes");
  });
  reads_or_refuses([&] {
    const Event event = decode_event(frame_of(data, size));
    const auto* ack = std::get_if<Ack>(&event);
    if (ack != nullptr && ack->fd >= 0) return;  // its descriptor was the frame's
    const Frame once = encode(event);
    require(encode(decode_event(once)).body == once.body, "an event that changes");
  });
  return 0;
}
