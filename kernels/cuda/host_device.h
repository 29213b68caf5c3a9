// ROLLPACK_HOST_DEVICE marks index maths and rules that the host computes too, and tests: functions
// of plain numbers, without any name that only a device has.
#pragma once

#ifdef __CUDACC__
#define ROLLPACK_HOST_DEVICE __host__ __device__
#else
#define ROLLPACK_HOST_DEVICE
#endif
