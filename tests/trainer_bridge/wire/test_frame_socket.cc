// The asynchronous socket: frames in order, ends told once, slow and stuck peers dropped.
#include "trainer_bridge/wire/frame_socket.h"

#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <thread>

#include "tests/trainer_bridge/wire/sockets.h"

namespace rollpack::bridge {
namespace {

class FrameSocketTest : public ::testing::Test {
 protected:
  // Starts on one end of a pair; the other is `peer`.
  void start(FrameSocketOptions options = {}) {
    SocketPair pair = make_socket_pair();
    peer = std::move(pair.right);
    socket = std::make_shared<FrameSocket>(io, std::move(pair.left), options);
    socket->start([this](Frame frame) { frames.push_back(std::move(frame)); },
                  [this](std::optional<ErrorInfo> error) {
                    ++num_ends;
                    end_error = std::move(error);
                  });
  }

  void run_until(const std::function<bool()>& is_done) {
    const Deadline deadline = in_ms(10000);
    while (!is_done() && std::chrono::steady_clock::now() < deadline) {
      io.run_for(std::chrono::milliseconds(2));
      io.restart();
    }
    ASSERT_TRUE(is_done()) << "not within 10 s";
  }

  asio::io_context io;
  OwnedFd peer;
  std::shared_ptr<FrameSocket> socket;
  std::vector<Frame> frames;
  int num_ends = 0;
  std::optional<ErrorInfo> end_error;
};

TEST_F(FrameSocketTest, FramesComeInOrderWithTheirDescriptors) {
  start();
  for (int i = 0; i < 100; ++i) {
    std::vector<OwnedFd> fds;
    if (i % 10 == 0) fds.push_back(make_memfd("x"));
    send_frame(peer.get(), bytes_of(std::to_string(i)), std::move(fds), in_ms(1000));
  }
  run_until([&] { return frames.size() == 100; });
  for (size_t i = 0; i < 100; ++i) {
    EXPECT_EQ(frames[i].body, bytes_of(std::to_string(i)));
    EXPECT_EQ(frames[i].fds.size(), i % 10 == 0 ? 1u : 0u);
  }
  EXPECT_EQ(num_ends, 0);
}

TEST_F(FrameSocketTest, APeerThatClosesIsTheEndOnceAndNoError) {
  start();
  send_frame(peer.get(), bytes_of("last"), {}, in_ms(1000));
  peer.reset();
  run_until([&] { return num_ends > 0; });
  EXPECT_EQ(frames.size(), 1u);
  EXPECT_FALSE(end_error);
  io.run_for(std::chrono::milliseconds(20));
  EXPECT_EQ(num_ends, 1);
}

TEST_F(FrameSocketTest, HalfAFrameThenEndIsDataLoss) {
  start();
  ASSERT_EQ(::send(peer.get(), "\x09\0\0\0ab", 6, 0), 6);
  peer.reset();
  run_until([&] { return num_ends > 0; });
  EXPECT_EQ(end_error->code, ErrorCode::kDataLoss);
  EXPECT_EQ(end_error->value, "6 of 13 bytes");
}

TEST_F(FrameSocketTest, AFrameThatDoesNotEndIsDroppedAtItsDeadline) {
  start({.frame_deadline = std::chrono::milliseconds(50)});
  ASSERT_EQ(::send(peer.get(), "\x09", 1, 0), 1);
  const auto begin = std::chrono::steady_clock::now();
  // One byte now and then does not help: the deadline is the whole frame's.
  std::thread dripping([this] {
    for (int i = 0; i < 8; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      ::send(peer.get(), "\0", 1, MSG_NOSIGNAL);
    }
  });
  run_until([&] { return num_ends > 0; });
  dripping.join();
  EXPECT_EQ(end_error->code, ErrorCode::kDeadlineExceeded);
  EXPECT_EQ(end_error->value, "unfinished after 50 ms");
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(2));
}

TEST_F(FrameSocketTest, ADeadlineOfOneFrameDoesNotStrikeTheNext) {
  start({.frame_deadline = std::chrono::milliseconds(60)});
  const std::vector<uint8_t> bytes = framed(bytes_of("slow"));
  for (int frame = 0; frame < 4; ++frame) {  // 4 x 40 ms, each below 60 ms
    ASSERT_EQ(::send(peer.get(), bytes.data(), 2, 0), 2);
    io.run_for(std::chrono::milliseconds(40));
    io.restart();
    ASSERT_EQ(::send(peer.get(), bytes.data() + 2, bytes.size() - 2, 0),
              static_cast<ssize_t>(bytes.size() - 2));
  }
  run_until([&] { return frames.size() == 4; });
  EXPECT_EQ(num_ends, 0);
}

TEST_F(FrameSocketTest, APeerThatDoesNotReadIsDroppedAtItsQueueCap) {
  start({.max_queued_bytes = size_t{4} << 20});
  for (int i = 0; i < 20 && num_ends == 0; ++i) {
    socket->send(std::vector<uint8_t>(1 << 20));
    io.poll();
  }
  ASSERT_EQ(num_ends, 1);
  EXPECT_EQ(end_error->field, "queued replies");
  EXPECT_EQ(end_error->message, "the peer reads too slowly");
  EXPECT_FALSE(socket->is_open());
  EXPECT_EQ(socket->queued_bytes(), 0u);
}

TEST_F(FrameSocketTest, FinishWritesWhatIsQueuedThenCloses) {
  start();
  for (int i = 0; i < 3; ++i) socket->send(std::vector<uint8_t>(1 << 20, 5));
  socket->finish();
  EXPECT_TRUE(socket->is_open());
  std::vector<Frame> got;
  std::thread reading([&] {
    while (auto frame = receive_frame(peer.get(), in_ms(5000))) got.push_back(*std::move(frame));
  });
  run_until([&] { return !socket->is_open(); });
  reading.join();
  ASSERT_EQ(got.size(), 3u);
  EXPECT_EQ(got[2].body, std::vector<uint8_t>(1 << 20, 5));
  EXPECT_EQ(num_ends, 0);
}

TEST_F(FrameSocketTest, FinishGivesUpOnAPeerThatDoesNotRead) {
  start({.finish_deadline = std::chrono::milliseconds(30)});
  socket->send(std::vector<uint8_t>(8 << 20));
  socket->finish();
  run_until([&] { return !socket->is_open(); });
}

TEST_F(FrameSocketTest, DescriptorsAreClosedWhenTheyAreSent) {
  start();
  const size_t open_before = num_open_fds();
  for (int i = 0; i < 50; ++i) {
    std::vector<OwnedFd> fds;
    fds.push_back(make_memfd("slot"));
    socket->send(bytes_of("hello"), std::move(fds));
    EXPECT_EQ(receive_frame(peer.get(), in_ms(1000))->fds.size(), 1u);
  }
  EXPECT_EQ(num_open_fds(), open_before);
}

}  // namespace
}  // namespace rollpack::bridge
