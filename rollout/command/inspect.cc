#include <fmt/format.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "kernels/base/error.h"
#include "rollout/command/command.h"
#include "rollout/jsonl/whole_file.h"
#include "trainer_bridge/inspection/batch_contents.h"
#include "trainer_bridge/inspection/batch_source.h"
#include "trainer_bridge/inspection/batch_table.h"
#include "trainer_bridge/inspection/svg_drawing.h"
#include "trainer_bridge/inspection/text_drawing.h"

namespace rollpack::rollout {
namespace {

constexpr int64_t kMinWidth = 40;
constexpr int64_t kPipeWidth = 80;

int64_t terminal_width() {
  winsize size = {};
  if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return kPipeWidth;
  return std::max<int64_t>(size.ws_col, kMinWidth);
}

bool is_socket(const std::string& path) {
  struct stat status = {};
  return ::stat(path.c_str(), &status) == 0 && S_ISSOCK(status.st_mode);
}

bridge::BatchCopy copy_of(const InspectLine& line) {
  if (is_socket(line.batch)) return bridge::copy_from_server(line.batch, line.slot);
  if (!line.slot) return bridge::read_batch_file(line.batch);
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = "--slot",
               .value = std::to_string(*line.slot),
               .allowed = "nothing for a file; it holds one batch"});
}

}  // namespace

int inspect(const InspectLine& line) {
  const bridge::BatchCopy copy = copy_of(line);
  const bridge::BatchTable table = bridge::read_batch_table(copy.bytes, copy.origin);
  const bridge::BatchContents contents = bridge::read_batch_contents(table);
  const bridge::DrawingOptions options{
      .rows = line.rows, .limit = line.limit, .width = line.width ? *line.width : terminal_width()};
  fmt::print("{}", bridge::text_drawing(table, contents, copy.state, options));
  if (line.svg.empty()) return 0;
  WholeFile file(line.svg);
  file.write(bridge::svg_drawing(table, contents, copy.state, options));
  file.commit();
  return 0;
}

}  // namespace rollpack::rollout
