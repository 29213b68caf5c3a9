// A live view of a serving job in a terminal. It only reads its metrics, so that it may run or not
// run beside it, and needs neither MPI nor a model.
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdio>
#include <optional>
#include <thread>

#include <fmt/format.h>

#include "kernels/base/error.h"
#include "rollout/command/command.h"
#include "rollout/config/config.h"
#include "rollout/metrics/top_screen.h"

namespace rollpack::rollout {
namespace {

constexpr std::chrono::milliseconds kTimeout{5000};

int port_from(const TopOptions& options) {
  if (options.port > 0) return options.port;
  const std::string advice = "its log names the port; --port takes it";
  if (options.config_path.empty()) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "--port",
                 .allowed = "--port or --config with metrics.port",
                 .message = advice});
  }
  const Config config = load_config(options.config_path);
  if (config.metrics.port > 0) return config.metrics.port;
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = "metrics.port",
               .value = std::to_string(config.metrics.port),
               .origin = config.origin_of("metrics.port"),
               .allowed = "a port above 0",
               .message = advice});
}

ScreenSize screen_size() {
  winsize window{};
  if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) != 0 || window.ws_row == 0) return {};
  // The last line stays empty: a line end there would scroll.
  return {.num_lines = static_cast<size_t>(window.ws_row) - 1,
          .num_columns = static_cast<size_t>(window.ws_col)};
}

// False: nobody reads it any more.
bool show(const std::vector<std::string>& lines, bool is_terminal) {
  std::string text = is_terminal ? "\x1b[H" : "";  // over the screen before, without a flicker
  for (const std::string& line : lines) text += line + (is_terminal ? "\x1b[K\n" : "\n");
  text += is_terminal ? "\x1b[J" : "\n";
  return std::fwrite(text.data(), 1, text.size(), stdout) == text.size() &&
         std::fflush(stdout) == 0;
}

// main() has blocked them for commands that have something to finish; nothing is to finish here.
void let_signals_end_it() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&signals, signal);
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
}

}  // namespace

int top(const TopOptions& options) {
  let_signals_end_it();
  const int port = port_from(options);
  if (options.once) {
    const Scrape now = scrape(port, kTimeout);
    // As long as it has to be: it goes to a file or a pipe.
    return show(top_screen(now, nullptr, port, {.num_lines = 1 << 20, .num_columns = 1 << 10}),
                /*is_terminal=*/false)
               ? 0
               : 1;
  }
  const bool is_terminal = ::isatty(STDOUT_FILENO) != 0;
  if (is_terminal) fmt::print("\x1b[2J");
  std::optional<Scrape> before;
  for (;;) {
    std::vector<std::string> lines;
    try {
      Scrape now = scrape(port, kTimeout);
      lines = top_screen(now, before ? &*before : nullptr, port, screen_size());
      before = std::move(now);
    } catch (const Error& error) {  // it may come back
      lines = {fmt::format("rollpack top  127.0.0.1:{}", port), "", error.what()};
      before.reset();
    }
    if (!show(lines, is_terminal)) return 1;
    std::this_thread::sleep_for(std::chrono::duration<double>(options.interval_s));
  }
}

}  // namespace rollpack::rollout
