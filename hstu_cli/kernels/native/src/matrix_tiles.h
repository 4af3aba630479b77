// The matrix units of x86 (AMX): bf16 tiles of 16 rows by 64 bytes, products of them in float32, rows as tiles.
//
// Operands lie tile behind tile, 1 KB each, in the order in which they are used: no power of two between the rows of a
// tile, and every load continues the last one. A block is 32 x 32 results, four tiles of sums in registers.
#pragma once

// Older versions of clang spell the first two without the line.
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && (defined(__AMX_TILE__) || defined(__AMXTILE__)) && \
    defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512) && defined(__linux__)
#define HSTU_MATRIX_TILES

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "plan.h"
#include "scratch.h"
#include "vectors.h"

namespace hstu {

using bf16 = at::BFloat16;

constexpr int64_t TILE = 16 * 32;      // bf16 of a tile
constexpr int64_t SUM_TILE = 16 * 16;  // float32 of a tile of sums
constexpr int64_t STEP = 32;           // channels or keys that a tile product adds up

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

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Four tiles of sums as they lie in memory: two below two, so many floats between those below each other.
inline void load_sums(const float* sums, int64_t below) {
  asm volatile("" ::: "memory");  // as in add_products
  HSTU_LOAD_TILE(0, sums);
  HSTU_LOAD_TILE(1, sums + SUM_TILE);
  HSTU_LOAD_TILE(2, sums + below);
  HSTU_LOAD_TILE(3, sums + below + SUM_TILE);
}

inline void store_sums(float* sums, int64_t below) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + SUM_TILE, 64);
  _tile_stored(2, sums + below, 64);
  _tile_stored(3, sums + below + SUM_TILE, 64);
}

// Which operands of a product are soon needed again. The others are loaded past the first-level cache, as far as the
// chip heeds that, so that they do not drive out what is.
enum class Reuse { both, left, right };

// Two operands of a product beside or below each other: where their first tiles lie, how many elements further each
// next one, and how many bytes apart a tile's rows.
struct Operands {
  const bf16 *first, *second;
  int64_t step = TILE, row_bytes = 64;
};

// sums += [a0; a1] [b0 b1] over so many tiles of each: a number, or a constant whose loop is unrolled. beside(i) runs
// between, 2 steps times: other units are free meanwhile.
template <Reuse reuse = Reuse::both, typename steps_t, typename beside_t>
inline __attribute__((always_inline)) void add_products(
    steps_t steps, const Operands& a, const Operands& b, const beside_t& beside) {
  asm volatile("" ::: "memory");  // g++ does not know that tiles read memory: what was stored must be there
  const auto add = [&](int64_t i) __attribute__((always_inline)) {
    HSTU_LOAD_OPERAND(reuse == Reuse::right, 4, a.first + i * a.step, a.row_bytes);
    HSTU_LOAD_OPERAND(reuse == Reuse::left, 6, b.first + i * b.step, 64);
    _tile_dpbf16ps(0, 4, 6);
    HSTU_LOAD_OPERAND(reuse == Reuse::left, 7, b.second + i * b.step, 64);
    beside(2 * i);
    _tile_dpbf16ps(1, 4, 7);
    HSTU_LOAD_OPERAND(reuse == Reuse::right, 5, a.second + i * a.step, a.row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    beside(2 * i + 1);
    _tile_dpbf16ps(3, 5, 7);
  };
  if constexpr (std::is_integral_v<steps_t>) {
    for (int64_t i = 0; i < steps; ++i) add(i);
  } else {
#pragma GCC unroll 8
    for (int64_t i = 0; i < steps_t::value; ++i) add(i);
  }
}

inline void add_products(int64_t steps, const Operands& a, const Operands& b) {
  add_products(steps, a, b, [](int64_t) {});
}

#undef HSTU_LOAD_TILE
#undef HSTU_LOAD_OPERAND

// Whether this CPU multiplies bf16 tiles, oneDNN may use them too (its settings count here) and the system lets us.
inline bool matrix_tiles_work() {
  static const bool work = [] {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    constexpr unsigned AMX_BF16 = 1 << 22;  // of leaf 7; not every compiler has a name for it
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16)) return false;
    if (!at::native::cpublas::could_pack(at::kBFloat16)) return false;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0) return false;
    alignas(64) bf16 ones[2 * TILE];
    alignas(64) float sums[4 * SUM_TILE];
    std::fill_n(ones, 2 * TILE, bf16(1.0f));
    TileSession session;
    zero_sums();
    add_products(1, {ones, ones + TILE}, {ones, ones + TILE});
    store_sums(sums, 2 * SUM_TILE);
    return std::all_of(sums, sums + 4 * SUM_TILE, [](float sum) { return sum == STEP; });
  }();
  return work;
}

// 32 channels from `channel` on of a row that has so many; zero behind its end.
inline __m512i load_channels(const bf16* row, int64_t channel, int64_t num_channels) {
  const int64_t left = num_channels - channel;
  if (left >= STEP) return _mm512_loadu_si512(row + channel);
  return _mm512_maskz_loadu_epi16(first_of_32(left), row + channel);
}

// Two rows of 32 columns as pairs: those of even columns, and of odd ones. Nothing moves between lanes; what is
// multiplied with both comes out with even and odd columns apart, and `in_order` puts them in order.
inline void interleave_rows(__m512i a, __m512i b, bf16* even, bf16* odd) {
  _mm512_store_si512(even, _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)));
  _mm512_store_si512(odd, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
}

// The first or second half of 32 columns whose even and odd ones are apart.
template <int half>
inline __m512 in_order(__m512 even, __m512 odd) {
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8 * half)), odd);
}

// A tile transposed, as 16 x 16 pairs of bf16.
inline void transpose_tile(const bf16* source, bf16* target) { transpose_16x16(source, 16, target, 16); }

// Rows [count <= 16] as a right operand of steps of 32 channels: [steps][16 pairs of channels][16 rows].
template <typename row_t>
void load_transposed(const row_t& row, int64_t count, int64_t num_channels, bf16* tiles) {
  alignas(64) bf16 tile[TILE];
  for (int64_t channel = 0; channel < num_channels; channel += STEP) {
    for (int64_t i = 0; i < 16; ++i) {
      const __m512i values = i < count ? load_channels(row(i), channel, num_channels) : _mm512_setzero_si512();
      _mm512_store_si512(tile + i * STEP, values);
    }
    transpose_tile(tile, tiles + channel / STEP * TILE);
  }
}

// Two vectors of float32 as one of pairs of bf16, those of `low` first. Halves are rounded away from zero, two
// instructions less than to even: a tie is one of 65,536.
inline __m512i to_pairs(__m512 low, __m512 high) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i a = _mm512_add_epi32(_mm512_castps_si512(low), half);
  const __m512i b = _mm512_add_epi32(_mm512_castps_si512(high), half);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
}

// Two vectors of float32 as one of bf16, `low` first, rounded to nearest.
inline __m512i round_to_bf16(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// 2^t, right to 2^-13: bf16 keeps 2^-9. The cubic is the best relative fit of 2^f on [0, 1).
inline __m512 exp2_for_bf16(__m512 t) {
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.0780245f), f, _mm512_set1_ps(0.2260672f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6958335f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999252f));
  return _mm512_scalef_ps(p, t);
}

// x * sigmoid(alpha * x).
inline __m512 silu_for_bf16(__m512 x, __m512 minus_alpha_log2e) {
  const __m512 e = exp2_for_bf16(_mm512_mul_ps(x, minus_alpha_log2e));
  return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(e, _mm512_set1_ps(1.0f))));
}

}  // namespace hstu

#endif
