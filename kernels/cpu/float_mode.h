// The floating-point mode every computing thread runs in: subnormals are flushed on input and on
// output (DAZ and FTZ), because VDPBF16PS always does so and the other paths must give its bits.
#pragma once

#include <xmmintrin.h>

namespace rollpack::kernels::cpu {

inline constexpr unsigned kFlushToZero = 0x8000;        // MXCSR.FTZ
inline constexpr unsigned kDenormalsAreZero = 0x0040;   // MXCSR.DAZ

// Sets the mode for the calling thread, for good: for threads of our own.
inline void flush_subnormals() { _mm_setcsr(_mm_getcsr() | kFlushToZero | kDenormalsAreZero); }

// Sets the mode for a scope and restores the caller's: for threads that are not ours.
class FlushSubnormalsScope {
 public:
  FlushSubnormalsScope() : saved_(_mm_getcsr()) { flush_subnormals(); }
  ~FlushSubnormalsScope() { _mm_setcsr(saved_); }
  FlushSubnormalsScope(const FlushSubnormalsScope&) = delete;
  FlushSubnormalsScope& operator=(const FlushSubnormalsScope&) = delete;

 private:
  unsigned saved_;
};

}  // namespace rollpack::kernels::cpu
