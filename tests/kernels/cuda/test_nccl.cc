// NCCL over a library that stands in for it (fake_nccl.cc): how it is opened, and what becomes of
// ranks that are missing or fail. What it exchanges is in test_device_communicators.cc.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/communicator/shared_memory_communicator.h"
#include "kernels/cuda/emulation/emulated_device.h"
#include "kernels/cuda/nccl_communicator.h"

namespace rollpack::kernels::cuda {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

std::string refusal(const std::string& file) {
  try {
    const NcclLibrary library(file);
    return "";
  } catch (const Error& error) {
    EXPECT_EQ(error.info.code, ErrorCode::kUnsupported);
    return error.what();
  }
}

TEST(NcclLibrary, SaysWhatIsMissing) {
  EXPECT_EQ(NcclLibrary(FAKE_NCCL).version_text(), "NCCL 2.28.9");
  const std::string nowhere = refusal("libnccl_nowhere.so.2");
  EXPECT_NE(nowhere.find("NCCL = libnccl_nowhere.so.2: expected NCCL 2.14.0 or later; "),
            std::string::npos)
      << nowhere;
  EXPECT_NE(nowhere.find("No such file"), std::string::npos) << nowhere;
  const std::string partial = refusal(FAKE_NCCL_PARTIAL);
  EXPECT_NE(partial.find("NCCL 2.28.9 has no ncclCommAbort"), std::string::npos) << partial;
  const std::string old = refusal(FAKE_NCCL_OLD);
  EXPECT_NE(old.find("it is NCCL 2.12.5, too old"), std::string::npos) << old;
}

template <class Function>
Function* fake_function(const char* name) {
  void* const library = ::dlopen(FAKE_NCCL, RTLD_NOW);  // the one that is open
  return reinterpret_cast<Function*>(::dlsym(library, name));
}

int num_communicators() {
  return fake_function<int()>("fake_nccl_num_communicators")();
}

// A rank's device and communicators.
struct Rank {
  Rank(std::shared_ptr<const NcclLibrary> library, const NcclId& id,
       std::shared_ptr<Communicator> host)
      : device(make_emulated_device()),
        ranks(*device, device->make_stream(), std::move(host),
              {.library = std::move(library), .id = id}),
        words(*device, 64, "a test") {}

  uint32_t sum(uint32_t value) {
    *words.as<uint32_t>() = value;
    ranks.all_reduce<Reduction::kSum>(std::span(words.as<uint32_t>(), 1));
    return *words.as<uint32_t>();
  }

  std::unique_ptr<Device> device;
  NcclCommunicator ranks;
  DeviceMemory words;
};

// Runs body(rank's number, make) on a thread a rank, where make() builds the rank; what each threw.
using Make = std::function<std::unique_ptr<Rank>()>;
std::vector<std::string> on_ranks(int32_t size, std::chrono::milliseconds timeout,
                                  const std::function<void(int32_t, const Make&)>& body) {
  const auto library = std::make_shared<const NcclLibrary>(FAKE_NCCL);
  const NcclId id = library->make_id();
  std::vector<std::string> errors(static_cast<size_t>(size));
  std::vector<std::thread> threads;
  for (auto& host : make_thread_communicators(size, timeout, 4096)) {
    threads.emplace_back([&, host = std::shared_ptr<Communicator>(std::move(host))] {
      try {
        body(host->rank(), [&] { return std::make_unique<Rank>(library, id, host); });
      } catch (const Error& error) {
        EXPECT_EQ(error.info.code, ErrorCode::kUnavailable) << error.what();
        errors[static_cast<size_t>(host->rank())] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_communicators(), 0);
  return errors;
}

void expect_named(const std::vector<std::string>& errors, size_t missing) {
  for (size_t rank = 0; rank < errors.size(); ++rank) {
    if (rank == missing) continue;
    EXPECT_NE(errors[rank].find("rank " + std::to_string(missing) + " of"), std::string::npos)
        << "rank " << rank << ": " << errors[rank];
  }
}

TEST(NcclCommunicator, NamesARankThatNeverComes) {
  expect_named(on_ranks(3, 1s,
                        [](int32_t rank, const Make& make) {
                          if (rank != 1) make();
                        }),
               1);
  // Nor to an exchange, while it is there and well.
  expect_named(on_ranks(3, 2s,
                        [](int32_t rank, const Make& make) {
                          const auto made = make();
                          EXPECT_EQ(made->sum(1), 3u);
                          if (rank != 2) made->sum(1);
                          std::this_thread::sleep_for(rank == 2 ? 6s : 0s);
                        }),
               2);
}

TEST(NcclCommunicator, EndsAtOnceWhereARankGivesUp) {
  const Clock::time_point begin = Clock::now();
  const auto errors = on_ranks(3, 60s, [](int32_t rank, const Make& make) {
    const auto made = make();
    if (rank == 0) return made->ranks.abandon();
    made->sum(1);
  });
  expect_named(errors, 0);
  EXPECT_EQ(errors[0], "");
  EXPECT_LT(Clock::now() - begin, 30s);
}

// An error that shows while nothing is called, and a device's work that never ends.
TEST(NcclCommunicator, LooksAfterWhatIsUnderWay) {
  const auto errors = on_ranks(2, 60s, [](int32_t rank, const Make& make) {
    const auto made = make();
    made->ranks.check(Clock::now());
    made->ranks.barrier();
    if (rank == 1) fake_function<void(int, int)>("fake_nccl_break")(1, 6);
    for (;;) made->ranks.check(Clock::now());
  });
  expect_named(errors, 1);
  EXPECT_NE(errors[1].find("remote process exited or there was a network error"), std::string::npos)
      << errors[1];
  const auto late = on_ranks(2, 1s, [](int32_t, const Make& make) {
    const auto made = make();
    made->ranks.check(Clock::now() - 2s);
  });
  for (const std::string& error : late) {
    EXPECT_NE(error.find("has not ended in 1000 ms"), std::string::npos) << error;
  }
}

// Its exchanges may have ended because another rank broke off.
TEST(NcclCommunicator, DoubtsWhatEndedOnceARankHasGivenUp) {
  const auto errors = on_ranks(2, 60s, [](int32_t rank, const Make& make) {
    const auto made = make();
    EXPECT_EQ(made->sum(1), 2u);
    made->ranks.require_unbroken();
    made->ranks.barrier();
    if (rank == 0) {
      made->ranks.abandon();
      EXPECT_THROW(made->ranks.require_unbroken(), Error) << "its own";
      return;
    }
    for (;;) made->ranks.require_unbroken();
  });
  expect_named(errors, 0);
}

TEST(NcclCommunicator, IsBuiltAnewAfterAFailure) {
  on_ranks(2, 2s, [](int32_t rank, const Make& make) {
    const auto made = make();
    rank == 0 ? made->ranks.abandon() : made->ranks.barrier();
  });
  const auto errors = on_ranks(2, 60s, [](int32_t, const Make& make) {
    const auto made = make();
    EXPECT_EQ(made->sum(2), 4u);
    made->ranks.barrier();  // neither ends while the other still reads
  });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

}  // namespace
}  // namespace rollpack::kernels::cuda
