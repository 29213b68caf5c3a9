// What this device can do at most, measured on it in this run.
#pragma once

namespace rollpack::bench {

struct DeviceLimits {
  double bf16_flops = 0;        // of mma.sync m16n8k16, FLOP/s
  double bytes_per_second = 0;  // read from memory
};

// Takes about a second of the device's time. Errors: internal, with CUDA's text.
DeviceLimits measure_device_limits();

}  // namespace rollpack::bench
