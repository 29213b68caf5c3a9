#include "rollout/node_bridge/sample_frame.h"

#include <array>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>

#include <fmt/format.h>

#include "kernels/base/error.h"
#include "rollout/cluster/message_parts.h"
#include "rollout/node_bridge/frame_mark.h"
#include "trainer_bridge/wire/frame.h"
#include "trainer_bridge/wire/message.h"

namespace rollpack::rollout {
namespace {

using json = bridge::Json;

// Mark, three bytes that are 0, bytes of the map; then the map, filled up to numbers' alignment;
// then the lists of numbers, in the order of `counts`.
constexpr size_t kHeaderBytes = 8;
constexpr size_t kAlignment = 4;

size_t aligned(size_t size) {
  return (size + kAlignment - 1) / kAlignment * kAlignment;
}

std::array<std::span<const std::byte>, 7> lists_of(const bridge::Sample& sample) {
  const auto bytes = [](const auto& list) { return std::as_bytes(std::span(list)); };
  return {bytes(*sample.prompt_ids),     bytes(sample.response_ids),    bytes(sample.logprobs),
          bytes(sample.scaled_logprobs), bytes(sample.support_logmass), bytes(sample.entropy),
          bytes(sample.ref_log_prob)};
}

// Takes lists from the front of what is left. They stay where they are, and keep the frame.
class ListReader {
 public:
  ListReader(std::shared_ptr<const void> frame, std::span<const uint8_t> left, const json& counts)
      : frame_(std::move(frame)), left_(left), counts_(counts) {}

  template <class T>
  bridge::Numbers<T> next() {
    const auto count = integer<uint64_t>(counts_.at(index_++));
    if (count > left_.size() / sizeof(T)) throw std::length_error("a list beyond its frame");
    const std::span<const T> list(reinterpret_cast<const T*>(left_.data()), count);
    left_ = left_.subspan(count * sizeof(T));
    return {frame_, list};
  }
  void finish() const {
    if (!left_.empty()) throw std::length_error("bytes behind the last list");
  }

 private:
  const std::shared_ptr<const void> frame_;
  std::span<const uint8_t> left_;
  const json& counts_;
  size_t index_ = 0;
};

SampleFrame decode_known(const json& head, std::shared_ptr<const void> body,
                         std::span<const uint8_t> numbers) {
  SampleFrame frame{.worker = integer<int32_t>(head.at("worker")),
                    .attempt = integer<int32_t>(head.at("attempt"))};
  bridge::Sample& sample = frame.sample;
  sample.key = decode_key(head.at("key"));
  ListReader lists(std::move(body), numbers, head.at("counts"));
  sample.prompt_ids = std::make_shared<const std::vector<int32_t>>(lists.next<int32_t>());
  sample.response_ids = lists.next<int32_t>();
  sample.logprobs = lists.next<float>();
  sample.scaled_logprobs = lists.next<float>();
  sample.support_logmass = lists.next<float>();
  sample.entropy = lists.next<float>();
  sample.ref_log_prob = lists.next<float>();
  lists.finish();
  sample.finish_reason = enumerator(head.at("finish_reason"), bridge::FinishReason::kAbort);
  sample.stop_token_id = integer<int32_t>(head.at("stop_token_id"));
  sample.temperature = head.at("temperature");
  sample.weight_versions = decode_spans(head.at("weight_versions"));
  return frame;
}

}  // namespace

bool is_sample_frame(std::span<const uint8_t> body) {
  return !body.empty() && body[0] == kSampleMark;
}

std::vector<uint8_t> encode_sample_frame(int32_t worker, int32_t attempt,
                                         const bridge::Sample& sample) {
  const auto lists = lists_of(sample);
  json counts = json::array();
  size_t num_bytes = 0;
  for (const auto& list : lists) {
    counts.push_back(list.size() / 4);
    num_bytes += list.size();
  }
  const std::vector<uint8_t> head =
      bridge::encode_message({{"worker", worker},
                              {"attempt", attempt},
                              {"key", encode_key(sample.key)},
                              {"counts", std::move(counts)},
                              {"finish_reason", static_cast<int>(sample.finish_reason)},
                              {"stop_token_id", sample.stop_token_id},
                              {"temperature", sample.temperature},
                              {"weight_versions", encode_spans(sample.weight_versions)}});
  const size_t start = aligned(kHeaderBytes + head.size());
  if (start + num_bytes > bridge::kMaxFrameBytes) {
    throw Error({.code = ErrorCode::kResourceExhausted,
                 .field = "sample",
                 .value = fmt::format("{} bytes", start + num_bytes),
                 .allowed = fmt::format("at most {} bytes a frame", bridge::kMaxFrameBytes)});
  }
  std::vector<uint8_t> body(start + num_bytes);
  const auto head_bytes = static_cast<uint32_t>(head.size());
  body[0] = kSampleMark;
  std::memcpy(body.data() + 4, &head_bytes, sizeof head_bytes);
  std::memcpy(body.data() + kHeaderBytes, head.data(), head.size());
  uint8_t* place = body.data() + start;
  for (const auto& list : lists) {
    if (!list.empty()) std::memcpy(place, list.data(), list.size());
    place += list.size();
  }
  return body;
}

SampleFrame decode_sample_frame(std::vector<uint8_t> body) {
  uint32_t head_bytes = 0;
  if (body.size() >= kHeaderBytes) std::memcpy(&head_bytes, body.data() + 4, sizeof head_bytes);
  if (body.size() < kHeaderBytes || body.size() < aligned(kHeaderBytes + size_t{head_bytes})) {
    throw Error({.code = ErrorCode::kDataLoss,
                 .field = "sample frame",
                 .value = fmt::format("{} bytes, a head of {}", body.size(), head_bytes),
                 .allowed = "a frame that holds its head"});
  }
  // What operator new gives is aligned for any number.
  const auto kept = std::make_shared<const std::vector<uint8_t>>(std::move(body));
  const std::span<const uint8_t> all(*kept);
  const json head = bridge::decode_message(all.subspan(kHeaderBytes, head_bytes));
  try {
    return decode_known(head, kept, all.subspan(aligned(kHeaderBytes + size_t{head_bytes})));
  } catch (const std::exception& error) {
    fail_decoding(head, error);
  }
}

std::vector<uint8_t> encode_receipt(uint64_t num_samples) {
  return bridge::encode_message({{"type", "receipt"}, {"num_samples", num_samples}});
}

uint64_t decode_receipt(std::span<const uint8_t> body) {
  const json map = bridge::decode_message(body);
  try {
    return integer<uint64_t>(map.at("num_samples"));
  } catch (const std::exception& error) {
    fail_decoding(map, error);
  }
}

}  // namespace rollpack::rollout
