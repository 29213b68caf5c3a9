// Everything a client may say wrong: which error it gets, whether its connection lives, and that
// nobody else notices.
#include <fcntl.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "tests/trainer_bridge/server/server_fixture.h"
#include "tests/trainer_bridge/wire/sockets.h"

namespace rollpack::bridge {
namespace {

using Bytes = std::vector<uint8_t>;

class BadRequests : public ServerTest {
 protected:
  // A healthy client answers before and after whatever `act` does.
  void with_bystander(const std::function<void()>& act) {
    TestClient bystander = connect();
    act();
    EXPECT_EQ(bystander.request("health").at("status"), "ok");
  }
};

struct BadFrame {
  const char* what;
  Bytes bytes;
  const char* code;
  const char* said;
};

Bytes message(const Json& map) {
  return framed(encode_message(map));
}

std::vector<BadFrame> bad_frames() {
  Bytes bomb = {0x82, 0xa2, 'i', 'd', 0x01, 0xa1, 'k'};
  bomb.insert(bomb.end(), 1000000, 0x91);
  const char* invalid = "invalid_argument";
  return {
      {"length 0", {0, 0, 0, 0}, invalid, "frame length = 0"},
      {"length 16 MiB + 1", {1, 0, 0, 1}, invalid, "1 to 16777216 bytes"},
      {"length 2^32 - 1", {255, 255, 255, 255}, invalid, "1 to 16777216 bytes"},
      {"no MessagePack", framed(bytes_of("GET / HTTP/1.1")), invalid, "no map"},
      {"a million nested arrays", framed(bomb), invalid, "nesting deeper than 16"},
      {"an extension type", framed({0x81, 0xa1, 'k', 0xd4, 1, 1}), invalid, "extension"},
      {"a repeated key", framed({0x82, 0xa1, 'k', 1, 0xa1, 'k', 2}), invalid, "twice"},
      {"trailing bytes", framed({0x80, 0xc0}), invalid, "trailing"},
      {"a length beyond the frame", framed({0x81, 0xa1, 'k', 0xc6, 255, 255, 255, 255}), invalid,
       "a length of 4294967295"},
      {"an empty map", message(Json::object()), invalid, "id (request): missing"},
      {"no id", message({{"verb", "health"}}), invalid, "id (request): missing"},
      {"a negative id", message({{"verb", "health"}, {"id", -1}}), invalid, "id = -1"},
      {"a text id", message({{"verb", "health"}, {"id", "1"}}), invalid, "id = \"1\""},
      {"no verb", message({{"id", 5}}), invalid, "verb (request): missing"},
      {"a verb that is no text", message({{"id", 5}, {"verb", 7}}), invalid, "verb = 7"},
      {"a descriptor that did not come", message({{"id", 5}, {"verb", "health"}, {"num_fds", 1}}),
       invalid, "num_fds = 1"},
      {"num_fds out of range", message({{"id", 5}, {"verb", "health"}, {"num_fds", 254}}), invalid,
       "0 to 253"},
  };
}

TEST_F(BadRequests, ABadFrameIsAnErrorAndTheEndOfItsConnectionAlone) {
  start();
  for (const BadFrame& bad : bad_frames()) {
    with_bystander([&] {
      TestClient client = connect();
      client.send_bytes(bad.bytes);
      const Json reply = client.reply();
      const ErrorInfo error = error_in(reply);
      EXPECT_EQ(error_code_name(error.code), bad.code) << bad.what;
      EXPECT_NE(format_error(error).find(bad.said), std::string::npos)
          << bad.what << ": " << format_error(error);
      EXPECT_LE(reply.at("id"), 5) << bad.what;  // its own where it could be read, else 0
      EXPECT_TRUE(client.is_closed()) << bad.what;
    });
  }
}

TEST_F(BadRequests, UndeclaredDescriptorsEndTheConnectionAndAreClosed) {
  start();
  with_bystander([&] {
    TestClient watcher = connect();
    watcher.request("health");  // what hello took along is closed by now
    const size_t open_before = num_open_fds();
    {
      TestClient client = connect();
      std::vector<OwnedFd> fds;
      fds.push_back(make_memfd("x"));
      send_frame(client.socket(), encode_message({{"verb", "health"}, {"id", 3}}), std::move(fds),
                 in_ms(1000));
      EXPECT_EQ(error_in(client.reply()).allowed,
                "1, the file descriptors that came with the frame");
      EXPECT_TRUE(client.is_closed());
    }
    wait_until([&] { return num_open_fds() == open_before; }, "the server keeps descriptors");
  });
}

TEST_F(BadRequests, HalfAFrameThenEndIsQuietlyForgotten) {
  start();
  with_bystander([&] {
    for (size_t cut = 1; cut < 8; ++cut) {
      TestClient client = connect();
      const Bytes bytes = message({{"verb", "health"}, {"id", 1}});
      client.send_bytes({bytes.begin(), bytes.begin() + static_cast<int64_t>(cut)});
      client.close();
    }
  });
  TestClient last = connect();
  wait_until([&] { return stat(last, "num_clients") == 1; }, "clients that left are still there");
}

TEST_F(BadRequests, AFrameThatNeverEndsIsDroppedAndOneByteAtATimeIsNot) {
  ServerOptions options{.slot_bytes = 1 << 16};
  options.frames.frame_deadline = std::chrono::milliseconds(200);
  start(options);
  with_bystander([&] {
    TestClient slow = connect();
    for (const uint8_t byte : message({{"verb", "health"}, {"id", 9}})) slow.send_bytes({byte});
    EXPECT_EQ(slow.reply().at("status"), "ok");
    TestClient stuck = connect();
    stuck.send_bytes({20, 0, 0});
    EXPECT_EQ(error_in(stuck.reply()).code, ErrorCode::kDeadlineExceeded);
    EXPECT_TRUE(stuck.is_closed());
  });
}

struct BadRequest {
  const char* verb;
  Json fields;
  const char* code;
  const char* said;
};

Json one_prompt(Json extra) {
  Json prompt = {{"input_ids", Json::binary({1, 0, 0, 0})}};
  prompt.update(extra);
  return {{"prompts", {prompt}}};
}

Json one_sequence(Json extra) {
  Json sequence = {{"id", 1},
                   {"input_ids", Json::binary({1, 0, 0, 0})},
                   {"response_ids", Json::binary({1, 0, 0, 0})}};
  sequence.update(extra);
  return {{"sequences", {sequence}}};
}

Json sampling(Json keys) {
  return one_prompt({{"sampling", std::move(keys)}});
}

std::vector<BadRequest> bad_requests() {
  const char* invalid = "invalid_argument";
  const char* precondition = "failed_precondition";
  return {
      {"fly", {}, "not_found", "verb = \"fly\" (request): expected one of hello, submit"},
      {"hello", {{"client", "x"}}, invalid, "protocol_version (request): missing"},
      {"hello",
       {{"protocol_version", 1}, {"client", "x"}, {"dp_rank", 2}, {"dp_size", 2}},
       invalid,
       "dp_rank = 2 (request): expected an integer from 0 to 1"},
      {"hello",
       {{"protocol_version", 1}, {"client", "x"}, {"dp_rank", 2}},
       invalid,
       "expected dp_rank and dp_size together"},
      {"hello",
       {{"protocol_version", 2}, {"client", "x"}},
       "unsupported",
       "protocol_version = 2 (hello): expected 1"},
      {"hello",
       {{"protocol_version", 1}, {"client", "x"}, {"probe", {{"address", 4096}}}},
       invalid,
       "probe.value (hello): missing"},
      {"hello",
       {{"protocol_version", 1},
        {"client", "x"},
        {"probe", {{"address", 4096}, {"value", Json::binary(std::vector<uint8_t>(68))}}}},
       invalid,
       "value = 17 (hello): expected 1 to 16 words of 4 bytes"},
      {"submit", {}, invalid, "prompts (request): missing"},
      {"submit", {{"prompts", Json::array()}}, invalid, "at least one prompt"},
      {"submit", {{"prompts", {7}}}, invalid, "prompts[0] = 7 (submit): expected a map"},
      {"submit", {{"prompts", {Json::object()}}}, invalid, "prompts[0].input_ids (submit)"},
      {"submit", one_prompt({{"input_ids", {1, 2}}}), invalid, "little-endian i32"},
      {"submit", one_prompt({{"input_ids", Json::binary({1, 2, 3})}}), invalid,
       "a multiple of 4 bytes"},
      {"submit", one_prompt({{"input_ids", Json::binary({})}}), invalid, "at least one token"},
      {"submit", one_prompt({{"input_ids", Json::binary({64, 0, 0, 0})}}), invalid,
       "input_ids = 64 (submit prompts[0]): expected token ids from 0 to 63"},
      {"submit", one_prompt({{"input_ids", Json::binary({255, 255, 255, 255})}}), invalid,
       "input_ids = -1 (submit prompts[0]): expected token ids from 0 to 63"},
      {"submit", one_prompt({{"priority", 18446744073709551615ull}}), invalid,
       "prompts[0].priority = 18446744073709551615"},
      {"submit", one_prompt({{"prompt_id", 1.5}}), invalid, "text or an integer"},
      {"submit", one_prompt({{"n", 0}}), invalid, "n = 0 (submit prompts[0])"},
      {"submit", one_prompt({{"n", 4294967296}}), invalid, "prompts[0].n = 4294967296"},
      {"submit", one_prompt({{"stop", "END"}}), invalid, "prompts[0].stop = \"END\""},
      {"submit", sampling({{"temperatur", 1}}), invalid, "did you mean temperature?"},
      {"submit", sampling({{"temperature", "hot"}}), invalid,
       "prompts[0].sampling.temperature = \"hot\""},
      {"submit", sampling({{"temperature", 1e39}}), invalid, "fits 32 bits"},
      {"submit", sampling({{"temperature", std::nan("")}}), invalid, "a finite number"},
      {"submit", sampling({{"top_p", std::numeric_limits<double>::infinity()}}), invalid,
       "a finite number"},
      {"submit", sampling({{"top_k", 0.5}}), invalid, "prompts[0].sampling.top_k = 0.5"},
      {"submit", sampling({{"seed", -1}}), invalid, "0 to 18446744073709551615"},
      {"submit", sampling({{"stop_token_ids", {1}}}), invalid, "little-endian i32"},
      {"submit", sampling({{"ignore_eos", 1}}), invalid, "true or false"},
      {"next_batch", {}, invalid, "timeout_ms (request): missing"},
      {"next_batch", {{"num_groups", 0}, {"timeout_ms", 0}}, invalid, "num_groups = 0"},
      {"next_batch", {{"timeout_ms", -1}}, invalid, "timeout_ms = -1"},
      {"next_batch",
       {{"num_groups", 2}, {"min_ready", 3}, {"timeout_ms", 0}},
       invalid,
       "min_ready = 3 (request): expected an integer from 1 to 2"},
      {"next_batch",
       {{"order", "random"}, {"timeout_ms", 0}},
       invalid,
       "order = \"random\" (request): expected one of completion, canonical"},
      {"next_batch", {{"timeout_ms", 0}}, "deadline_exceeded", "0 finished groups after 0 ms"},
      {"release", {{"slot", 0}, {"generation", 1}}, invalid, "batch_seq (request): missing"},
      {"release", {{"slot", 99}, {"generation", 1}, {"batch_seq", 1}}, "not_found", "99"},
      {"release", {{"slot", 0}, {"generation", 1}, {"batch_seq", 1}}, precondition, "slot"},
      {"release", {{"slot", -1}, {"generation", 1}, {"batch_seq", 1}}, invalid, "slot = -1"},
      {"release",
       {{"slot", 18446744073709551615ull}, {"generation", 1}, {"batch_seq", 1}},
       invalid,
       "slot = 18446744073709551615"},
      {"release",
       {{"slot", 0}, {"generation", 1.0}, {"batch_seq", 1}},
       invalid,
       "generation = 1.0"},
      {"abort", {{"request_id", 12345}}, "not_found", "request_id = 12345"},
      {"abort", {{"request_id", "all"}}, invalid, "request_id = \"all\""},
      {"pause", {{"mode", "now"}}, invalid, "one of keep, wait, abort"},
      {"pause", {}, invalid, "mode (request): missing"},
      {"resume", {{"mode", "keep"}}, invalid, "mode = \"keep\" (request)"},
      {"sleep", {{"mode", "keep"}}, invalid, "level (request): missing"},
      {"sleep", {{"level", 3}, {"mode", "keep"}}, invalid, "level = 3"},
      {"sleep", {{"level", 1}, {"mode", "now"}}, invalid, "one of keep, wait, abort"},
      {"wake_up", {{"tags", "weights"}}, invalid, "a list of \"weights\" and \"kv_cache\""},
      {"wake_up", {{"tags", Json::array()}}, invalid, "a list of \"weights\" and \"kv_cache\""},
      {"wake_up", {{"tags", {"weights", "graphs"}}}, invalid, "tags = \"graphs\""},
      {"score", {{"sequences", {Json::object()}}}, invalid, "sequences[0].id (score)"},
      {"score", one_sequence({{"temperature", "x"}}), invalid, "sequences[0].temperature"},
      {"score", one_sequence({{"response_ids", "abc"}}), invalid, "sequences[0].response_ids"},
      {"update_weights",
       {{"phase", "start"}, {"version", 1}},
       invalid,
       "one of begin, chunk, commit, cancel"},
      {"update_weights", {{"phase", "begin"}, {"version", 0}}, invalid, "above 0"},
      {"update_weights",
       {{"phase", "commit"}, {"version", 1}, {"mode", "keep"}},
       precondition,
       "begin first"},
      {"update_weights", {{"phase", "cancel"}, {"version", 1}}, precondition, "begin first"},
      {"update_weights", {{"phase", "chunk"}, {"version", 1}, {"bytes", 8}}, invalid, "tensors"},
      {"update_weights",
       {{"phase", "chunk"}, {"version", 1}, {"lent", true}, {"bytes", 8}},
       invalid,
       "tensors"},
      {"get_weight_version", {{"x", 1}}, invalid, "x = 1 (request)"},
      {"report_probs_diff", {{"max", 0}, {"std", 0}, {"k3_kl", 0}}, invalid, "mean"},
      {"report_probs_diff",
       {{"mean", 0}, {"max", 1.5}, {"std", 0}, {"k3_kl", 0}},
       invalid,
       "max = 1.5 (request): expected a number from 0 to 1"},
      {"report_probs_diff",
       {{"mean", 0}, {"max", 0}, {"std", 0}, {"k3_kl", -1e-9}},
       invalid,
       "k3_kl"},
      {"report_probs_diff",
       {{"mean", 0}, {"max", 0}, {"std", 0}, {"k3_kl", 0}, {"x", 1}},
       invalid,
       "unknown key"},
      {"stats", {{"x", 1}}, invalid, "unknown key"},
      {"health", {{"x", 1}}, invalid, "unknown key"},
      {"inspect", {{"x", 1}}, invalid, "unknown key"},
      {"shutdown", {{"x", 1}}, invalid, "unknown key"},
  };
}

TEST_F(BadRequests, AWrongRequestIsItsOwnErrorAndTheConnectionLives) {
  start();
  TestClient client = connect();
  for (const BadRequest& bad : bad_requests()) {
    const ErrorInfo error = error_in(client.request(bad.verb, bad.fields));
    EXPECT_EQ(error_code_name(error.code), bad.code) << bad.verb << " " << bad.fields;
    EXPECT_NE(format_error(error).find(bad.said), std::string::npos)
        << bad.verb << " " << bad.fields << ": " << format_error(error);
  }
  EXPECT_EQ(client.request("health").at("status"), "ok");
  EXPECT_EQ(stat(client, "num_waiting_seqs"), 0);  // nothing of all this was accepted
}

TEST_F(BadRequests, NothingButHelloAndHealthBeforeHello) {
  start();
  TestClient client(path, /*says_hello=*/false);
  for (const char* verb :
       {"submit", "next_batch", "release", "abort", "pause", "resume", "sleep", "wake_up", "score",
        "update_weights", "get_weight_version", "report_probs_diff", "stats", "shutdown"}) {
    const ErrorInfo error = error_in(client.request(verb));
    EXPECT_EQ(error.code, ErrorCode::kFailedPrecondition) << verb;
    EXPECT_EQ(error.allowed, "hello first") << verb;
  }
  EXPECT_EQ(client.request("health").at("status"), "ok");
  EXPECT_TRUE(client.hello().at("ok"));
}

TEST_F(BadRequests, DescriptorsWithVerbsThatTakeNoneAreRefusedAndClosed) {
  start();
  TestClient client = connect();
  client.request("health");  // what hello took along is closed by now
  const size_t open_before = num_open_fds();
  for (int i = 0; i < 50; ++i) {
    std::vector<OwnedFd> fds;
    fds.push_back(make_memfd("x"));
    EXPECT_EQ(error_in(client.request("health", Json::object(), std::move(fds))).allowed,
              "no file descriptors with this request");
  }
  // The reply may be here before the server has closed the last one.
  wait_until([&] { return num_open_fds() == open_before; }, "the server keeps descriptors");
}

TEST_F(BadRequests, AChunkNeedsExactlyOneDescriptor) {
  start();
  TestClient client = connect();
  const Json chunk = {{"phase", "chunk"},
                      {"version", 1},
                      {"bytes", 16},
                      {"tensors",
                       {{{"name", "model.norm.weight"},
                         {"dtype", "float32"},
                         {"shape", {4}},
                         {"offset", 0},
                         {"bytes", 16},
                         {"crc32", 0}}}}};
  client.request("update_weights", {{"phase", "begin"}, {"version", 1}});
  EXPECT_EQ(error_in(client.request("update_weights", chunk)).value, "0");
  std::vector<OwnedFd> two;
  two.push_back(make_memfd(std::string(16, '\0')));
  two.push_back(make_memfd(std::string(16, '\0')));
  EXPECT_EQ(error_in(client.request("update_weights", chunk, std::move(two))).value, "2");
  std::vector<OwnedFd> device;
  device.emplace_back(::open("/dev/zero", O_RDONLY | O_CLOEXEC));
  EXPECT_EQ(error_in(client.request("update_weights", chunk, std::move(device))).origin,
            "update_weights chunk");
}

TEST_F(BadRequests, MoreRequestsThanMayBeOpenWouldBlock) {
  start();
  TestClient client = connect();
  for (int i = 0; i < 256; ++i) client.post("next_batch", {{"timeout_ms", 60000}});
  const ErrorInfo error = error_in(client.request("health"));
  EXPECT_EQ(error.code, ErrorCode::kWouldBlock);
  EXPECT_EQ(error.allowed, "at most 256 without an answer");
}

}  // namespace
}  // namespace rollpack::bridge
