// The op gather_columns where several ranks hold a model: the same on CPUs and on devices.
#pragma once

#include "kernels/backend.h"
#include "kernels/communicator/communicator.h"

namespace rollpack::kernels {

// Completes args.tensor, of which this rank has its own columns. Errors: those of `ranks`; internal
// where args.starts do not cover the tensor's columns.
void gather_tensor(Communicator& ranks, const GatherColumnsOpArgs& args);

}  // namespace rollpack::kernels
