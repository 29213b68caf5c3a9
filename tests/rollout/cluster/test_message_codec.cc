// What a broken rank may send: an error that names the message, never a wild read or another
// number.
#include "rollout/cluster/message_codec.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/error_text.h"
#include "trainer_bridge/shared_memory/segment.h"
#include "trainer_bridge/wire/message.h"

namespace rollpack::rollout {
namespace {

using bridge::Frame;
using bridge::Json;
using bridge::OwnedFd;
using testing::error_text;

constexpr int64_t kChunkBytes = 64;

OwnedFd sealed_memfd() {
  OwnedFd fd(::memfd_create("chunk", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_EQ(::ftruncate(fd.get(), kChunkBytes), 0);
  EXPECT_EQ(::fcntl(fd.get(), F_ADD_SEALS, bridge::kPeerSeals), 0);
  return fd;
}

Json tensor(Json changes = Json::object()) {
  Json tensor = {{"name", "w"}, {"dtype", 0}, {"shape", {2, 2}}, {"offset", 48}, {"bytes", 16}};
  tensor.update(changes);
  return tensor;
}

// stage_weights of one tensor, with the descriptor of its chunk or without.
std::string stage_error(const Json& changes, bool has_fd = true) {
  return error_text([&] {
    Frame frame{.body = bridge::encode_message(
                    {{"type", "stage_weights"},
                     {"ticket", 1},
                     {"chunk", {{"mapping_bytes", kChunkBytes}, {"tensors", {tensor(changes)}}}}}),
                .fds = {}};
    if (has_fd) frame.fds.push_back(sealed_memfd());
    decode_command(std::move(frame));
  });
}

TEST(MessageCodec, TensorsMustLieInTheirChunk) {
  EXPECT_EQ(stage_error(Json::object()), "no error");
  const std::string outside =
      "data_loss: rank message = \"stage_weights\": tensor w lies outside its chunk";
  EXPECT_EQ(stage_error({{"offset", 49}}), outside);
  EXPECT_EQ(stage_error({{"bytes", 17}}), outside);
  EXPECT_EQ(stage_error({{"offset", ~uint64_t{0} - 7}}), outside);
  EXPECT_EQ(stage_error({{"offset", ~uint64_t{0} - 15}, {"bytes", 32}}), outside);
  const std::string integer =
      "data_loss: rank message = \"stage_weights\": expected an integer in ";
  EXPECT_EQ(stage_error({{"offset", -8}}), integer + "range, found -8");
  EXPECT_EQ(stage_error({{"bytes", 16.0}}), integer + "range, found 16.0");
  EXPECT_EQ(stage_error({{"shape", {2, 1.5}}}), integer + "range, found 1.5");
  EXPECT_EQ(stage_error({{"dtype", 6}}),
            "data_loss: rank message = \"stage_weights\": expected an enumerator, found 6");
  EXPECT_EQ(stage_error(Json::object(), /*has_fd=*/false)
                .rfind("data_loss: rank message = \"stage_weights\": ", 0),
            0u);
}

std::string command_error(const Json& map) {
  return error_text([&] { decode_command({.body = bridge::encode_message(map), .fds = {}}); });
}

std::string event_error(const Json& map) {
  return error_text([&] { decode_event({.body = bridge::encode_message(map), .fds = {}}); });
}

TEST(MessageCodec, MessagesOfNoKnownTypeAreNamed) {
  for (const auto& error_of : {command_error, event_error}) {
    EXPECT_EQ(error_of(Json::object()).rfind("data_loss: rank message = without a type: ", 0), 0u);
    EXPECT_EQ(error_of({{"type", 7}}).rfind("data_loss: rank message = 7: ", 0), 0u);
    EXPECT_EQ(error_of({{"type", "fly"}}).rfind("data_loss: rank message = \"fly\": ", 0), 0u);
  }
}

TEST(MessageCodec, NumbersAreReadInTheirRangeOrNotAtAll) {
  const std::string pull =
      "data_loss: rank message = \"pull\": expected an integer in range, found ";
  EXPECT_EQ(event_error({{"type", "pull"}, {"num_samples", 2147483647}}), "no error");
  EXPECT_EQ(event_error({{"type", "pull"}, {"num_samples", 2147483648}}), pull + "2147483648");
  EXPECT_EQ(event_error({{"type", "pull"}, {"num_samples", 1.0}}), pull + "1.0");
  EXPECT_EQ(event_error({{"type", "pull"}, {"num_samples", true}}), pull + "true");
  EXPECT_EQ(command_error({{"type", "pause"}, {"ticket", -1}, {"in_flight", 0}}),
            "data_loss: rank message = \"pause\": expected an integer in range, found -1");
  EXPECT_EQ(command_error({{"type", "pause"}, {"ticket", 1}, {"in_flight", 3}}),
            "data_loss: rank message = \"pause\": expected an enumerator, found 3");
  EXPECT_EQ(command_error({{"type", "pause"}, {"ticket", 1}, {"in_flight", 2}}), "no error");
}

TEST(MessageCodec, AListOfNumbersCutInsideOneIsRefused) {
  const Json scored = {{"type", "scored"},
                       {"ticket", 1},
                       {"error", nullptr},
                       {"id", {"x", false}},
                       {"logprobs", Json::binary({0, 0, 0, 0, 1})},
                       {"scaled_logprobs", Json::binary({})},
                       {"entropy", Json::binary({})}};
  EXPECT_EQ(event_error(scored),
            "data_loss: rank message = \"scored\": a number cut in a list of them");
}

TEST(MessageCodec, WhatNoFrameHoldsIsToldAsAFailure) {
  SampleDone done{.attempt = 3};
  done.sample.key.request_id = 7;
  done.sample.key.prompt_id.text = "long";
  done.sample.prompt_ids = std::make_shared<const std::vector<int32_t>>();
  done.sample.response_ids = std::vector<int32_t>(bridge::kMaxFrameBytes / 4, 1);
  const Event sample = decode_event(encode(Event(done)));
  const auto& failed = std::get<SampleFailed>(sample);
  EXPECT_EQ(failed.attempt, 3);
  EXPECT_EQ(failed.sample.key.request_id, 7);
  EXPECT_EQ(failed.sample.key.prompt_id.text, "long");
  EXPECT_EQ(failed.sample.error.code, ErrorCode::kResourceExhausted);

  Scored scored{.ticket = 5};
  scored.sequence.id.text = "s";
  scored.sequence.entropy.resize(bridge::kMaxFrameBytes / 4);
  const Event answer = decode_event(encode(Event(scored)));
  EXPECT_EQ(std::get<Scored>(answer).ticket, 5u);
  EXPECT_EQ(std::get<Scored>(answer).sequence.id.text, "s");
  ASSERT_TRUE(std::get<Scored>(answer).error);
  EXPECT_EQ(std::get<Scored>(answer).error->code, ErrorCode::kResourceExhausted);
}

}  // namespace
}  // namespace rollpack::rollout
