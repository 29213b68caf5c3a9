// The command line of rollpack: parses it, starts MPI where mpirun asks for it, loads the
// configuration and hands over to one command. Nothing else lives here.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <functional>
#include <string>

#include <fmt/format.h>

#include "kernels/base/error.h"
#include "kernels/base/fault_point.h"
#include "rollout/cluster/job.h"
#include "rollout/cluster/launch.h"
#include "rollout/command/command.h"
#include "rollout/command/end_signal.h"
#include "rollout/config/config.h"
#include "rollout/event_log/event_log.h"

namespace {

using rollpack::Error;
using rollpack::rollout::CommandLine;
using rollpack::rollout::Config;
using rollpack::rollout::InspectLine;
using rollpack::rollout::Job;
using rollpack::rollout::JobOptions;
using rollpack::rollout::Launch;

constexpr int kUsageStatus = 2;

using Run = std::function<int(Job&, const CommandLine&)>;

struct Parsed {
  CommandLine line;
  Run run;  // empty: print the configuration
  bool serves = false;
  InspectLine inspect_line;
  bool inspects = false;
  rollpack::rollout::TopOptions top;
  bool is_top = false;
  bool prints_help = false;
};

CLI::App* add_command(CLI::App& app, Parsed& parsed, const std::string& name,
                      const std::string& help, Run run) {
  CLI::App* command = app.add_subcommand(name, help);
  command->add_option("--config", parsed.line.config_path, "YAML file")->required();
  command->add_option("--set", parsed.line.overrides, "section.key=value, wins over the file")
      ->take_all()
      ->expected(1);
  command->callback([&parsed, run] { parsed.run = run; });
  return command;
}

void add_commands(CLI::App& app, Parsed& parsed) {
  using namespace rollpack::rollout;
  CommandLine& line = parsed.line;
  add_command(app, parsed, "serve", "serve trainers until stopped", serve)
      ->parse_complete_callback([&parsed] { parsed.serves = true; });
  CLI::App* command = add_command(app, parsed, "generate", "prompts in, samples out", generate);
  command->add_option("--prompts", line.input, "JSONL of prompts")->required();
  command->add_option("--output", line.output, "JSONL of samples; - is stdout")->required();
  command = add_command(app, parsed, "score", "logprobs of given responses", score);
  command->add_option("--sequences", line.input, "JSONL of sequences")->required();
  command->add_option("--output", line.output, "JSONL of logprobs; - is stdout")->required();
  command = add_command(app, parsed, "bench", "time a workload of fixed lengths", bench);
  command->add_option("--workload", line.input, "JSONL of lengths")->required();
  command->add_option("--repeat", line.repeat, "passes, cold first")->check(CLI::Range(1, 1000));
  command
      ->add_option("--compare", line.compare, "batching modes to run side by side, comma-separated")
      ->delimiter(',')
      ->check(CLI::IsMember({"left_padded", "length_sorted", "prepacked", "continuous"}));
  command->add_flag("--profile", line.profile, "share of time and of the machine's limits by op");
  command = add_command(app, parsed, "config", "print the resolved configuration", {});
  command->footer(config_help());
}

void add_inspect(CLI::App& app, Parsed& parsed) {
  CLI::App* command = app.add_subcommand("inspect", "draw a batch: rows, samples, masks, pads");
  InspectLine& line = parsed.inspect_line;
  command
      ->add_option("BATCH", line.batch,
                   "file that batch.save() wrote, or the socket of a running server, which is "
                   "looked at without disturbing its trainers")
      ->required();
  command->add_option("--row", line.rows, "row to draw in full, with its samples; repeatable")
      ->expected(1)
      ->take_all();
  command->add_option("--limit", line.limit, "rows drawn where --row names none")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  command->add_option("--slot", line.slot, "of a server: not the latest batch, but this slot's")
      ->check(CLI::Range(0, 252));
  command->add_option("--width", line.width, "characters a line; default: the terminal's")
      ->check(CLI::Range(40, 10000));
  command->add_option("--svg", line.svg, "also write the picture to this file");
  command->callback([&parsed] { parsed.inspects = true; });
}

void add_top(CLI::App& app, Parsed& parsed) {
  rollpack::rollout::TopOptions& top = parsed.top;
  CLI::App* command = app.add_subcommand("top", "show what a serving job does, live");
  command->add_option("--config", top.config_path, "YAML file that the job was started with");
  command->add_option("--port", top.port, "its metrics.port")->check(CLI::Range(1, 65535));
  command->add_option("--interval", top.interval_s, "seconds")->check(CLI::Range(0.1, 3600.0));
  command->add_flag("--once", top.once, "print one screen and end");
  command->callback([&parsed] { parsed.is_top = true; });
}

int run_inspect(const InspectLine& line) {
  try {
    return rollpack::rollout::inspect(line);
  } catch (const Error& error) {
    rollpack::rollout::log_end(error.info);
    return 1;
  }
}

int run_top(const rollpack::rollout::TopOptions& options) {
  try {
    return rollpack::rollout::top(options);
  } catch (const Error& error) {
    rollpack::rollout::log_end(error.info);
    return error.info.code == rollpack::ErrorCode::kInvalidArgument ? kUsageStatus : 1;
  }
}

[[noreturn]] void run_rank(const Parsed& parsed, const Config& config, Launch& launch) {
  const JobOptions options{.profiles = parsed.line.profile, .serves = parsed.serves};
  if (launch.placement().rank > 0) rollpack::rollout::run_worker_rank(config, launch, options);
  rollpack::rollout::log_document("configuration", rollpack::rollout::config_json(config),
                                  rollpack::rollout::config_yaml(config));
  Job job(config, launch, options);
  // Left without destructors: a step under way may take seconds, and nobody waits for its result.
  launch.exit(parsed.run(job, parsed.line));
}

int run(int argc, char** argv) {
  Parsed parsed;
  CLI::App app("rollpack: a rollout engine for RL on language models", "rollpack");
  app.require_subcommand(0, 1);  // checked below: CLI11 would not name an unknown command
  add_commands(app, parsed);
  add_inspect(app, parsed);
  add_top(app, parsed);
  try {
    app.parse(argc, argv);
    if (app.get_subcommands().empty()) throw CLI::RequiredError::Subcommand(1);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kUsageStatus;
  }
  if (parsed.inspects) return run_inspect(parsed.inspect_line);
  if (parsed.is_top) return run_top(parsed.top);
  if (!parsed.run) {
    const Config config =
        rollpack::rollout::load_config(parsed.line.config_path, parsed.line.overrides);
    fmt::print("{}", rollpack::rollout::config_yaml(config));
    return 0;
  }
  Launch launch(&argc, &argv);
  rollpack::rollout::set_log_rank(launch.placement().rank);
  int status = kUsageStatus;
  try {
    rollpack::arm_faults(launch.placement().rank);
    const Config config =
        rollpack::rollout::load_config(parsed.line.config_path, parsed.line.overrides);
    rollpack::rollout::configure_log({.level = config.log.level, .format = config.log.format});
    status = 1;
    run_rank(parsed, config, launch);
  } catch (const Error& error) {
    // Every rank reads the same files: one of them says what is wrong.
    if (launch.placement().rank == 0) rollpack::rollout::log_end(error.info);
    if (status != kUsageStatus) launch.call_off();
  }
  launch.exit(status);
}

}  // namespace

int main(int argc, char** argv) {
  rollpack::rollout::block_end_signals();
  try {
    rollpack::rollout::start_log();
    return run(argc, argv);
  } catch (const Error& error) {
    rollpack::rollout::log_end(error.info);
    return kUsageStatus;
  } catch (const std::exception& error) {
    rollpack::rollout::log_end({.code = rollpack::ErrorCode::kInternal, .message = error.what()});
    return 1;
  }
}
