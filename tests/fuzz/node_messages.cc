// What ranks, bridges of nodes and rank 0 say to each other, by the first byte: requests, news,
// samples, receipts, or the first words of a connection. What was decoded goes out again as a
// message that decodes to the same.
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "rollout/cluster/handshake.h"
#include "rollout/node_bridge/frame_mark.h"
#include "rollout/node_bridge/node_messages.h"
#include "rollout/node_bridge/sample_frame.h"
#include "tests/fuzz/fuzz_input.h"

namespace {

using namespace rollpack::fuzz;
using namespace rollpack::rollout;

using Bytes = std::vector<uint8_t>;

const std::string kToken = "fuzz";

Bytes written(const SampleFrame& frame) {
  return encode_sample_frame(frame.worker, frame.attempt, frame.sample);
}

void read_hello(const Bytes& body) {
  is_answer(body, kToken);
  std::optional<Hello> hello;
  try {
    hello = decode_hello(body, kToken);
  } catch (const std::exception&) {
    return;  // whoever listens takes any for a stranger
  }
  if (!hello) return;
  const Bytes once = encode_hello(*hello, kToken);
  require(encode_hello(decode_hello(once, kToken).value(), kToken) == once, "a hello that changes");
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 1) return 0;
  Bytes body(data + 1, data + size);
  switch (data[0] % 5) {
    case 0:
      body.insert(body.begin(), kNodeMark);
      reads_or_refuses([&] {
        const Bytes once = encode(decode_node_request(body));
        require(encode(decode_node_request(once)) == once, "a request that changes");
      });
      break;
    case 1:
      body.insert(body.begin(), kNodeMark);
      reads_or_refuses([&] {
        const Bytes once = encode(decode_node_news(body));
        require(encode(decode_node_news(once)) == once, "news that change");
      });
      break;
    case 2:
      reads_or_refuses([&] {
        const Bytes once = written(decode_sample_frame(body));
        require(written(decode_sample_frame(once)) == once, "a sample that changes");
      });
      break;
    case 3:
      reads_or_refuses([&] {
        const uint64_t count = decode_receipt(body);
        require(decode_receipt(encode_receipt(count)) == count, "a receipt that changes");
      });
      break;
    default:
      read_hello(body);
  }
  return 0;
}
