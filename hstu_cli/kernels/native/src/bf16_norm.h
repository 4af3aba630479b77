// The layer norm of a row of bf16 in vectors that convert to it (AVX-512 BF16).
//
// 32 elements become 16 even and 16 odd ones, by a shift and a mask instead of moves between lanes. They are widened
// anew in each of three passes, which is less work than to keep them in float32.
#pragma once

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)

#include <ATen/core/Tensor.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace hstu {

// Elements 2 i and 2 i + 1 of 32.
struct EvenOdd {
  __m512 even, odd;

  EvenOdd(const at::BFloat16* x, __mmask32 exist) {
    const __m512i pairs = _mm512_maskz_loadu_epi16(exist, x);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
  }
};

// The elements in order again, rounded to nearest.
inline __m512i join_as_bf16(__m512 even, __m512 odd) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i order = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_or_si512(lanes, _mm512_set1_epi32(16)), 16));
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
}

// A norm's parameter as `NormBlock` wants it, [width rounded up to 32]: of 32 the even ones first.
inline void widen_parameter(const at::BFloat16* x, int64_t width, float* wide) {
  for (int64_t i = 0; i < width; i += 32) {
    const EvenOdd values(x + i, first_of_32(width - i));
    _mm512_storeu_ps(wide + i, values.even);
    _mm512_storeu_ps(wide + i + 16, values.odd);
  }
}

// What a row is normed by: (x - mean) * scale * weight + bias.
struct RowNorm {
  __m512 mean, scale;  // scale: 1 / sqrt(variance + eps)

  RowNorm() = default;

  RowNorm(const at::BFloat16* x, double eps, int64_t width) {
    const int64_t whole = width / 32 * 32;
    const __mmask32 rest = first_of_32(width - whole);
    __m512 sums[4];
    const auto total = [&] {
      return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
    };
    const auto add_all = [&](const auto& add) {  // two blocks of 32 at a time, so that sums do not wait for each other
      std::fill_n(sums, 4, _mm512_setzero_ps());
      int64_t i = 0;
      for (; i + 64 <= width; i += 64) {
        add(EvenOdd(x + i, -1), sums, -1, -1);
        add(EvenOdd(x + i + 32, -1), sums + 2, -1, -1);
      }
      if (i < whole) {
        add(EvenOdd(x + i, -1), sums, -1, -1);
        i += 32;
      }
      if (rest) {
        const __mmask32 even = _pext_u32(rest, 0x55555555), odd = _pext_u32(rest, 0xaaaaaaaa);
        add(EvenOdd(x + i, rest), sums, static_cast<__mmask16>(even), static_cast<__mmask16>(odd));
      }
    };
    add_all([](const EvenOdd& v, __m512* to, __mmask16 /*even*/, __mmask16 /*odd*/) {
      to[0] = _mm512_add_ps(to[0], v.even);
      to[1] = _mm512_add_ps(to[1], v.odd);
    });
    mean = _mm512_set1_ps(total() / static_cast<float>(width));
    add_all([this](const EvenOdd& v, __m512* to, __mmask16 even, __mmask16 odd) {
      const __m512 a = _mm512_maskz_sub_ps(even, v.even, mean), b = _mm512_maskz_sub_ps(odd, v.odd, mean);
      to[0] = _mm512_fmadd_ps(a, a, to[0]);
      to[1] = _mm512_fmadd_ps(b, b, to[1]);
    });
    scale = _mm512_set1_ps(1.0f / std::sqrt(total() / static_cast<float>(width) + static_cast<float>(eps)));
  }
};

// 32 elements of a norm's parameters. weight, bias: see `widen_parameter`.
struct NormBlock {
  __m512 even_weight, odd_weight, even_bias, odd_bias;

  NormBlock(const float* weight, const float* bias)
      : even_weight(_mm512_loadu_ps(weight)),
        odd_weight(_mm512_loadu_ps(weight + 16)),
        even_bias(_mm512_loadu_ps(bias)),
        odd_bias(_mm512_loadu_ps(bias + 16)) {}

  // The norm of 32 elements of a row, times u where there is one.
  __m512i operator()(const RowNorm& row, const at::BFloat16* x, const at::BFloat16* u, __mmask32 exist) const {
    const EvenOdd v(x, exist);
    const auto normed = [&](__m512 part, __m512 weight, __m512 bias) {
      return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_sub_ps(part, row.mean), row.scale), weight, bias);
    };
    __m512 even = normed(v.even, even_weight, even_bias), odd = normed(v.odd, odd_weight, odd_bias);
    if (u != nullptr) {
      const EvenOdd factor(u, exist);
      even = _mm512_mul_ps(even, factor.even);
      odd = _mm512_mul_ps(odd, factor.odd);
    }
    return join_as_bf16(even, odd);
  }
};

// A whole row; see rows.h.
inline void norm_row(
    const at::BFloat16* x, const at::BFloat16* u, const float* weight, const float* bias, double eps, int64_t width,
    float* /*wide*/, at::BFloat16* out) {
  const RowNorm norm(x, eps, width);
  for (int64_t i = 0; i < width; i += 32) {
    const __mmask32 exist = first_of_32(width - i);
    const NormBlock block(weight + i, bias + i);
    _mm512_mask_storeu_epi16(out + i, exist, block(norm, x + i, u == nullptr ? nullptr : u + i, exist));
  }
}

}  // namespace hstu

#endif
