// Which of a machine's devices a rank computes on.
#pragma once

namespace rollpack::kernels::cuda {

// The device, below `num_devices`, of the rank that is number `rank_on_node` of those started on
// this machine (a replacement: of the rank that it replaces). Where one device is visible every
// rank takes that: a launcher may have given each its own (CUDA_VISIBLE_DEVICES).
// Errors: invalid_argument where there are more ranks than devices.
int choose_device(int rank_on_node, int num_devices);

}  // namespace rollpack::kernels::cuda
