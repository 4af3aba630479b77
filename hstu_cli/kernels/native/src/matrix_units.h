// Products of bf16 tiles in the matrix units of x86 (AMX).
#pragma once

#include <ATen/native/CPUBlas.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

namespace hstu {

constexpr const char* TILE_UNITS = "matrix units";

// Of as many lines as are wanted beside half a step of products, those that can come from memory meanwhile.
constexpr int64_t lines_beside(int64_t /*wanted*/) { return 1; }

// The shapes of all eight tile registers. Not a local of the function that loads it: the compiler believes that the
// instruction reads eight bytes of it, and would leave out the rest.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline const TileConfig TILE_CONFIG;

// The matrix units as long as this lives; what another library does with them in between is undone. At its end what was
// streamed is in memory, before another thread looks.
struct TileSession {
  TileSession() { _tile_loadconfig(&TILE_CONFIG); }
  ~TileSession() {
    _tile_release();
    _mm_sfence();
  }
  TileSession(const TileSession&) = delete;
};

// Tile registers: 0 to 3 hold sums, 4 and 5 the left operand, 6 and 7 the right one.
#define HSTU_LOAD_TILE(tile, data) _tile_loadd(tile, data, 64)
#define HSTU_LOAD_OPERAND(is_used_once, tile, data, row_bytes) \
  if constexpr (is_used_once) {                                \
    _tile_stream_loadd(tile, data, row_bytes);                 \
  } else {                                                     \
    _tile_loadd(tile, data, row_bytes);                        \
  }

// sums = [a0; a1] [b0 b1] over so many tiles of each (a number, or a constant whose loop is unrolled), or that is
// added. beside(i) runs between, 2 steps times, as other units are free meanwhile, and lines are fetched before it; it must
// leave these sums alone, which change at any time.
template <Reuse reuse = Reuse::both, typename steps_t, typename beside_t, typename line_t>
inline __attribute__((always_inline)) void multiply_steps(
    steps_t steps, const Operands& a, const Operands& b, const TileSums& sums, const beside_t& beside,
    const Lines<line_t>& lines) {
  asm volatile("" ::: "memory");  // g++ does not know that tiles read memory: what was stored must be there
  if (sums.add) {
    HSTU_LOAD_TILE(0, sums.tiles);
    HSTU_LOAD_TILE(1, sums.tiles + SUM_TILE);
    HSTU_LOAD_TILE(2, sums.tiles + sums.below);
    HSTU_LOAD_TILE(3, sums.tiles + sums.below + SUM_TILE);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const auto fetch = [&]() __attribute__((always_inline)) {
    for (int64_t i = 0; i < lines.each; ++i) lines.fetch();
  };
  const auto multiply = [&](int64_t i) __attribute__((always_inline)) {
    HSTU_LOAD_OPERAND(reuse == Reuse::right, 4, a.first + i * a.step, a.row_bytes);
    HSTU_LOAD_OPERAND(reuse == Reuse::left, 6, b.first + i * b.step, 64);
    _tile_dpbf16ps(0, 4, 6);
    HSTU_LOAD_OPERAND(reuse == Reuse::left, 7, b.second + i * b.step, 64);
    fetch();
    beside(2 * i);
    _tile_dpbf16ps(1, 4, 7);
    HSTU_LOAD_OPERAND(reuse == Reuse::right, 5, a.second + i * a.step, a.row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    fetch();
    beside(2 * i + 1);
    _tile_dpbf16ps(3, 5, 7);
  };
  if constexpr (std::is_integral_v<steps_t>) {
    for (int64_t i = 0; i < steps; ++i) multiply(i);
  } else {
#pragma GCC unroll 8
    for (int64_t i = 0; i < steps_t::value; ++i) multiply(i);
  }
  _tile_stored(0, sums.tiles, 64);
  _tile_stored(1, sums.tiles + SUM_TILE, 64);
  _tile_stored(2, sums.tiles + sums.below, 64);
  _tile_stored(3, sums.tiles + sums.below + SUM_TILE, 64);
}

#undef HSTU_LOAD_TILE
#undef HSTU_LOAD_OPERAND

// Whether this CPU has matrix units, oneDNN may use them too (its settings count here), and the system lets us.
inline bool tile_units_are_allowed() {
#ifdef HSTU_EMULATED_TILES  // a test has functions in their place
  return true;
#else
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  constexpr unsigned AMX_BF16 = 1 << 22;  // of leaf 7; not every compiler has a name for it
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16)) return false;
  if (!at::native::cpublas::could_pack(at::kBFloat16)) return false;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#endif
}

// Whether they multiply here, too.
inline bool tile_units_work() {
  static const bool work = [] {
    if (!tile_units_are_allowed()) return false;
    alignas(64) bf16 ones[2 * TILE];
    alignas(64) float sums[4 * SUM_TILE];
    std::fill_n(ones, 2 * TILE, bf16(1.0f));
    TileSession session;
    NoLine none;
    multiply_steps(1, {ones, ones + TILE}, {ones, ones + TILE}, {sums}, [](int64_t) {}, Lines<NoLine>{none, 0});
    return std::all_of(sums, sums + 4 * SUM_TILE, [](float sum) { return sum == STEP; });
  }();
  return work;
}

}  // namespace hstu
