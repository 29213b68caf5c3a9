#include "kernels/cpu/amx.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/base/dtype.h"

namespace rollpack::kernels::cpu {
namespace {

constexpr int kNumTiles = 7;                            // that are used
constexpr int64_t kStepElements = 2 * kPanelColumns;    // of a step of a panel
constexpr int64_t kSliceElements = 2 * kAmxSliceSteps;  // of a slice of a row
constexpr int64_t kSliceLines = kAmxSliceSteps * kStepElements * 2 / 64;
// A lone tile of rows reads a panel as fast as memory gives it: 4 slices are 16 KiB, some 500 ns at
// 30 GB/s, several times the latency of memory.
constexpr int64_t kSlicesAhead = 4;

// Asked of the kernel, which else ends a process at its first use of a tile. Source: Linux,
// Documentation/arch/x86/xstate.rst.
constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;               // XFEATURE_XTILEDATA

// Operand of LDTILECFG.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// What is left of a row tile and of a panel behind their last whole slice, filled up with zeros.
struct LastSlice {
  alignas(64) uint16_t rows[kAmxTileRows * kSliceElements] = {};
  alignas(64) uint16_t panel[kAmxSliceSteps * kStepElements] = {};

  LastSlice(const uint16_t* a, int64_t a_stride, int num_rows, const uint16_t* columns,
            int64_t steps) {
    for (int r = 0; r < num_rows; ++r) {
      std::memcpy(rows + r * kSliceElements, a + r * a_stride, static_cast<size_t>(steps) * 4);
    }
    std::memcpy(panel, columns, static_cast<size_t>(steps * kStepElements) * 2);
  }
};

// Of a panel that comes from memory, or of the panel behind it.
inline void bring_in_later(const uint16_t* slice) {
  const auto* const later =
      reinterpret_cast<const std::byte*>(slice) + kSlicesAhead * kSliceLines * 64;
  for (int64_t line = 0; line < kSliceLines; ++line) __builtin_prefetch(later + line * 64, 0, 3);
}

bool processor_has_it() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kBF16 = 1u << 22, kTile = 1u << 24;
  if ((edx & kBF16) == 0 || (edx & kTile) == 0) return false;
  return __builtin_cpu_supports("avx512f") != 0;
}

}  // namespace

bool amx_is_available() {
  static const bool is_available =
      processor_has_it() && ::syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return is_available;
}

float amx_sum(const uint16_t* a, const uint16_t* panel, int column, int64_t steps, float sum) {
  for (int64_t first = 0; first < steps; first += kAmxSliceSteps) {
    float even = 0, odd = 0;
    for (int64_t s = first; s < std::min(first + kAmxSliceSteps, steps); ++s) {
      const uint16_t* const pair = panel + s * kStepElements + 2 * column;
      even = std::fmaf(bf16_to_f32(a[2 * s]), bf16_to_f32(pair[0]), even);
      odd = std::fmaf(bf16_to_f32(a[2 * s + 1]), bf16_to_f32(pair[1]), odd);
    }
    if (steps < first + kAmxSliceSteps) {  // zeros fill the slice up: of -0 they make +0
      even = std::fmaf(0.0f, 0.0f, even);
      odd = std::fmaf(0.0f, 0.0f, odd);
    }
    sum += even + odd;
  }
  return sum;
}

#pragma GCC push_options
#pragma GCC target("avx512f,amx-tile,amx-bf16")

namespace {

// GCC 12 does not know that loads of tiles, and of their shapes, read memory: without this it
// leaves stores before them out, or for later.
inline void finish_stores() {
  asm volatile("" ::: "memory");
}

// Tiles 0 to 3 are sums, 4 rows, 5 and 6 columns. Their numbers are part of the instructions.

inline void load_sums(bool continues, const float* sums) {
  finish_stores();
  if (!continues) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, sums, kPanelColumns * 4);
  _tile_loadd(1, sums + 16, kPanelColumns * 4);
  _tile_loadd(2, sums + 32, kPanelColumns * 4);
  _tile_loadd(3, sums + 48, kPanelColumns * 4);
}

inline void store_sums(float* sums) {
  _tile_stored(0, sums, kPanelColumns * 4);
  _tile_stored(1, sums + 16, kPanelColumns * 4);
  _tile_stored(2, sums + 32, kPanelColumns * 4);
  _tile_stored(3, sums + 48, kPanelColumns * 4);
}

inline void multiply_slice(const uint16_t* a, int64_t a_bytes, const uint16_t* columns) {
  constexpr int64_t kStepBytes = kStepElements * 2;
  _tile_loadd(4, a, a_bytes);
  _tile_loadd(5, columns, kStepBytes);
  _tile_dpbf16ps(0, 4, 5);
  _tile_loadd(6, columns + 32, kStepBytes);
  _tile_dpbf16ps(1, 4, 6);
  _tile_loadd(5, columns + 64, kStepBytes);
  _tile_dpbf16ps(2, 4, 5);
  _tile_loadd(6, columns + 96, kStepBytes);
  _tile_dpbf16ps(3, 4, 6);
}

void multiply(const uint16_t* a, int64_t a_stride, int rows, const uint16_t* panel, int64_t steps,
              float* tile, const PanelPass& pass) {
  const int64_t num_slices = steps / kAmxSliceSteps, rest = steps % kAmxSliceSteps;
  LinesAhead ahead(pass, steps, kAmxSliceSteps);
  load_sums(pass.continues, tile);
  for (int64_t slice = 0; slice < num_slices; ++slice) {
    const uint16_t* const columns = panel + slice * kAmxSliceSteps * kStepElements;
    if (pass.streams) bring_in_later(columns);
    ahead.look();
    multiply_slice(a + slice * kSliceElements, a_stride * 2, columns);
  }
  if (rest > 0) {
    const int64_t done = num_slices * kAmxSliceSteps;
    const LastSlice last(a + 2 * done, a_stride, rows, panel + done * kStepElements, rest);
    finish_stores();
    multiply_slice(last.rows, kSliceElements * 2, last.panel);
  }
  store_sums(tile);
}

void shape_tiles(int rows) {
  TileShapes shapes;
  std::fill_n(shapes.row_bytes, kNumTiles, uint16_t{64});
  std::fill_n(shapes.rows, kNumTiles, static_cast<uint8_t>(rows));
  for (const int columns : {5, 6}) shapes.rows[columns] = kAmxSliceSteps;
  finish_stores();
  _tile_loadconfig(&shapes);
}

// Not in the destructor: a member is compiled for what its declaration in the header is.
void release_tiles() {
  _tile_release();
}

}  // namespace

AmxTiles::~AmxTiles() {
  if (rows_ > 0) release_tiles();
}

void AmxTiles::panel_product(const uint16_t* a, int64_t a_stride, int rows, const uint16_t* panel,
                             int64_t steps, float* tile, const PanelPass& pass) {
  if (rows != rows_) shape_tiles(rows_ = rows);
  multiply(a, a_stride, rows, panel, steps, tile, pass);
}

#pragma GCC pop_options

}  // namespace rollpack::kernels::cpu
