#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>

#include "kernels/base/error.h"
#include "rollout/command/command.h"
#include "rollout/command/end_signal.h"
#include "rollout/command/progress.h"
#include "rollout/jsonl/readers.h"
#include "rollout/jsonl/whole_file.h"
#include "rollout/jsonl/writers.h"

namespace rollpack::rollout {
namespace {

// Sequences in flight: several times what engines run at once, so that none of them idles at the
// end of a window while another still works.
constexpr size_t kSequencesPerWindow = 4096;

// Shared with the callback, which may come after this command has given up.
struct Window {
  std::atomic<bool> is_done = false;
  bridge::Outcome error;
  std::vector<bridge::ScoredSequence> results;
};

}  // namespace

int score(Job& job, const CommandLine& line) {
  std::vector<bridge::ScoreSequence> sequences = read_sequences(line.input);
  WholeFile file(line.output);
  const auto end = std::make_shared<EndSignal>();
  Dispatcher& dispatcher = job.dispatcher();
  dispatcher.set_on_end([end] { end->raise(1); });
  job.start();
  Progress progress("sequences", static_cast<int64_t>(sequences.size()));
  for (size_t begin = 0; begin < sequences.size(); begin += kSequencesPerWindow) {
    const size_t last = std::min(sequences.size(), begin + kSequencesPerWindow);
    std::vector<bridge::ScoreSequence> some(std::make_move_iterator(sequences.begin() + begin),
                                            std::make_move_iterator(sequences.begin() + last));
    const auto window = std::make_shared<Window>();
    dispatcher.score(std::move(some), [window, end](bridge::Outcome error,
                                                    std::vector<bridge::ScoredSequence> scored) {
      window->error = std::move(error);
      window->results = std::move(scored);
      window->is_done = true;  // pairs with the load in wait(): the results are there
      end->notify();
    });
    end->wait([&] { return window->is_done.load(); });
    if (!window->is_done || window->error) {
      const bridge::Outcome broken = window->error ? window->error : dispatcher.health();
      job.stop(/*hand_back=*/false);
      if (broken) throw Error(*broken);
      return end->status();
    }
    for (const bridge::ScoredSequence& scored : window->results) file.write(scored_line(scored));
    progress.show(static_cast<int64_t>(last));
  }
  job.stop(/*hand_back=*/false);
  file.commit();
  return 0;
}

}  // namespace rollpack::rollout
