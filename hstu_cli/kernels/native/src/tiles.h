// Tiles of bf16: how they lie, and how rows become tiles and sums become rows again. What multiplies them is in
// `matrix_tiles.h`.
//
// Operands lie tile behind tile, 1 KB each, in the order in which they are used: no power of two between the rows of a
// tile, and every load continues the last one. A block is 32 x 32 results, four tiles of sums.
#pragma once

#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512) && defined(__linux__)
#define HSTU_BF16_TILES

#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vectors.h"

namespace hstu {

using bf16 = at::BFloat16;

constexpr int64_t TILE = 16 * 32;      // bf16 of a tile
constexpr int64_t SUM_TILE = 16 * 16;  // float32 of a tile of sums
constexpr int64_t STEP = 32;           // channels or keys that a tile product adds up

// Which operands of a product are soon needed again. The others are loaded past the first-level cache, as far as the
// chip heeds that, so that they do not drive out what is.
enum class Reuse { both, left, right };

// Two operands of a product beside or below each other: where their first tiles lie, how many elements further each
// next one, and how many bytes apart a tile's rows.
struct Operands {
  const bf16 *first, *second;
  int64_t step = TILE, row_bytes = 64;
};

// Where four tiles of sums lie, two below two, so many floats between those below each other, and whether products are
// added to what they hold. Of 32 rows and columns so many are wanted: that is a hint, others may be sums too, or zeros, or
// what they were where something is added.
struct TileSums {
  float* tiles;
  bool add = false;
  int64_t below = 2 * SUM_TILE, rows = 32, columns = 32;
};

// Lines brought closer beside products: fetch() brings the next one, so many times beside half a step of 32 rows and
// columns.
template <typename line_t>
struct Lines {
  line_t& fetch;
  int64_t each;
};

struct NoLine {
  void operator()() const {}
};

// Lines that follow each other, as a hint of _MM_HINT says (an int to clang).
template <auto hint>
struct NextLine {
  const bf16* at;

  void operator()() {
    _mm_prefetch(at, hint);
    at += STEP;
  }
};

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
