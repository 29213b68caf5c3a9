// Ranks and devices of one machine.
#include "kernels/cuda/device_choice.h"

#include <gtest/gtest.h>

#include "tests/error_text.h"

namespace rollpack::kernels::cuda {
namespace {

TEST(DeviceChoice, EveryRankOfANodeHasADeviceOfItsOwn) {
  for (int rank = 0; rank < 8; ++rank) EXPECT_EQ(choose_device(rank, 8), rank);
}

TEST(DeviceChoice, TheOnlyOneThatIsVisibleIsTaken) {
  EXPECT_EQ(choose_device(0, 1), 0);
  EXPECT_EQ(choose_device(5, 1), 0);
}

TEST(DeviceChoice, MoreRanksThanDevicesAreRefused) {
  EXPECT_EQ(rollpack::testing::error_text([] { choose_device(4, 4); }),
            "invalid_argument: ranks on this machine = at least 5: expected 4, one for each CUDA "
            "device that is visible; start fewer (mpirun --map-by ppr:N:node)");
}

}  // namespace
}  // namespace rollpack::kernels::cuda
