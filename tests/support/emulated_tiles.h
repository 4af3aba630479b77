// The tile instructions of matrix units (AMX) as functions over memory, for a CPU that multiplies pairs of bf16 in
// vectors: included before the kernels they run the code for matrix units where there are none. Sums are added up pair by
// pair, as the vectors do it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define HSTU_EMULATED_TILES

namespace emulated {

constexpr int ROWS = 16, ROW_BYTES = 64;

struct alignas(64) Registers {
  bool configured = false;  // else an instruction faults
  char tiles[8][ROWS][ROW_BYTES];
};

inline Registers& registers() {
  static thread_local Registers all;
  return all;
}

inline auto& tile(int number) {
  if (!registers().configured) std::abort();
  return registers().tiles[number];
}

inline void configure(bool configured) {
  registers().configured = configured;
  std::memset(registers().tiles, 0xff, sizeof(registers().tiles));  // NaN
}

inline void load(int number, const void* memory, int64_t stride) {
  for (int row = 0; row < ROWS; ++row) {
    std::memcpy(tile(number)[row], static_cast<const char*>(memory) + row * stride, ROW_BYTES);
  }
}

inline void store(int number, void* memory, int64_t stride) {
  for (int row = 0; row < ROWS; ++row) {
    std::memcpy(static_cast<char*>(memory) + row * stride, tile(number)[row], ROW_BYTES);
  }
}

inline void zero(int number) { std::memset(tile(number), 0, ROWS * ROW_BYTES); }

inline void multiply(int sums, int left, int right) {
  for (int row = 0; row < ROWS; ++row) {
    __m512 sum = _mm512_loadu_ps(tile(sums)[row]);
    for (int pair = 0; pair < ROWS; ++pair) {
      int32_t one;
      std::memcpy(&one, tile(left)[row] + 4 * pair, sizeof(one));
      const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(one));
      sum = _mm512_dpbf16_ps(sum, both, reinterpret_cast<__m512bh>(_mm512_loadu_si512(tile(right)[pair])));
    }
    _mm512_storeu_ps(tile(sums)[row], sum);
  }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated::configure(true)
#define _tile_release() emulated::configure(false)
#define _tile_loadd(number, memory, stride) emulated::load(number, memory, stride)
#define _tile_stream_loadd(number, memory, stride) emulated::load(number, memory, stride)
#define _tile_stored(number, memory, stride) emulated::store(number, memory, stride)
#define _tile_zero(number) emulated::zero(number)
#define _tile_dpbf16ps(sums, left, right) emulated::multiply(sums, left, right)
