// The dispatcher under every fault there is, seed after seed.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include <spdlog/spdlog.h>

#include "tests/rollout/cluster/simulation.h"
#include "tests/sanitized.h"

namespace rollpack::rollout::simulation {
namespace {

uint64_t number_from(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

uint64_t num_seeds() {
  const char* full = std::getenv("ROLLPACK_FULL");
  const bool is_full = full != nullptr && std::string(full) == "1";
  const uint64_t count = is_full ? 200000 : 2000;
  return number_from("ROLLPACK_SEEDS", kIsSanitized ? count / 20 : count);
}

// ROLLPACK_SEED runs one seed alone.
TEST(Simulation, LosesNothingDoublesNothingAndMixesNoWeights) {
  const uint64_t first = number_from("ROLLPACK_SEED", 0);
  const uint64_t end = std::getenv("ROLLPACK_SEED") != nullptr ? first + 1 : num_seeds();
  // What is logged at every loss is for the eye: of one seed.
  if (end - first > 1) spdlog::set_level(spdlog::level::off);
  Report sum;
  for (uint64_t seed = first; seed < end; ++seed) {
    const Report report = simulate(seed);
    ASSERT_EQ(report.violation, "") << "ROLLPACK_SEED=" << seed;
    sum.add(report);
  }
  std::string faults;
  for (size_t i = 0; i < kNumFaults; ++i) {
    if (end - first >= 200) {
      EXPECT_GT(sum.num_faults[i], 0) << kFaultNames[i] << " never happened";
    }
    faults += std::string(kFaultNames[i]) + " " + std::to_string(sum.num_faults[i]) + ", ";
  }
  std::printf("%llu seeds, %lld samples, %lld updates; %s\n",
              static_cast<unsigned long long>(end - first), static_cast<long long>(sum.num_samples),
              static_cast<long long>(sum.num_updates), faults.c_str());
}

}  // namespace
}  // namespace rollpack::rollout::simulation
