// The commands of the program, as rank 0 runs them. Each returns the process's exit status: 0 all
// went well, 1 some sample failed or the job broke; errors of use and configuration are thrown.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "rollout/cluster/job.h"

namespace rollpack::rollout {

struct CommandLine {
  std::string config_path;
  std::vector<std::string> overrides;  // --set section.key=value
  std::string input;                   // prompts, sequences or workload, JSONL
  std::string output;                  // JSONL; "-" is standard output
  int repeat = 1;                      // bench: passes over the workload
  std::vector<std::string> compare;    // bench: batching modes to run side by side
  bool profile = false;                // bench: time every op
};

struct InspectLine {
  std::string batch;             // a file, or the socket of a server
  std::optional<int32_t> slot;   // of a server; none: the latest batch
  std::vector<int64_t> rows;     // to draw in full; empty: the first `limit` in short
  int64_t limit = 8;             // rows
  std::optional<int64_t> width;  // characters a line; none: the terminal's
  std::string svg;               // file to write a picture to; empty: none
};

// Draws a batch on standard output; needs no configuration and no model.
int inspect(const InspectLine& line);

struct TopOptions {
  std::string config_path;  // where metrics.port is, unless `port` is given
  int port = 0;
  double interval_s = 1;
  bool once = false;  // print one screen and end
};

// Serves trainers over the bridge until a signal, a shutdown request or the loss of all workers.
int serve(Job& job, const CommandLine& line);
// Prompts in, samples out, in input order.
int generate(Job& job, const CommandLine& line);
// Sequences in, logprobs out, in input order.
int score(Job& job, const CommandLine& line);
// A workload of fixed lengths; one JSON object on standard output.
int bench(Job& job, const CommandLine& line);

// Shows what a serving job on this machine says of itself, again and again; no rank of any job.
int top(const TopOptions& options);

}  // namespace rollpack::rollout
