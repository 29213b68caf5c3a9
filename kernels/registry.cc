#include "kernels/registry.h"

namespace rollpack::kernels {
}  // namespace rollpack::kernels
