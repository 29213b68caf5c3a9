// bench_scaling [threads]: how the cost of a step grows with its tokens, with the context of its
// rows and with threads. Qwen2.5-0.5B's shape, random weights, medians of five steps.
//
// Two laws are checked, and broken ones end the program with status 1: a token costs no more among
// many than among few, and a longer context costs attention only, there in proportion to the
// (token, key) pairs.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <functional>
#include <ranges>
#include <string>
#include <utility>
#include <vector>

#include "tests/bench/limits.h"
#include "tests/bench/model_rig.h"
#include "tests/bench/op_rig.h"

namespace rollpack::bench {
namespace {

constexpr int kRepetitions = 5;
constexpr int32_t kPageTokens = 16;  // of the cpu backend
constexpr int32_t kMaxPositions = 8192;
constexpr int32_t kNumPages = 4096;  // 16 sequences of 4,096 tokens: 800 MB
// What a law may be broken by: medians of one run differ by a few per cent on a quiet machine.
constexpr double kTolerance = 1.10;

// Sequences of the same shape: each has `context` tokens cached and computes `rows` after them.
struct StepShape {
  int32_t num_seqs = 1;
  int32_t rows = 1;
  int32_t context = 0;

  double tokens() const { return double{1} * num_seqs * rows; }
  // Visible (token, key) pairs.
  double pairs() const { return tokens() * (context + (rows + 1) / 2.0); }
  int32_t pages_each() const { return (context + rows + kPageTokens - 1) / kPageTokens; }
};

// Each sequence on pages of its own; its last row is sampled.
kernels::StepPlan plan_of(const StepShape& shape) {
  kernels::StepPlan plan;
  for (int32_t s = 0; s < shape.num_seqs; ++s) {
    add_sequence(plan, shape.rows, shape.context,
                 page_range(s * shape.pages_each(), shape.pages_each()), s);
    const int32_t next = shape.context + shape.rows;
    plan.slot_inits.push_back({.slot = s,
                               .sampling = {.temperature = 1.0f},
                               .sample_index = static_cast<uint32_t>(s),
                               .next_position = next,
                               .end_position = next + 1});
    plan.samples.push_back({.row = (s + 1) * shape.rows - 1, .slot = s});
  }
  return plan;
}

// What steps of one shape cost.
struct Line {
  StepShape shape;
  kernels::StepProfile profile;  // of one of them: FLOP and bytes
  double wall_s = 0;
  double attention_s = 0;

  double other_s() const { return wall_s - attention_s; }
  double us_per_token() const { return 1e6 * wall_s / shape.tokens(); }
  double ns_per_pair() const { return 1e9 * attention_s / shape.pairs(); }
};

// A model whose whole cache holds keys and values.
class Steps {
 public:
  explicit Steps(int num_threads)
      : rig_({.num_threads = num_threads, .num_pages = kNumPages}, kMaxPositions) {
    fill_cache(rig_.backend(), rig_.options(),
               {.num_groups = 1,
                .group_size = 1,
                .prompt_tokens = kNumPages * kPageTokens,
                .own_tokens = 0});
  }

  // Medians of five steps, after one that warms up. All shapes take turns, so that a disturbance of
  // a second meets one step of many shapes and not all steps of one.
  std::vector<Line> run(const std::vector<StepShape>& shapes) {
    std::vector<std::vector<StepTime>> times(shapes.size());
    for (int i = 0; i <= kRepetitions; ++i) {
      for (size_t shape = 0; shape < shapes.size(); ++shape) {
        StepTime time = rig_.run(plan_of(shapes[shape]));
        if (i > 0) times[shape].push_back(std::move(time));
      }
    }
    std::vector<Line> lines;
    for (size_t i = 0; i < shapes.size(); ++i) lines.push_back(medians(shapes[i], times[i]));
    return lines;
  }

 private:
  static Line medians(const StepShape& shape, const std::vector<StepTime>& times) {
    std::vector<double> wall_s, attention_s;
    for (const StepTime& time : times) {
      wall_s.push_back(time.wall_s);
      attention_s.push_back(0);
      for (const kernels::OpProfile& op : time.profile.ops) {
        if (op.name == "attention") attention_s.back() += op.seconds;
      }
    }
    const auto median = [](std::vector<double>& values) {
      std::ranges::nth_element(values, values.begin() + kRepetitions / 2);
      return values[kRepetitions / 2];
    };
    return {.shape = shape,
            .profile = times.front().profile,
            .wall_s = median(wall_s),
            .attention_s = median(attention_s)};
  }

  ModelRig rig_;
};

// What must not rise from a line of a table to a later one by more than the tolerance.
struct Law {
  std::string name;
  std::function<double(const Line&)> cost;
};

const Law kToken = {"a token", [](const Line& line) { return line.us_per_token(); }};
const Law kTokenOutside = {"a token outside of attention",
                           [](const Line& line) { return line.other_s() / line.shape.tokens(); }};
const Law kPair = {"a pair", [](const Line& line) { return line.ns_per_pair(); }};

struct Table {
  std::string name;
  std::vector<Law> laws;
  std::vector<StepShape> shapes;
  std::vector<Line> lines;
};

std::vector<Table> tables() {
  std::vector<Table> all = {{"rows: sequences decoding", {kToken}},
                            {"context: 16 sequences decoding", {kTokenOutside, kPair}},
                            {"tokens: the first chunk of one prompt", {kTokenOutside, kPair}},
                            {"context: 256 tokens of one prompt", {kTokenOutside, kPair}}};
  for (const int32_t rows : {1, 2, 4, 8, 16, 32, 64, 128}) all[0].shapes.push_back({rows, 1, 255});
  for (const int32_t keys : {128, 512, 2048, 4096}) all[1].shapes.push_back({16, 1, keys - 1});
  for (const int32_t rows : {64, 128, 256, 512, 1024, 2048}) all[2].shapes.push_back({1, rows, 0});
  for (const int32_t keys : {0, 512, 2048, 4096}) all[3].shapes.push_back({1, 256, keys});
  return all;
}

// max(FLOP / peak, bytes / bandwidth) of the ops that have most of them, over the step's time.
double share_of_limit(const Line& line, int num_threads) {
  double flops = 0, bytes = 0;
  for (const kernels::OpProfile& op : line.profile.ops) {
    const bool is_large =
        op.name.starts_with("linear") || op.name == "attention" || op.name == "lm_head";
    if (is_large) flops += op.flops, bytes += op.bytes;
  }
  const Limit peak = peak_of(isa_of({}), DType::kBF16);
  return std::max(flops / limit_of(peak, num_threads),
                  bytes / limit_of(Limit::kReadBandwidth, num_threads)) /
         line.wall_s;
}

// The laws that line `at` breaks, as text; "" where none.
std::string broken_laws(const Table& table, size_t at) {
  std::string text;
  for (const Law& law : table.laws) {
    const auto costs = table.lines | std::views::take(at) | std::views::transform(law.cost);
    if (at > 0 && law.cost(table.lines[at]) > kTolerance * std::ranges::min(costs)) {
      text += "  MORE " + law.name;
    }
  }
  return text;
}

// Returns: whether the table's laws hold.
bool print_table(const Table& table, int num_threads) {
  fmt::print("\n{}\n{:>6} {:>8} {:>10} {:>11} {:>10} {:>13} {:>10} {:>9}\n", table.name, "tokens",
             "context", "step ms", "us a token", "attention", "all but it ms", "ns a pair",
             "of limit");
  bool all_hold = true;
  for (size_t i = 0; i < table.lines.size(); ++i) {
    const Line& line = table.lines[i];
    const std::string broken = broken_laws(table, i);
    all_hold &= broken.empty();
    fmt::print("{:>6} {:>8} {:>10.2f} {:>11.1f} {:>9.1f}% {:>13.2f} {:>10.1f} {:>8.1f}%{}\n",
               line.shape.tokens(), line.shape.context, 1e3 * line.wall_s, line.us_per_token(),
               100 * line.attention_s / line.wall_s, 1e3 * line.other_s(), line.ns_per_pair(),
               100 * share_of_limit(line, num_threads), broken);
  }
  return all_hold;
}

void print_threads(int max_threads) {
  const std::vector<StepShape> shapes = {{1, 1, 255}, {128, 1, 255}, {1, 2048, 0}};
  fmt::print("\nthreads: a step of 1 and of 128 sequences decoding, and of 2,048 prompt tokens\n");
  fmt::print("{:>7} {:>9} {:>7} {:>9} {:>7} {:>9} {:>7}\n", "threads", "1 ms", "gain", "128 ms",
             "gain", "2048 ms", "gain");
  std::vector<double> single_s;
  for (int num_threads = 1; num_threads <= max_threads; ++num_threads) {
    Steps steps(num_threads);
    fmt::print("{:>7}", num_threads);
    const std::vector<Line> lines = steps.run(shapes);
    for (size_t i = 0; i < lines.size(); ++i) {
      const double seconds = lines[i].wall_s;
      if (num_threads == 1) single_s.push_back(seconds);
      fmt::print(" {:>9.2f} {:>7.2f}", 1e3 * seconds, single_s[i] / seconds);
    }
    fmt::print("\n");
  }
}

int run(int num_threads) {
  const Limit peak = peak_of(isa_of({}), DType::kBF16);
  limit_of(peak, num_threads);
  limit_of(Limit::kReadBandwidth, num_threads);
  std::vector<Table> all = tables();
  {
    Steps steps(num_threads);
    for (Table& table : all) table.lines = steps.run(table.shapes);
  }
  print_threads(num_threads);
  const double apart = measure_limits_again();
  fmt::print("\n{} threads; limits: {:.0f} GFLOP/s, {:.1f} GB/s, before and after {:.1f} % apart\n",
             num_threads, limit_of(peak, num_threads) * 1e-9,
             limit_of(Limit::kReadBandwidth, num_threads) * 1e-9, 100 * (apart - 1));
  bool all_hold = true;
  for (const Table& table : all) all_hold &= print_table(table, num_threads);
  return all_hold ? 0 : 1;
}

}  // namespace
}  // namespace rollpack::bench

int main(int argc, char** argv) {
  int num_threads = 2;
  if (argc > 1) {
    const std::string text = argv[1];
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), num_threads);
    if (argc > 2 || error != std::errc{} || end != text.data() + text.size() || num_threads < 1) {
      fmt::print(stderr, "usage: bench_scaling [threads, 1 or more]\n");
      return 2;
    }
  }
  return rollpack::bench::run(num_threads);
}
