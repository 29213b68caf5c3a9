// Whether this is a build under a sanitizer, for the sizes of tests that take minutes there.
#pragma once

namespace rollpack {

// What a sanitizer checks is every access that is made, and a few rounds make them all; that it
// holds for thousands of seeds or bytes is shown by the builds without one, fifty times as fast.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kIsSanitized = true;
#else
inline constexpr bool kIsSanitized = false;
#endif

}  // namespace rollpack
