#!/usr/bin/env bash
# Configures and builds one preset of CMakePresets.json: tests/build.sh PRESET [cmake --build args].
# Uses Ninja and, where installed, ccache; a folder configured before keeps its generator.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=$1
shift

export CMAKE_GENERATOR=${CMAKE_GENERATOR:-Ninja}
if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER:-ccache}
  export CMAKE_CUDA_COMPILER_LAUNCHER=${CMAKE_CUDA_COMPILER_LAUNCHER:-ccache}
  # Another clone of the same sources finds what this one compiled.
  export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
  # What ccache asks for before it caches files that use precompiled headers. Nothing here expands
  # __DATE__ or __TIME__.
  export CCACHE_SLOPPINESS=pch_defines,time_macros
fi
options=()
case $preset in
  # -O0 and short line tables: these builds are for finding errors, and half as long to make as with
  # -O1. What computes is compiled with -O1 all the same (kernels/CMakeLists.txt).
  asan-ubsan | tsan | fuzz) options=(-DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O0 -g1 -UNDEBUG") ;;
esac
# Sources by eights are less work in a build from nothing, and more where one of them
# was changed: asked for by tests/run.sh, and kept by the folder that it made.
case $preset in
  asan-ubsan | tsan) options+=(-DROLLPACK_UNITY=ON) ;;
  release) [ -e build/CMakeCache.txt ] || options+=(-DROLLPACK_UNITY="${ROLLPACK_UNITY:-OFF}") ;;
esac
cmake --preset "$preset" "${options[@]}" >/dev/null
exec cmake --build --preset "$preset" -j "${ROLLPACK_BUILD_JOBS:-$(nproc)}" "$@"
