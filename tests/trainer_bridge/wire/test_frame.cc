// Frames and descriptors over a socket pair: every way they may be cut up, and every way they may
// be wrong.
#include "trainer_bridge/wire/frame.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <random>
#include <thread>

#include "tests/trainer_bridge/wire/sockets.h"

namespace rollpack::bridge {
namespace {

void send_raw(int socket, const std::vector<uint8_t>& bytes) {
  ASSERT_EQ(::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL),
            static_cast<ssize_t>(bytes.size()));
}

std::vector<OwnedFd> pipes(int count) {
  std::vector<OwnedFd> fds;
  for (int i = 0; i < count; ++i) fds.push_back(make_memfd(std::to_string(i)));
  return fds;
}

TEST(Frame, ComesAsItWentWithItsDescriptorsInOrder) {
  const SocketPair pair = make_socket_pair();
  send_frame(pair.left.get(), bytes_of("batch"), pipes(3), in_ms(1000));
  const auto frame = receive_frame(pair.right.get(), in_ms(1000));
  ASSERT_TRUE(frame);
  EXPECT_EQ(frame->body, bytes_of("batch"));
  ASSERT_EQ(frame->fds.size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(read_all(frame->fds[i].get(), 8), std::to_string(i));
    EXPECT_EQ(::fcntl(frame->fds[i].get(), F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  }
}

TEST(Frame, LengthIsLittleEndian) {
  const SocketPair pair = make_socket_pair();
  send_frame(pair.left.get(), std::vector<uint8_t>(0x0102, 7), {}, in_ms(1000));
  uint8_t header[4] = {};
  ASSERT_EQ(::recv(pair.right.get(), header, 4, MSG_WAITALL), 4);
  EXPECT_EQ(std::vector<uint8_t>(header, header + 4), (std::vector<uint8_t>{2, 1, 0, 0}));
}

TEST(Frame, ArrivesWholeWhenEveryByteComesAlone) {
  const SocketPair pair = make_socket_pair();
  FrameReader reader;
  const std::vector<uint8_t> bytes = framed(bytes_of("one at a time"));
  for (size_t i = 0; i + 1 < bytes.size(); ++i) {
    send_raw(pair.left.get(), {bytes[i]});
    ASSERT_EQ(reader.read(pair.right.get()), IoStatus::kWouldBlock);
    ASSERT_TRUE(reader.is_inside_frame());
  }
  send_raw(pair.left.get(), {bytes.back()});
  ASSERT_EQ(reader.read(pair.right.get()), IoStatus::kDone);
  EXPECT_EQ(reader.take().body, bytes_of("one at a time"));
  EXPECT_FALSE(reader.is_inside_frame());
}

TEST(Frame, DescriptorsStayWithTheirFrameWhenManyWaitInTheSocket) {
  const SocketPair pair = make_socket_pair();
  for (int i = 0; i < 20; ++i) {
    send_frame(pair.left.get(), bytes_of(std::to_string(i)), pipes(i % 3), in_ms(1000));
  }
  for (int i = 0; i < 20; ++i) {
    const auto frame = receive_frame(pair.right.get(), in_ms(1000));
    ASSERT_TRUE(frame);
    EXPECT_EQ(frame->body, bytes_of(std::to_string(i)));
    EXPECT_EQ(frame->fds.size(), static_cast<size_t>(i % 3)) << "frame " << i;
  }
}

TEST(Frame, OfEverySizePassesThroughASmallSocketBuffer) {
  const SocketPair pair = make_socket_pair();
  const int small = 4096;
  ::setsockopt(pair.left.get(), SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
  std::mt19937 random(7);
  for (const size_t size : {size_t{1}, size_t{4095}, size_t{65536}, size_t{65537}, size_t{1} << 20,
                            size_t{kMaxFrameBytes}}) {
    std::vector<uint8_t> body(size);
    std::generate(body.begin(), body.end(), [&] { return static_cast<uint8_t>(random()); });
    std::thread sender([&] { send_frame(pair.left.get(), body, pipes(2), in_ms(20000)); });
    const auto frame = receive_frame(pair.right.get(), in_ms(20000));
    sender.join();
    ASSERT_TRUE(frame);
    EXPECT_TRUE(frame->body == body) << size << " bytes";
    EXPECT_EQ(frame->fds.size(), 2u);
  }
}

TEST(Frame, ClosedBetweenFramesIsAnEndAndNoError) {
  SocketPair pair = make_socket_pair();
  send_frame(pair.left.get(), bytes_of("last"), {}, in_ms(1000));
  pair.left.reset();
  EXPECT_TRUE(receive_frame(pair.right.get(), in_ms(1000)));
  EXPECT_FALSE(receive_frame(pair.right.get(), in_ms(1000)));
}

TEST(Frame, ClosedInsideAFrameIsDataLossAtEveryByte) {
  const std::vector<uint8_t> bytes = framed(bytes_of("cut"));
  for (size_t cut = 1; cut < bytes.size(); ++cut) {
    SocketPair pair = make_socket_pair();
    send_raw(pair.left.get(), {bytes.begin(), bytes.begin() + static_cast<int64_t>(cut)});
    pair.left.reset();
    const ErrorInfo error = error_of([&] { receive_frame(pair.right.get(), in_ms(1000)); });
    EXPECT_EQ(error.code, ErrorCode::kDataLoss);
    EXPECT_EQ(error.value.substr(0, 2), fmt::format("{} ", cut));
  }
}

TEST(Frame, LengthErrorNamesItAndTheRange) {
  for (const std::vector<uint8_t>& header :
       {std::vector<uint8_t>{0, 0, 0, 0}, std::vector<uint8_t>{1, 0, 0, 1},
        std::vector<uint8_t>{0xff, 0xff, 0xff, 0xff}}) {
    const SocketPair pair = make_socket_pair();
    send_raw(pair.left.get(), header);
    const ErrorInfo error = error_of([&] { receive_frame(pair.right.get(), in_ms(1000)); });
    EXPECT_EQ(error.field, "frame length");
    EXPECT_EQ(error.allowed, "1 to 16777216 bytes");
  }
}

TEST(Frame, AClaimedLengthAloneTakesNoMemory) {
  const SocketPair pair = make_socket_pair();
  send_raw(pair.left.get(), {0, 0, 0, 1});  // 16 MiB to come
  FrameReader reader;
  EXPECT_EQ(reader.read(pair.right.get()), IoStatus::kWouldBlock);
  EXPECT_LE(reader.take().body.capacity(), size_t{64} << 10);
}

TEST(Frame, DescriptorsInsideAFrameAreRefusedAndClosed) {
  const SocketPair pair = make_socket_pair();
  const std::vector<uint8_t> bytes = framed(bytes_of("body"));
  const OwnedFd extra = make_memfd("extra");
  const size_t open_before = num_open_fds();
  const std::vector<int> raw = {extra.get()};
  send_raw(pair.left.get(), {bytes.begin(), bytes.begin() + 5});
  ASSERT_EQ(send_some(pair.left.get(), std::span(bytes).subspan(5), raw).status, IoStatus::kDone);
  const ErrorInfo error = error_of([&] { receive_frame(pair.right.get(), in_ms(1000)); });
  EXPECT_EQ(error.field, "num_fds");
  EXPECT_EQ(error.allowed, "file descriptors on the first byte of a frame only");
  EXPECT_EQ(num_open_fds(), open_before);
}

TEST(Frame, CarriesTwoHundredFiftyThreeDescriptorsAndRefusesOneMore) {
  const SocketPair pair = make_socket_pair();
  send_frame(pair.left.get(), bytes_of("many"), pipes(253), in_ms(1000));
  EXPECT_EQ(receive_frame(pair.right.get(), in_ms(1000))->fds.size(), 253u);
  const size_t open_before = num_open_fds();
  const ErrorInfo error =
      error_of([&] { send_frame(pair.left.get(), bytes_of("more"), pipes(254), in_ms(1000)); });
  EXPECT_EQ(error.value, "254");
  EXPECT_EQ(error.allowed, "at most 253 file descriptors a frame");
  EXPECT_EQ(num_open_fds(), open_before);
}

TEST(Frame, LostDescriptorsAreAnErrorThatSaysUlimit) {
  const SocketPair pair = make_socket_pair();
  send_frame(pair.left.get(), bytes_of("two"), pipes(2), in_ms(1000));
  const size_t open_before = num_open_fds();
  rlimit before = {};
  ::getrlimit(RLIMIT_NOFILE, &before);
  const OwnedFd lowest = OwnedFd::duplicate(pair.left.get());
  rlimit tight = before;
  tight.rlim_cur = static_cast<rlim_t>(lowest.get() + 2);  // room for one of the two
  ::setrlimit(RLIMIT_NOFILE, &tight);
  const ErrorInfo error = error_of([&] { receive_frame(pair.right.get(), in_ms(1000)); });
  ::setrlimit(RLIMIT_NOFILE, &before);
  EXPECT_EQ(error.code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(error.message, "this process may open no more: raise ulimit -n");
  EXPECT_EQ(num_open_fds(), open_before + 1);
}

TEST(Frame, WaitEndsAtItsDeadlineInBothDirections) {
  const SocketPair pair = make_socket_pair();
  EXPECT_EQ(error_of([&] { receive_frame(pair.right.get(), in_ms(20)); }).code,
            ErrorCode::kDeadlineExceeded);
  EXPECT_EQ(error_of([&] {
              send_frame(pair.left.get(), std::vector<uint8_t>(8 << 20), {}, in_ms(20));
            }).code,
            ErrorCode::kDeadlineExceeded);
}

TEST(Frame, SendingToAPeerThatLeftIsUnavailableAndNoSignal) {
  SocketPair pair = make_socket_pair();
  pair.right.reset();
  const ErrorInfo error =
      error_of([&] { send_frame(pair.left.get(), bytes_of("hello"), {}, in_ms(100)); });
  EXPECT_EQ(error.code, ErrorCode::kUnavailable);
}

}  // namespace
}  // namespace rollpack::bridge
