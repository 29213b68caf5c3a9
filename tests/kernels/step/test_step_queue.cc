#include "kernels/step/step_queue.h"

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
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

// A device that is done with a step when the test says so. Tag -1 fails before it gets there, tag
// -2 on it.
class Device {
 public:
  ~Device() { finish_steps(100); }  // whatever a failed test has left there
  StepHandle submit(int32_t tag) { return queue.submit(plan_of(tag), program_); }
  void finish_steps(int count) {
    const std::lock_guard lock(mutex_);
    num_done_ += count;
  }
  // Waits until the device has been given so many steps in all.
  bool has_begun(size_t count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_until(lock, soon(), [&] { return num_begun_ >= count; });
  }

 private:
  void begin(const StepPlan& plan) {
    const std::lock_guard lock(mutex_);
    if (plan.input_ids[0] == -1) throw std::runtime_error("it was not handed over");
    tags_.push_back(plan.input_ids[0]);
    ++num_begun_;
    changed_.notify_all();
  }
  std::optional<StepResult> end() {
    const std::lock_guard lock(mutex_);
    if (num_done_ == 0) return std::nullopt;
    --num_done_;
    const int32_t tag = tags_.front();
    tags_.pop_front();
    if (tag == -2) throw std::runtime_error("its kernels failed");
    StepResult result;
    result.failed_sequences = {tag};
    return result;
  }

  const std::shared_ptr<StepProgram> program_ = std::make_shared<NoProgram>();
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<int32_t> tags_;  // begun and not ended
  size_t num_begun_ = 0;
  int num_done_ = 0;

 public:
  StepQueue queue{StepQueue::DeviceRun{
      .begin = [this](const StepPlan& plan, StepProgram&) { begin(plan); },
      .end = [this] { return end(); }}};
};

TEST(StepQueue, ADeviceHasTheNextStepBeforeItHasDoneTheLast) {
  Device device;
  const StepHandle first = device.submit(1);
  ASSERT_TRUE(device.has_begun(1));
  const StepHandle second = device.submit(2);
  ASSERT_TRUE(device.has_begun(2));
  EXPECT_FALSE(device.queue.poll(first));
  device.finish_steps(1);
  EXPECT_EQ(device.queue.wait(first, soon()).failed_sequences[0], 1);
  EXPECT_FALSE(device.queue.poll(second));
  const StepHandle third = device.submit(3);
  ASSERT_TRUE(device.has_begun(3));
  device.finish_steps(2);
  device.queue.drain();
  EXPECT_EQ(device.queue.wait(second, soon()).failed_sequences[0], 2);
  EXPECT_EQ(device.queue.wait(third, soon()).failed_sequences[0], 3);
}

TEST(StepQueue, AnErrorOfADevicesStepIsItsOwn) {
  Device device;
  const StepHandle refused = device.submit(-1), failing = device.submit(-2);
  EXPECT_THROW(device.queue.wait(refused, soon()), std::runtime_error);
  const StepHandle good = device.submit(5);
  ASSERT_TRUE(device.has_begun(2));
  device.finish_steps(2);
  EXPECT_THROW(device.queue.wait(failing, soon()), std::runtime_error);
  EXPECT_EQ(device.queue.wait(good, soon()).failed_sequences[0], 5);
}

TEST(StepQueue, ClosingWaitsForWhatADeviceHas) {
  Device device;
  device.submit(1);
  ASSERT_TRUE(device.has_begun(1));
  auto closing = std::async(std::launch::async, [&] { device.queue.close(); });
  EXPECT_EQ(closing.wait_for(std::chrono::milliseconds(10)), std::future_status::timeout);
  device.finish_steps(1);
  EXPECT_EQ(closing.wait_for(std::chrono::minutes(1)), std::future_status::ready);
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
