// How ranks reach rank 0, over the loopback interface: who is of the job gets in, others do not.
#include <gtest/gtest.h>

#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <future>

#include "rollout/cluster/rank_acceptor.h"
#include "tests/error_text.h"
#include "trainer_bridge/wire/message.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using testing::error_text;

struct Place {
  Place() {
    folder = (std::filesystem::temp_directory_path() / "rollpack-test-XXXXXX").string();
    if (::mkdtemp(folder.data()) == nullptr) std::abort();
    TcpListener listener = listen_tcp({.interface = "lo", .port = 0, .num_ports = 1});
    tcp = std::move(listener.socket);
    meeting = {.shares_weights = false,
               .socket = folder + "/ranks.sock",
               .endpoint = listener.endpoint,
               .token = random_token(),
               .answer = random_token(),
               .job = random_token()};
  }
  ~Place() { std::filesystem::remove_all(folder); }

  std::string folder;
  bridge::OwnedFd tcp;
  Meeting meeting;
};

TEST(RankAcceptor, TakesRanksOfBothKindsInOrder) {
  Place place;
  RankAcceptor acceptor(place.meeting, std::move(place.tcp), 4);
  // By way of the text that all ranks get.
  const Meeting told = Meeting::parse(place.meeting.text());
  auto third = std::async(std::launch::async,
                          [&] { return connect_from_other_node(told, 3, {}, Clock::now() + 10s); });
  auto first = std::async(std::launch::async,
                          [&] { return connect_on_this_node(told, 1, Clock::now() + 10s); });
  auto second = std::async(
      std::launch::async, [&] { return connect_from_other_node(told, 2, {}, Clock::now() + 10s); });
  const auto ranks = acceptor.accept(Clock::now() + 10s);
  ASSERT_EQ(ranks.size(), 3u);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(ranks[i].rank, i + 1);
    EXPECT_EQ(ranks[i].is_remote, i > 0);
    EXPECT_FALSE(ranks[i].host.empty());
    EXPECT_EQ(ranks[i].relay.port != 0, i > 0);
  }
  EXPECT_TRUE(first.get());
  for (auto* each : {&second, &third}) {
    const RemoteConnection made = each->get();
    EXPECT_TRUE(made.socket);
    ASSERT_TRUE(made.relay);
    EXPECT_EQ(made.relay->endpoint.addresses, std::vector<std::string>{"127.0.0.1"});
  }
}

TEST(RankAcceptor, StrangersDoNotGetInAndDoNotHoldUpOthers) {
  Place place;
  RankAcceptor acceptor(place.meeting, std::move(place.tcp), 2);
  const auto connect = [&] {
    return connect_tcp("127.0.0.1", place.meeting.endpoint.port, Clock::now() + 5s);
  };
  const auto say = [](const bridge::OwnedFd& socket, const bridge::Json& hello) {
    bridge::send_frame(socket.get(), bridge::encode_message(hello), {}, Clock::now() + 5s);
  };
  const bridge::OwnedFd silent = connect(), wrong = connect(), garbage = connect(),
                        other = connect();
  say(wrong, {{"rank", 1}, {"token", std::string(32, '0')}, {"host", "h"}});
  say(other, {{"rank", 2}, {"token", place.meeting.token}, {"host", "h"}});  // there is no rank 2
  ASSERT_EQ(::send(garbage.get(), "GET / HTTP/1.1\r\n\r\n", 18, MSG_NOSIGNAL), 18);
  auto rank = std::async(std::launch::async, [&] {
    return connect_from_other_node(place.meeting, 1, {}, Clock::now() + 10s);
  });
  const auto start = Clock::now();
  const auto ranks = acceptor.accept(Clock::now() + 20s);
  EXPECT_LT(Clock::now() - start, 4s) << "the silent one was waited for";
  ASSERT_EQ(ranks.size(), 1u);
  EXPECT_EQ(ranks[0].rank, 1);
  EXPECT_TRUE(rank.get().socket);
}

TEST(RankAcceptor, ReturnsWhoCameInTime) {
  Place place;
  RankAcceptor acceptor(place.meeting, std::move(place.tcp), 3);
  const bridge::OwnedFd socket = connect_on_this_node(place.meeting, 2, Clock::now() + 5s);
  const auto ranks = acceptor.accept(Clock::now() + 50ms);
  ASSERT_EQ(ranks.size(), 1u);
  EXPECT_EQ(ranks[0].rank, 2);
}

TEST(RankAcceptor, ARankTakesNobodyElseForRank0) {
  Place place;
  Meeting lie = place.meeting;
  lie.answer = random_token();  // another program listens there
  RankAcceptor acceptor(lie, std::move(place.tcp), 2);
  auto accepted =
      std::async(std::launch::async, [&] { return acceptor.accept(Clock::now() + 10s).size(); });
  const std::string text =
      error_text([&] { connect_from_other_node(place.meeting, 1, {}, Clock::now() + 10s); });
  EXPECT_TRUE(text.starts_with("unavailable: rank 1 on ")) << text;
  EXPECT_NE(text.find("cannot reach rank 0"), std::string::npos) << text;
  EXPECT_NE(text.find("another program: expected rank 0 of this job"), std::string::npos) << text;
  accepted.get();
}

TEST(TcpSocket, ErrorsNameWhatThereIs) {
  const std::string unknown = error_text([] { listen_tcp({.interface = "eth99"}); });
  EXPECT_TRUE(
      unknown.starts_with("invalid_argument: cluster.interface = eth99: expected an "
                          "interface or address of rank 0's host: "))
      << unknown;
  EXPECT_NE(unknown.find("lo (127.0.0.1)"), std::string::npos) << unknown;
  const TcpListener taken = listen_tcp({.interface = "127.0.0.1", .port = 0});
  const int port = taken.endpoint.port;
  EXPECT_EQ(error_text([&] { listen_tcp({.interface = "lo", .port = port, .num_ports = 1}); }),
            "unavailable: cluster.port = " + std::to_string(port) + " to " + std::to_string(port) +
                ": expected a range with a free TCP port on rank 0's host; 0 for any; the last "
                "one: Address already in use");
  EXPECT_GT(listen_tcp({.interface = "lo", .port = port, .num_ports = 64}).endpoint.port, port);
}

TEST(Meeting, TextIsReadBackOrRefused) {
  const Meeting meeting{.shares_weights = true,
                        .socket = "/tmp/a b",
                        .endpoint = {.addresses = {"10.0.0.1", "fd00::1"}, .port = 4242},
                        .token = "t",
                        .answer = "a",
                        .job = "j"};
  EXPECT_EQ(Meeting::parse(meeting.text()).text(), meeting.text());
  EXPECT_TRUE(error_text([] { Meeting::parse("shared:/tmp"); }).starts_with("data_loss: "));
}

}  // namespace
}  // namespace rollpack::rollout
