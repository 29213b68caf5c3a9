#include "rollout/metrics/scrape.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "trainer_bridge/wire/deadline.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {
namespace {

using TimePoint = std::chrono::steady_clock::time_point;

constexpr std::string_view kPrefix = "rollpack:";
constexpr size_t kMaxReplyBytes = size_t{64} << 20;  // 300 bytes a rank: far above any job

[[noreturn]] void fail(int port, std::string what) {
  throw Error({.code = ErrorCode::kUnavailable,
               .field = "port",
               .value = std::to_string(port),
               .allowed = "the metrics.port of a serving job on this machine",
               .message = std::move(what)});
}

void wait_for(int fd, short events, TimePoint deadline, int port) {
  const int timeout_ms = bridge::milliseconds_until(deadline);
  pollfd waiting{.fd = fd, .events = events, .revents = 0};
  if (timeout_ms == 0 || ::poll(&waiting, 1, timeout_ms) == 0) {
    fail(port, "no answer in time");
  }
}

bridge::OwnedFd connect_to(int port, TimePoint deadline) {
  bridge::OwnedFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) fail(port, std::strerror(errno));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
    return fd;
  }
  if (errno != EINPROGRESS) fail(port, std::strerror(errno));
  wait_for(fd.get(), POLLOUT, deadline, port);
  int error = 0;
  socklen_t bytes = sizeof(error);
  ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &bytes);
  if (error != 0) fail(port, std::strerror(error));
  return fd;
}

// The body of the reply, whatever its status.
std::string get(int port, const char* path, TimePoint deadline) {
  const bridge::OwnedFd fd = connect_to(port, deadline);
  const std::string request = fmt::format("GET {} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n", path);
  // A fresh socket's buffer holds it.
  if (::send(fd.get(), request.data(), request.size(), MSG_NOSIGNAL) !=
      static_cast<ssize_t>(request.size())) {
    fail(port, std::strerror(errno));
  }
  std::string reply;
  char buffer[65536];
  for (;;) {
    wait_for(fd.get(), POLLIN, deadline, port);
    const ssize_t num = ::recv(fd.get(), buffer, sizeof(buffer), 0);
    if (num == 0) break;
    if (num < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (num < 0) fail(port, std::strerror(errno));
    reply.append(buffer, static_cast<size_t>(num));
    if (reply.size() > kMaxReplyBytes) fail(port, "an endless answer");
  }
  const size_t body = reply.find("\r\n\r\n");
  if (body == std::string::npos || !reply.starts_with("HTTP/")) fail(port, "it speaks no HTTP");
  return reply.substr(body + 4);
}

[[noreturn]] void refuse(std::string_view line) {
  throw Error({.code = ErrorCode::kDataLoss,
               .field = "metrics",
               .value = std::string(line.substr(0, 200)),
               .allowed = "lines `name{labels} number`"});
}

// key="value", .., with \\, \" and \n escaped.
std::map<std::string, std::string> parse_labels(std::string_view text, std::string_view line) {
  std::map<std::string, std::string> labels;
  while (!text.empty()) {
    const size_t equals = text.find("=\"");
    if (equals == std::string_view::npos) refuse(line);
    std::string& value = labels[std::string(text.substr(0, equals))];
    size_t at = equals + 2;
    while (at < text.size() && text[at] != '"') {
      const bool is_escaped = text[at] == '\\' && at + 1 < text.size();
      if (is_escaped) ++at;
      value += is_escaped && text[at] == 'n' ? '\n' : text[at];
      ++at;
    }
    if (at >= text.size()) refuse(line);
    text.remove_prefix(at + 1);
    if (text.starts_with(",")) text.remove_prefix(1);
  }
  return labels;
}

void parse_line(std::string_view line, Scrape& scrape) {
  const size_t space = line.rfind(' ');
  if (space == std::string_view::npos || space == 0) refuse(line);
  double value = 0;
  const std::string number(line.substr(space + 1));
  char* end = nullptr;
  value = std::strtod(number.c_str(), &end);  // from_chars knows no +Inf
  if (number.empty() || *end != '\0') refuse(line);
  std::string_view name = line.substr(0, space);
  if (!name.starts_with(kPrefix)) return;
  name.remove_prefix(kPrefix.size());
  const size_t brace = name.find('{');
  if (brace == std::string_view::npos) {
    scrape.values[std::string(name)] = value;
    return;
  }
  if (!name.ends_with('}')) refuse(line);
  const auto labels = parse_labels(name.substr(brace + 1, name.size() - brace - 2), line);
  const std::string_view bare = name.substr(0, brace);
  const auto rank = labels.find("rank");
  if (bare == "info") {
    scrape.info = labels;
  } else if (bare.starts_with("rank_") && rank != labels.end()) {
    scrape.ranks[std::atoi(rank->second.c_str())][std::string(bare.substr(5))] = value;
  } else {
    scrape.values[std::string(name)] = value;
  }
}

}  // namespace

Scrape parse_metrics(std::string_view text) {
  Scrape scrape;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    if (!line.empty() && line.front() != '#') parse_line(line, scrape);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return scrape;
}

Scrape scrape(int port, std::chrono::milliseconds timeout) {
  const TimePoint deadline = std::chrono::steady_clock::now() + timeout;
  Scrape scraped = parse_metrics(get(port, "/metrics", deadline));
  scraped.time = std::chrono::steady_clock::now();
  const auto health =
      nlohmann::json::parse(get(port, "/health", deadline), nullptr, /*allow_exceptions=*/false);
  if (scraped.info.empty() || !health.is_object() || !health.contains("status")) {
    fail(port, "what answers there is no serving job of rollpack");
  }
  scraped.status = health.value("status", "");
  scraped.message = health.value("message", "");
  return scraped;
}

}  // namespace rollpack::rollout
