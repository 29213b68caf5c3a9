// Capture of a stream of the emulated device: recorded, not done; done as often as it is launched;
// and what CUDA forbids meanwhile is refused.
#include <chrono>

#include "kernels/cuda/emulation/emulated_device.h"
#include "tests/kernels/rig.h"

namespace rollpack::kernels::cuda {
namespace {

using testing::error_text;

class Capture : public ::testing::Test {
 protected:
  std::shared_ptr<EmulatedDeviceLog> log_ = std::make_shared<EmulatedDeviceLog>();
  std::unique_ptr<Device> device_ = make_emulated_device({.log = log_});
  OwnStream stream_{*device_};
};

TEST_F(Capture, WhatIsRecordedIsDoneWhenItIsLaunched) {
  const DeviceMemory in(*device_, 8, "in"), out(*device_, 8, "out");
  const DeviceMemory rows(*device_, 4, "rows");
  const int64_t free_before = device_->free_bytes();
  in.as<float>()[1] = 3;
  const HeadRows head{.num_rows = 1, .rows = rows.as<int32_t>()};
  device_->begin_capture(stream_);
  device_->clear(stream_, in.as<>(), 4);
  device_->kernels().gather_rows(
      stream_, {.head = head, .width = 2, .in = in.as<float>(), .out = out.as<float>()});
  in.as<float>()[0] = 5;
  {
    const OwnGraph graph(*device_, device_->end_capture(stream_));
    EXPECT_EQ(log_->graphs, (std::vector<std::vector<std::string>>{{"clear", "gather_rows"}}));
    EXPECT_EQ(out.as<float>()[1], 0.0f);
    EXPECT_EQ(in.as<float>()[0], 5.0f);
    for (const float value : {3.0f, 4.0f}) {  // read when it runs, from the addresses recorded
      in.as<float>()[1] = value;
      device_->launch(stream_, graph);
      EXPECT_EQ(in.as<float>()[0], 0.0f);
      EXPECT_EQ(out.as<float>()[1], value);
    }
    EXPECT_EQ(log_->num_graph_launches, 2);
    EXPECT_LT(device_->free_bytes(), free_before);
  }
  EXPECT_EQ(device_->free_bytes(), free_before);
}

TEST_F(Capture, WhatCudaForbidsMeanwhileIsRefused) {
  const OwnStream other(*device_);
  const OwnEvent event(*device_);
  const DeviceMemory memory(*device_, 8, "memory");
  const auto soon = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  const std::vector<std::pair<std::string, std::function<void()>>> calls = {
      {"alloc while", [&] { device_->alloc(8, "more"); }},
      {"alloc_host while", [&] { device_->alloc_host(8, "more"); }},
      {"wait while", [&] { device_->wait(stream_, soon); }},
      {"has_passed while", [&] { device_->has_passed(event); }},
      {"record while", [&] { device_->record(event, stream_); }},
      {"begin_capture while", [&] { device_->begin_capture(other); }},
      {"clear on a stream that is not", [&] { device_->clear(other, memory.as<>(), 8); }},
      {"gather_rows on a stream that is not",
       [&] { device_->kernels().gather_rows(other, {.head = {.num_rows = 1}}); }},
      {"is not being captured", [&] { device_->end_capture(other); }}};
  device_->begin_capture(stream_);
  for (const auto& [text, call] : calls) {
    const std::string said = error_text(call);
    EXPECT_NE(said.find(text), std::string::npos) << said;
  }
  device_->abandon_capture(stream_);
  EXPECT_NE(error_text([&] { device_->end_capture(stream_); }).find("is not being captured"),
            std::string::npos);
  device_->wait(stream_, soon);  // all is allowed again
  EXPECT_TRUE(log_->graphs.empty());
}

}  // namespace
}  // namespace rollpack::kernels::cuda
