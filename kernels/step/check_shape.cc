#include "kernels/step/check_shape.h"

#include <fmt/format.h>

#include <string>

#include "kernels/base/error.h"

namespace rollpack::kernels {

void check_shape(const ModelShape& shape, int64_t max_head_width) {
  if (shape.dtype != DType::kBF16 && shape.dtype != DType::kF32) {
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = "model.dtype",
                 .value = std::string(dtype_name(shape.dtype)),
                 .allowed = "bfloat16 or float32"});
  }
  if (shape.K <= 0 || shape.K % 2 != 0 || (max_head_width > 0 && shape.K > max_head_width)) {
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = "head_dim",
                 .value = std::to_string(shape.K),
                 .allowed = max_head_width > 0
                                ? fmt::format("an even number up to {}", max_head_width)
                                : "an even number",
                 .message = "rotation pairs elements k and k + head_dim / 2"});
  }
  if (shape.D <= 0 || shape.H <= 0 || shape.G <= 0 || shape.F <= 0 || shape.V <= 0 ||
      shape.L <= 0 || shape.H % shape.G != 0) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "model shape",
                 .value = fmt::format("D {} H {} G {} F {} V {} L {}", shape.D, shape.H, shape.G,
                                      shape.F, shape.V, shape.L),
                 .allowed = "positive numbers, G dividing H"});
  }
}

ModelShape held_shape(ModelShape shape, ReplicaRank at) {
  if (at.size > shape.H) {
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = "engine.tensor_model_parallel_size",
                 .value = std::to_string(at.size),
                 .allowed = fmt::format("at most {}, the model's query heads", shape.H),
                 .message = "every rank of a replica computes some heads"});
  }
  const HeadShard heads = head_shard(shape.H, shape.G, at);
  shape.H = heads.query.size();
  shape.G = heads.kv.size();
  return shape;
}

}  // namespace rollpack::kernels
