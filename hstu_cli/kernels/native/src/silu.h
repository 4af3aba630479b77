// SiLU of a tile of scores, masked, as the left operand of the product with the values.
#pragma once

#include "tiles.h"

namespace hstu {

#if defined(CPU_CAPABILITY_AVX512)
// x * sigmoid(alpha * x), right to 2^-13: bf16 keeps 2^-9. The cubic is the best relative fit of 2^f on [0, 1).
inline __m512 silu_for_bf16(__m512 x, __m512 minus_alpha_log2e) {
  const __m512 t = _mm512_mul_ps(x, minus_alpha_log2e);
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.0780245f), f, _mm512_set1_ps(0.2260672f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6958335f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999252f));
  const __m512 e = _mm512_scalef_ps(p, t);
  return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(e, _mm512_set1_ps(1.0f))));
}

// Where row i + lane of a vector is at least `from`.
inline __mmask16 rows_from(int64_t from, int64_t i) {
  return from <= i ? 0xffff : from >= i + 16 ? 0 : static_cast<__mmask16>(0xffff << (from - i));
}

template <bool masked>
void silu_pairs(
    const float* scores, int64_t ld_scores, int64_t rows, int64_t keys, float alpha, int64_t diagonal,
    int64_t valid_keys, at::BFloat16* weights, int64_t ld_weights) {
  const __m512 factor = _mm512_set1_ps(-alpha * 1.44269504f);
  // Rounds halves away from zero, two instructions less than to even: a tie is one of 65,536.
  const __m512i half = _mm512_set1_epi32(0x8000);
  alignas(64) float pairs[16 * 16];
  for (int64_t j = 0; j < keys; j += 32) {
    for (int64_t i = 0; i < rows; i += 16) {
      for (int64_t pair = 0; pair < 16; ++pair) {
        __m512i bits[2];
        for (int64_t r = 0; r < 2; ++r) {
          const int64_t key = j + 2 * pair + r;
          __m512 w = silu_for_bf16(_mm512_loadu_ps(scores + key * ld_scores + i), factor);
          if constexpr (masked) {
            w = _mm512_maskz_mov_ps(rows_from(key < valid_keys ? diagonal + key : rows, i), w);
          }
          bits[r] = _mm512_add_epi32(_mm512_castps_si512(w), half);
        }
        const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(bits[0], 16), bits[1]);
        _mm512_store_si512(pairs + 16 * pair, both);
      }
      at::vec::transpose_mxn<float>(
          pairs, 16, reinterpret_cast<float*>(weights + i * ld_weights + j), ld_weights / 2, 16, 16);
    }
  }
}
#endif

template <typename real_t>
void silu_row(real_t* scores, int64_t rows, real_t alpha) {
  using Vec = at::vec::Vectorized<real_t>;
  const Vec minus_alpha(-alpha), one(real_t(1));
  for (int64_t i = 0; i < rows; i += Vec::size()) {
    const int64_t count = std::min<int64_t>(Vec::size(), rows - i);
    const Vec x = Vec::loadu(scores + i, count);
    (x / (one + (x * minus_alpha).exp())).store(scores + i, count);
  }
}

// weights [rows, keys] = scores [keys, rows] transposed * sigmoid(alpha * scores); scores are overwritten.
//
// Row i sees keys j with diagonal + j <= i and j < valid_keys: the rest is zero.
template <typename tile_t>
void silu_tile(
    sum_t<tile_t>* scores, int64_t ld_scores, int64_t rows, int64_t keys, double alpha, int64_t diagonal,
    int64_t valid_keys, tile_t* weights, int64_t ld_weights) {
  const bool masked = valid_keys < keys || diagonal + keys > 1;
  if constexpr (is_paired<tile_t>) {
#if defined(CPU_CAPABILITY_AVX512)
    auto run = masked ? silu_pairs<true> : silu_pairs<false>;
    run(scores, ld_scores, rows, keys, static_cast<float>(alpha), diagonal, valid_keys, weights, ld_weights);
#endif
  } else {
    for (int64_t j = 0; j < keys; ++j) {
      auto* row = scores + j * ld_scores;
      silu_row(row, rows, static_cast<tile_t>(alpha));
      const int64_t hidden = j < valid_keys ? diagonal + j : rows;
      std::fill(row, row + std::clamp<int64_t>(hidden, 0, rows), tile_t(0));
    }
    transpose(scores, ld_scores, weights, ld_weights, keys, rows);
  }
}

}  // namespace hstu
