// What every backend asks of a model's sizes before it allocates anything.
#pragma once

#include "kernels/backend.h"

namespace rollpack::kernels {

// max_head_width: the widest head that the backend computes; 0: any.
// Errors: unsupported for a dtype or head width that the backend does not compute; invalid_argument
// for sizes that no model has. Both name the field.
void check_shape(const ModelShape& shape, int64_t max_head_width = 0);

}  // namespace rollpack::kernels
