// What every backend asks of a model's sizes before it allocates anything.
#pragma once

#include "kernels/backend.h"

namespace rollpack::kernels {

// max_head_width: the widest head that the backend computes; 0: any.
// Errors: unsupported for a dtype or head width that the backend does not compute; invalid_argument
// for sizes that no model has. Both name the field.
void check_shape(const ModelShape& shape, int64_t max_head_width = 0);

// What a rank of a replica holds of a model: H and G are its own heads; the rest says the whole.
// Errors: unsupported where there are more ranks than query heads.
ModelShape held_shape(ModelShape shape, ReplicaRank at);

}  // namespace rollpack::kernels
