# Headers of others are most of what a build reads: the standard library, {fmt} and GoogleTest cost a
# second a file (GCC 12, 2 cores), our own text a fraction of it. They are read once a build here,
# into one set for the libraries and one for the tests. Every source still names all it includes:
# ROLLPACK_PRECOMPILE=OFF must build too.
set(precompiled_std
  <algorithm> <array> <atomic> <bit> <chrono> <cmath> <condition_variable> <cstdint> <cstring>
  <deque> <exception> <filesystem> <fstream> <functional> <limits> <map> <memory> <mutex> <numeric>
  <optional> <random> <set> <span> <string> <string_view> <thread> <unordered_map> <utility>
  <variant> <vector> <fmt/format.h>)

# add_precompiled(NAME LIBRARIES LIBRARY.. HEADERS HEADER..): a target that others take their headers
# from. They must link the same LIBRARIES: macros that those bring are part of what is precompiled.
function(add_precompiled name)
  cmake_parse_arguments(given "" "" "LIBRARIES;HEADERS" ${ARGN})
  file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/precompiled/${name}.cc CONTENT "")
  add_library(${name} OBJECT EXCLUDE_FROM_ALL ${PROJECT_BINARY_DIR}/precompiled/${name}.cc)
  target_link_libraries(${name} PRIVATE ${given_LIBRARIES})
  target_precompile_headers(${name} PRIVATE ${given_HEADERS})
  # With this ccache can tell whether a file that uses the headers is one it knows.
  target_compile_options(${name} PRIVATE -fpch-preprocess)
endfunction()

# use_precompiled(FOLDER): all targets made in FOLDER and below it take the headers of one set, but
# for targets marked DISABLE_PRECOMPILE_HEADERS and sources marked SKIP_PRECOMPILE_HEADERS.
function(use_precompiled folder)
  get_property(targets DIRECTORY ${folder} PROPERTY BUILDSYSTEM_TARGETS)
  foreach(target ${targets})
    get_target_property(type ${target} TYPE)
    get_target_property(is_disabled ${target} DISABLE_PRECOMPILE_HEADERS)
    if(is_disabled OR NOT type MATCHES "STATIC_LIBRARY|EXECUTABLE")
      continue()
    endif()
    get_target_property(libraries ${target} LINK_LIBRARIES)
    set(name precompiled_std)
    if(libraries MATCHES "GTest::")
      set(name precompiled_gtest)
    endif()
    target_precompile_headers(${target} REUSE_FROM ${name})
    target_compile_options(${target} PRIVATE -fpch-preprocess)
  endforeach()
  get_property(folders DIRECTORY ${folder} PROPERTY SUBDIRECTORIES)
  foreach(subfolder ${folders})
    use_precompiled(${subfolder})
  endforeach()
endfunction()

add_precompiled(precompiled_std LIBRARIES rollpack_flags HEADERS ${precompiled_std})
if(ROLLPACK_TESTS)
  add_precompiled(precompiled_gtest LIBRARIES rollpack_flags GTest::gtest
                  HEADERS ${precompiled_std} <gtest/gtest.h>)
endif()
use_precompiled(${PROJECT_SOURCE_DIR})
