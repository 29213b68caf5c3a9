#include "kernels/step/step_queue.h"

#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <memory>
#include <stdexcept>

#include "kernels/base/error.h"
#include "tests/kernels/rig.h"

namespace rollpack::kernels {
namespace {

using testing::error_text;
using testing::soon;

class NoProgram final : public StepProgram {
 public:
  void run(Backend&, int64_t, int64_t) override {}
};

StepPlan plan_of(int32_t tag) {
  StepPlan plan;
  plan.input_ids = {tag};
  return plan;
}

// Runs a step by echoing its tag; tag -1 fails, tag 7 waits for `gate`.
struct Echo {
  std::promise<void> gate;
  std::shared_future<void> is_open = gate.get_future().share();
  std::shared_ptr<StepProgram> program = std::make_shared<NoProgram>();
  StepQueue queue{[this](const StepPlan& plan, StepProgram&) {
    if (plan.input_ids[0] == -1) throw std::runtime_error("the step's own error");
    if (plan.input_ids[0] == 7) is_open.wait();
    StepResult result;
    result.failed_sequences = plan.input_ids;
    return result;
  }};

  StepHandle submit(int32_t tag) { return queue.submit(plan_of(tag), program); }
};

TEST(StepQueue, StepsRunInOrderAndHandlesCountThem) {
  Echo echo;
  for (int32_t tag = 10; tag < 30; tag += 2) {
    const StepHandle first = echo.submit(tag), second = echo.submit(tag + 1);
    EXPECT_EQ(second, first + 1);
    EXPECT_EQ(echo.queue.wait(second, soon()).failed_sequences[0], tag + 1);
    EXPECT_EQ(echo.queue.wait(first, soon()).failed_sequences[0], tag);
  }
}

TEST(StepQueue, AThirdStepInFlightIsRefused) {
  Echo echo;
  const StepHandle first = echo.submit(1), second = echo.submit(2);
  EXPECT_EQ(error_text([&] { echo.submit(3); }),
            "steps in flight = 2: expected at most 2; wait for the oldest step before submitting "
            "another");
  echo.queue.wait(first, soon());
  const StepHandle third = echo.submit(3);
  EXPECT_EQ(third, second + 1);
  echo.queue.wait(second, soon());
  echo.queue.wait(third, soon());
}

TEST(StepQueue, AnErrorBelongsToItsStepOnly) {
  Echo echo;
  const StepHandle bad = echo.submit(-1), good = echo.submit(5);
  EXPECT_EQ(echo.queue.wait(good, soon()).failed_sequences[0], 5);
  EXPECT_THROW(echo.queue.wait(bad, soon()), std::runtime_error);
  EXPECT_EQ(error_text([&] { echo.queue.wait(bad, soon()); }),
            "step = 1: no step in flight has this handle");
}

TEST(StepQueue, ADeadlineLeavesTheStepRunning) {
  Echo echo;
  const StepHandle handle = echo.submit(7);
  const auto shortly = std::chrono::steady_clock::now() + std::chrono::milliseconds(20);
  EXPECT_EQ(error_text([&] { echo.queue.wait(handle, shortly); }),
            "step = 1: the step is still running");
  EXPECT_FALSE(echo.queue.poll(handle));
  echo.gate.set_value();
  EXPECT_EQ(echo.queue.wait(handle, soon()).failed_sequences[0], 7);
}

TEST(StepQueue, DrainWaitsForAllStepsAndKeepsTheirResults) {
  Echo echo;
  const StepHandle first = echo.submit(7), second = echo.submit(2);
  echo.gate.set_value();
  echo.queue.drain();
  EXPECT_TRUE(echo.queue.poll(first));
  EXPECT_TRUE(echo.queue.poll(second));
  EXPECT_EQ(echo.queue.wait(first, soon()).failed_sequences[0], 7);
}

// Buffers that a program frees make its backend wait for the queue.
class DrainingProgram final : public StepProgram {
 public:
  explicit DrainingProgram(StepQueue& queue) : queue_(queue) {}
  ~DrainingProgram() override { queue_.drain(); }
  void run(Backend&, int64_t, int64_t) override {}

 private:
  StepQueue& queue_;
};

TEST(StepQueue, AProgramMayDrainItWhenItEnds) {
  {
    Echo closed;
    closed.submit(1);
    closed.queue.submit(plan_of(2), std::make_shared<DrainingProgram>(closed.queue));
  }
  Echo drained;
  auto program = std::make_shared<DrainingProgram>(drained.queue);
  const std::weak_ptr<DrainingProgram> ended = program;
  const StepHandle handle = drained.queue.submit(plan_of(3), std::move(program));
  drained.queue.drain();
  EXPECT_TRUE(ended.expired());
  EXPECT_EQ(drained.queue.wait(handle, soon()).failed_sequences[0], 3);
}

}  // namespace
}  // namespace rollpack::kernels
