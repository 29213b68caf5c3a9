// Room for floats that vectors load whole: it starts on a cache line.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace rollpack::kernels::cpu {

class AlignedFloats {
 public:
  // Room for `count` at least; what was in it is lost when it grows.
  void reserve(int64_t count) {
    if (count <= capacity_) return;
    const auto bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
    data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (data_ == nullptr) throw std::bad_alloc();
    capacity_ = count;
  }
  float* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t capacity_ = 0;
};

}  // namespace rollpack::kernels::cpu
