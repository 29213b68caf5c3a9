// Steps in flight on every backend: order, errors, deadlines and the limit of two.
#include <future>

#include "kernels/base/error.h"
#include "tests/kernels/rig.h"

namespace rollpack::kernels::testing {
namespace {

// A backend whose program waits for `gate` where the step has two rows, and throws where it has
// three; one row does nothing.
class StepQueue : public BackendTest {
 protected:
  class Program final : public StepProgram {
   public:
    explicit Program(std::shared_future<void> gate) : gate_(std::move(gate)) {}
    void run(Backend&, int64_t num_rows, int64_t) override {
      if (num_rows == 2) gate_.wait_for(std::chrono::minutes(1));
      if (num_rows == 3) throw Error({.field = "program", .message = "three rows"});
    }

   private:
    std::shared_future<void> gate_;
  };

  void SetUp() override {
    rig_.weight(WeightKind::kVector, {{1.0f}}, 1);
    rig_.commit();
    backend().set_program(std::make_shared<Program>(gate_.get_future().share()));
  }

  Backend& backend() { return rig_.backend(); }
  StepHandle submit(int64_t rows) { return backend().submit(plan_of_rows(rows)); }
  void wait(StepHandle handle) { backend().wait(handle, soon()); }

  std::promise<void> gate_;
  Rig rig_{GetParam(), small_shape(DType::kF32)};
};

TEST_P(StepQueue, HandlesCountStepsAndMayBeWaitedForInAnyOrder) {
  for (int i = 0; i < 20; ++i) {
    const StepHandle first = submit(1), second = submit(1);
    EXPECT_EQ(first, static_cast<StepHandle>(2 * i + 1));
    EXPECT_EQ(second, first + 1);
    wait(second);
    EXPECT_TRUE(backend().poll(first));
    wait(first);
  }
}

TEST_P(StepQueue, AThirdStepInFlightIsRefusedAndHarmsNone) {
  const StepHandle first = submit(2), second = submit(1);
  EXPECT_EQ(error_text([&] { submit(1); }),
            "steps in flight = 2: expected at most 2; wait for the oldest step before submitting "
            "another");
  gate_.set_value();
  wait(first);
  const StepHandle third = submit(1);
  EXPECT_EQ(third, second + 1);
  wait(second);
  wait(third);
}

TEST_P(StepQueue, AnErrorOfTheProgramArrivesOnItsOwnHandleOnly) {
  const StepHandle bad = submit(3), good = submit(1);
  wait(good);
  EXPECT_TRUE(backend().poll(bad));
  EXPECT_EQ(error_text([&] { wait(bad); }), "program: three rows");
  wait(submit(1));
}

TEST_P(StepQueue, AnErrorOfThePlanArrivesOnItsHandle) {
  StepPlan plan = plan_of_rows(1);
  plan.input_ids[0] = 130;
  const StepHandle bad = backend().submit(plan);
  EXPECT_EQ(error_text([&] { wait(bad); }),
            "step.rows[0].input_id = 130: expected a number from 0 to 129, or -1 where the slot "
            "has sampled a token");
  wait(submit(1));
}

TEST_P(StepQueue, ADeadlineLeavesTheStepRunning) {
  const StepHandle handle = submit(2);
  const auto shortly = std::chrono::steady_clock::now() + std::chrono::milliseconds(20);
  try {
    backend().wait(handle, shortly);
    FAIL() << "no deadline";
  } catch (const Error& error) {
    EXPECT_EQ(error.info.code, ErrorCode::kDeadlineExceeded);
    EXPECT_STREQ(error.what(), "step = 1: the step is still running");
  }
  EXPECT_FALSE(backend().poll(handle));
  gate_.set_value();
  wait(handle);
}

TEST_P(StepQueue, AHandleIsForgottenOnceItsStepWasTaken) {
  const StepHandle handle = submit(1);
  wait(handle);
  const std::string text = "step = 1: no step in flight has this handle";
  EXPECT_EQ(error_text([&] { wait(handle); }), text);
  EXPECT_EQ(error_text([&] { backend().poll(handle); }), text);
}

TEST_P(StepQueue, SyncWaitsForAllStepsAndKeepsTheirResults) {
  const StepHandle first = submit(2), second = submit(3);
  gate_.set_value();
  backend().sync();
  EXPECT_TRUE(backend().poll(first));
  EXPECT_TRUE(backend().poll(second));
  wait(first);
  EXPECT_EQ(error_text([&] { wait(second); }), "program: three rows");
}

TEST_P(StepQueue, ABackendMayGoWhileStepsAreInFlight) {
  submit(1);
  submit(1);
}

TEST_P(StepQueue, SubmittingWithoutAProgramSaysSo) {
  Rig rig(GetParam(), small_shape(DType::kF32));
  EXPECT_EQ(error_text([&] { rig.backend().submit(plan_of_rows(1)); }),
            "submit: no program is set; call set_program first");
}

TEST_P(StepQueue, AStepWithoutCommittedWeightsSaysSo) {
  Rig rig(GetParam(), small_shape(DType::kF32));
  rig.backend().set_program(std::make_shared<Program>(std::shared_future<void>()));
  const StepHandle handle = rig.backend().submit(plan_of_rows(1));
  EXPECT_EQ(error_text([&] { rig.backend().wait(handle, soon()); }),
            "step: no weights are committed yet");
}

INSTANTIATE_TEST_SUITE_P(Backends, StepQueue, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
