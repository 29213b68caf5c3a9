// The server against peers that say nothing, too much, or hang up.
#include "rollout/metrics/http_server.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "tests/error_text.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;

bridge::OwnedFd connect_to(int port) {
  bridge::OwnedFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const timeval limit{.tv_sec = 10};
  ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  return fd;
}

// Everything until the server closes.
std::string read_all(int fd) {
  std::string all;
  char buffer[4096];
  for (ssize_t n = 0; (n = ::recv(fd, buffer, sizeof(buffer), 0)) > 0;) {
    all.append(buffer, static_cast<size_t>(n));
  }
  return all;
}

std::string ask(int port, const std::string& request) {
  const bridge::OwnedFd fd = connect_to(port);
  EXPECT_EQ(::send(fd.get(), request.data(), request.size(), MSG_NOSIGNAL),
            static_cast<ssize_t>(request.size()));
  return read_all(fd.get());
}

HttpReply echo(std::string_view path) {
  if (path == "/throw") throw std::runtime_error("no answer");
  return {.body = std::string(path) + "\n"};
}

TEST(HttpServer, AnswersPathsWithoutTheirQueryAndClosesTheConnection) {
  HttpServer server(0, echo);
  server.start();
  const std::string reply = ask(server.port(), "GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(reply.substr(0, 17), "HTTP/1.1 200 OK\r\n");
  EXPECT_NE(reply.find("Content-Length: 3\r\n"), std::string::npos) << reply;
  EXPECT_NE(reply.find("Connection: close\r\n"), std::string::npos) << reply;
  EXPECT_EQ(reply.substr(reply.find("\r\n\r\n")), "\r\n\r\n/a\n");
  const std::string head = ask(server.port(), "HEAD /a HTTP/1.1\r\n\r\n");
  EXPECT_NE(head.find("Content-Length: 3\r\n"), std::string::npos) << head;
  EXPECT_EQ(head.substr(head.find("\r\n\r\n")), "\r\n\r\n");
}

TEST(HttpServer, WhatItCannotAnswerGetsAStatusAndCostsNobodyElse) {
  HttpServer server(0, echo);
  server.start();
  const auto status = [&](const std::string& request) {
    return ask(server.port(), request).substr(0, 12);
  };
  EXPECT_EQ(status("POST / HTTP/1.1\r\n\r\n"), "HTTP/1.1 405");
  EXPECT_EQ(status("GET /throw HTTP/1.1\r\n\r\n"), "HTTP/1.1 500");
  EXPECT_EQ(status("nonsense\r\n\r\n"), "HTTP/1.1 400");
  EXPECT_EQ(status("GET / HTTP/1.1\r\nx: " + std::string(9000, 'x') + "\r\n\r\n"), "HTTP/1.1 400");
  EXPECT_EQ(status("GET / HTTP/1.1\r\n\r\n"), "HTTP/1.1 200");
}

TEST(HttpServer, SilentPeersAreCutOffAndThoseBehindThemAnswered) {
  HttpServer server(0, echo, {.max_connections = 2, .connection = 200ms});
  server.start();
  std::vector<bridge::OwnedFd> silent;
  for (int i = 0; i < 6; ++i) silent.push_back(connect_to(server.port()));
  EXPECT_EQ(ask(server.port(), "GET / HTTP/1.1\r\n\r\n").substr(0, 12), "HTTP/1.1 200");
  for (const bridge::OwnedFd& fd : silent) EXPECT_EQ(read_all(fd.get()), "");
}

TEST(HttpServer, APeerThatDoesNotReadIsCutOff) {
  const std::string large(32 << 20, 'x');  // beyond any socket buffer
  HttpServer server(0, [&](std::string_view) { return HttpReply{.body = large}; },
                    {.max_connections = 1, .connection = 2s});
  server.start();
  const bridge::OwnedFd stuck = connect_to(server.port());
  ASSERT_GT(::send(stuck.get(), "GET / HTTP/1.1\r\n\r\n", 18, MSG_NOSIGNAL), 0);
  // It waits for the first one's end.
  EXPECT_GT(ask(server.port(), "GET / HTTP/1.1\r\n\r\n").size(), large.size());
  EXPECT_LT(read_all(stuck.get()).size(), large.size());
}

TEST(HttpServer, ItsEndWaitsNeitherForPeersNorForAnAnswerThatHangs) {
  std::atomic<bool> is_asked = false;
  auto release = std::make_shared<std::atomic<bool>>(false);
  const auto started = std::chrono::steady_clock::now();
  {
    HttpServer server(0, [&is_asked, release](std::string_view) {
      is_asked = true;
      while (!*release) std::this_thread::sleep_for(1ms);
      return HttpReply{};
    });
    server.start();
    const bridge::OwnedFd silent = connect_to(server.port()), asks = connect_to(server.port());
    ASSERT_GT(::send(asks.get(), "GET / HTTP/1.1\r\n\r\n", 18, MSG_NOSIGNAL), 0);
    while (!is_asked) std::this_thread::sleep_for(1ms);
  }
  EXPECT_LT(std::chrono::steady_clock::now() - started, 5s);
  *release = true;
  std::this_thread::sleep_for(50ms);  // the thread ends by itself, on memory of its own
}

TEST(HttpServer, ATakenPortIsAnErrorThatNamesIt) {
  const HttpServer first(0, echo);
  const std::string text = testing::error_text([&] { HttpServer(first.port(), echo); });
  EXPECT_NE(text.find("unavailable: metrics.port = " + std::to_string(first.port())),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("Address already in use"), std::string::npos) << text;
}

}  // namespace
}  // namespace rollpack::rollout
