#include "rollout/bench/pass.h"

#include <cmath>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::rollout {

int64_t Pass::counter(const std::string& name) const {
  const auto found = counters.find(name);
  return found == counters.end() ? 0 : std::llround(found->second);
}

PassRunner::PassRunner(Job& job) : job_(job) {
  job_.dispatcher().set_sink(*this);
  job_.dispatcher().set_on_end([this] { end_.raise(1); });
  job_.start();
}

void PassRunner::count(bridge::Outcome error) {
  {
    const std::lock_guard lock(mutex_);
    ++num_done_;
    if (error && !error_) error_ = std::move(error);
  }
  end_.notify();
}

// Waits for `done`, which is asked with the lock held. false: a signal came.
template <class Done>
bool PassRunner::wait(Done done) {
  const bool ended = end_.wait([&] {
    const std::lock_guard lock(mutex_);
    return error_ || done();
  });
  const bridge::Outcome broken = job_.dispatcher().health();
  const std::lock_guard lock(mutex_);
  if (broken) throw Error(*broken);
  if (error_) throw Error(*error_);
  return !ended;
}

bool PassRunner::start_measuring(const std::string& batching) {
  is_measuring_ = false;
  job_.dispatcher().measure(batching, [this](bridge::Outcome error) {
    {
      const std::lock_guard lock(mutex_);
      is_measuring_ = true;
      if (error) error_ = std::move(error);
    }
    end_.notify();
  });
  return wait([this] { return is_measuring_; });
}

std::optional<Measurement> PassRunner::take_measurement() {
  measurement_.reset();
  job_.dispatcher().take_measurement([this](bridge::Outcome error, Measurement measurement) {
    {
      const std::lock_guard lock(mutex_);
      if (error) error_ = std::move(error);
      measurement_ = std::move(measurement);
    }
    end_.notify();
  });
  if (!wait([this] { return measurement_.has_value(); })) return std::nullopt;
  return std::exchange(measurement_, std::nullopt);
}

std::optional<Pass> PassRunner::run(const Workload& workload, const std::string& batching) {
  if (!start_measuring(batching)) return std::nullopt;
  const std::optional<Measurement> before = take_measurement();
  if (!before) return std::nullopt;
  std::vector<GroupRequest> groups = make_groups(workload, job_.config(), job_.replica().model());
  int64_t target = workload.num_samples;
  {
    const std::lock_guard lock(mutex_);
    target += num_done_;
  }
  const double start_s = steady_seconds();
  job_.dispatcher().submit_groups(std::move(groups));
  if (!wait([&] { return num_done_ >= target; })) return std::nullopt;
  Pass pass{.wall_s = steady_seconds() - start_s};
  std::optional<Measurement> measured = take_measurement();
  if (!measured) return std::nullopt;
  pass.measured = std::move(*measured);
  for (const double time_s : pass.measured.first_token_times_s) {
    pass.first_token_s.push_back(time_s - start_s);
  }
  for (const auto& [name, value] : pass.measured.stats) {
    const auto earlier = before->stats.find(name);
    pass.counters[name] = value - (earlier == before->stats.end() ? 0 : earlier->second);
  }
  pass.peak_memory_bytes = pass.measured.stats["peak_memory_bytes"];
  return pass;
}

}  // namespace rollpack::rollout
