#include "kernels/registry.h"

#include <algorithm>

#include "tests/kernels/rig.h"

namespace rollpack::kernels::testing {
namespace {

const BackendOptions kOptions{.kv_cache_bytes = 1 << 20};

TEST(Registry, UnknownNameErrorNamesFieldValueAllowedAndNearest) {
  const auto make = [](const char* name) {
    return error_text([&] { make_backend(name, small_shape(DType::kF32), kOptions); });
  };
  std::string allowed = "auto";
  for (const std::string& name : backend_names()) allowed += ", " + name;
  EXPECT_EQ(make("refrence"),
            "engine.backend = refrence: expected " + allowed + "; the nearest is reference");
  EXPECT_EQ(make("aut"), "engine.backend = aut: expected " + allowed + "; the nearest is auto");
}

TEST(Registry, AutoTakesTheFirstThatCanRunAndSaysWhatItPassedOver) {
  const auto backend = make_backend("auto", small_shape(DType::kF32), kOptions);
  const BackendChoice choice = choose_backend("auto");
  EXPECT_EQ(backend->info().name, choice.name);
  if (choice.name == backend_names().front()) {
    EXPECT_EQ(choice.passed_over, "");
  } else {
    EXPECT_EQ(choice.name, "cpu");
    EXPECT_EQ(choice.passed_over.rfind("cuda: no CUDA device can be used: ", 0), 0u)
        << choice.passed_over;
    EXPECT_NE(choice.passed_over.find("built for sm_80"), std::string::npos) << choice.passed_over;
  }
}

TEST(Registry, CudaWithoutADeviceOrABuildSaysWhatIsMissing) {
  if (choose_backend("auto").name == "cuda") GTEST_SKIP() << "a device can be used here";
  const std::string text =
      error_text([] { make_backend("cuda", small_shape(DType::kF32), kOptions); });
  EXPECT_EQ(text.rfind("engine.backend = cuda: ", 0), 0u) << text;
  const bool is_built = backend_names().front() == "cuda";
  EXPECT_NE(text.find(is_built ? "no CUDA device can be used: " : "built without CUDA"),
            std::string::npos)
      << text;
}

TEST(Registry, TheOracleIsSelectable) {
  const auto names = backend_names();
  EXPECT_NE(std::find(names.begin(), names.end(), "reference"), names.end());
}

using RegistryOf = BackendTest;

TEST_P(RegistryOf, InfoNamesTheBackendAndCountsItsPages) {
  const auto backend = make_tested_backend(GetParam(), small_shape(DType::kBF16), kOptions);
  const BackendInfo& info = backend->info();
  EXPECT_EQ(info.name, GetParam() == kEmulatedCuda ? "cuda" : GetParam());
  EXPECT_FALSE(info.description.empty());
  EXPECT_FALSE(info.fingerprint.empty());
  EXPECT_EQ(info.kv.dtype, DType::kBF16);
  EXPECT_EQ(256 % info.kv.page_tokens, 0);
  EXPECT_GE(info.kv.num_pages, 1);
  EXPECT_LE(info.kv.num_pages * info.kv.page_bytes, kOptions.kv_cache_bytes);
}

TEST_P(RegistryOf, TooLittleKvMemoryNamesTheBytesNeeded) {
  const int64_t page_bytes =
      make_tested_backend(GetParam(), small_shape(DType::kF32), kOptions)->info().kv.page_bytes;
  const std::string text = error_text([&] {
    make_tested_backend(GetParam(), small_shape(DType::kF32), {.kv_cache_bytes = page_bytes - 1});
  });
  EXPECT_NE(text.find("kv_cache_memory"), std::string::npos) << text;
  EXPECT_NE(text.find(std::to_string(page_bytes)), std::string::npos) << text;
}

INSTANTIATE_TEST_SUITE_P(Backends, RegistryOf, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
