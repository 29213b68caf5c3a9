// The oracle: every op in f64 with plain loops, numbers rounded where they are stored. Slow by
// design; selectable as engine.backend: reference.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace rollpack::kernels {

// Errors: unsupported for a head width that does not split into rotation pairs;
// resource_exhausted with the bytes of one KV page.
std::unique_ptr<Backend> make_reference_backend(const ModelShape& shape,
                                                const BackendOptions& options);

}  // namespace rollpack::kernels
