// What rows and tiles need beyond ATen's vectors: dtypes changed, blocks transposed in registers, SiLU at their speed.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace hstu {

// What is computed with: float, or double for double.
template <typename scalar_t>
using wide_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t VECTOR_BYTES = 64;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int64_t VECTOR_BYTES = 32;
#else
constexpr int64_t VECTOR_BYTES = 16;
#endif

// A register of elements as compilers know them, for any CPU: where torch has no instructions for a CPU its vectors are
// arrays in memory, and on Arm g++ writes blocks of torch's vectors to memory at every step.
template <typename value_t>
struct LanesOf {
  typedef value_t type __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int64_t COUNT = VECTOR_BYTES / sizeof(value_t);
};
template <typename value_t>
using Lanes = typename LanesOf<value_t>::type;

template <typename value_t>
inline Lanes<value_t> load_lanes(const value_t* x) {
  Lanes<value_t> lanes;
  std::memcpy(&lanes, x, sizeof(lanes));
  return lanes;
}

template <typename value_t>
inline void store_lanes(Lanes<value_t> lanes, value_t* x) {
  std::memcpy(x, &lanes, sizeof(lanes));
}

template <typename scalar_t>
void widen(const scalar_t* x, int64_t width, wide_t<scalar_t>* wide) {
  if constexpr (std::is_same_v<scalar_t, wide_t<scalar_t>>) {
    std::copy(x, x + width, wide);
  } else {
    at::vec::convert<scalar_t, float>(x, wide, width);
  }
}

template <typename scalar_t>
void narrow(const wide_t<scalar_t>* wide, int64_t width, scalar_t* x) {
  if constexpr (std::is_same_v<scalar_t, wide_t<scalar_t>>) {
    std::copy(wide, wide + width, x);
  } else {
    at::vec::convert<float, scalar_t>(wide, x, width);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// Which of 32 elements exist where so many are left.
inline __mmask32 first_of_32(int64_t left) { return left >= 32 ? 0xffffffff : (__mmask32(1) << left) - 1; }

// 16 x 16 elements of 32 bits: target[j][i] = source[i][j].
inline void transpose_16x16(const void* source, int64_t ld_source, void* target, int64_t ld_target) {
  const auto* in = static_cast<const int32_t*>(source);
  auto* out = static_cast<int32_t*>(target);
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * ld_source);
  for (int i = 0; i < 16; i += 2) {  // 2 x 2
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // 4 x 4: row r of each lane is now row i + r
    for (int r = 0; r < 2; ++r) {
      a[i + 2 * r] = _mm512_unpacklo_epi64(b[i + r], b[i + r + 2]);
      a[i + 2 * r + 1] = _mm512_unpackhi_epi64(b[i + r], b[i + r + 2]);
    }
  }
  for (int r = 0; r < 4; ++r) {  // lanes
    const __m512i even_low = _mm512_shuffle_i32x4(a[r], a[r + 4], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(a[r], a[r + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(a[r + 8], a[r + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(a[r + 8], a[r + 12], 0xdd);
    _mm512_storeu_si512(out + r * ld_target, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(out + (r + 4) * ld_target, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(out + (r + 8) * ld_target, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    _mm512_storeu_si512(out + (r + 12) * ld_target, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}

// 2^t up to the last bits of float32, by the best relative fit of degree 6 (2e-9) of 2^f on [0, 1).
inline __m512 exp2_of(__m512 t) {
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.000217022552f), f, _mm512_set1_ps(0.00124396882f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00967884092f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055483342f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240229836f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693146984f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, t);
}

// x * sigmoid(alpha * x) in float32; minus_alpha_log2e: -alpha * log2(e).
inline __m512 silu_of(__m512 x, __m512 minus_alpha_log2e) {
  // Bounded, so that Newton's step, which doubles the reciprocal's 14 bits, never meets an infinity.
  const __m512 t = _mm512_min_ps(_mm512_mul_ps(x, minus_alpha_log2e), _mm512_set1_ps(126.0f));
  const __m512 divisor = _mm512_add_ps(exp2_of(t), _mm512_set1_ps(1.0f));
  const __m512 r = _mm512_rcp14_ps(divisor);
  return _mm512_mul_ps(x, _mm512_fmadd_ps(r, _mm512_fnmadd_ps(divisor, r, _mm512_set1_ps(1.0f)), r));
}
#endif

// e^x, which ATen computes element by element where torch was built without the library for it.
template <typename real_t>
inline at::vec::Vectorized<real_t> exp_of(at::vec::Vectorized<real_t> x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return x.exp();
#else
  if constexpr (std::is_same_v<real_t, double>) {
    return x.exp();
  } else {
    const Lanes<float> most = Lanes<float>{} + 125.0f;  // 2^t and 1 + 2^t stay normal numbers
    float values[at::vec::Vectorized<float>::size()];
    x.store(values);
    for (int64_t i = 0; i < x.size(); i += LanesOf<float>::COUNT) {
      Lanes<float> t = load_lanes(values + i) * 1.4426950408889634f;
      t = t < most ? t : most;
      t = t > -most ? t : -most;
      const Lanes<float> shifted = t + 0x1.8p23f;  // the nearest integer n in its last bits
      const Lanes<float> f = t - (shifted - 0x1.8p23f);
      // The best relative fit of degree 6 (2e-9) of 2^f on [-1/2, 1/2]; times 2^n by its exponent.
      Lanes<float> p = 0.000153458124f * f + 0.00133999309f;
      p = p * f + 0.00961848907f;
      p = p * f + 0.0555032864f;
      p = p * f + 0.240226462f;
      p = p * f + 0.693147182f;
      p = p * f + 1.0f;
      const auto bits = reinterpret_cast<Lanes<uint32_t>>(p) + (reinterpret_cast<Lanes<uint32_t>>(shifted) << 23);
      store_lanes<float>(reinterpret_cast<Lanes<float>>(bits), values + i);
    }
    return at::vec::Vectorized<float>::loadu(values);
  }
#endif
}

// x * sigmoid(alpha * x) of a row, in place.
template <typename real_t>
void silu_row(real_t* scores, int64_t rows, real_t alpha) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<real_t, float>) {
    const __m512 factor = _mm512_set1_ps(-alpha * 1.4426950408889634f);
    for (int64_t i = 0; i < rows; i += 16) {
      const auto exist = static_cast<__mmask16>(rows - i >= 16 ? 0xffff : (1 << (rows - i)) - 1);
      _mm512_mask_storeu_ps(scores + i, exist, silu_of(_mm512_maskz_loadu_ps(exist, scores + i), factor));
    }
    return;
  }
#endif
  using Vec = at::vec::Vectorized<real_t>;
  const Vec minus_alpha(-alpha), one(real_t(1));
  const auto silu_of_vector = [&](Vec x) { return x / (one + exp_of(x * minus_alpha)); };
  int64_t i = 0;
  for (; i + Vec::size() <= rows; i += Vec::size()) silu_of_vector(Vec::loadu(scores + i)).store(scores + i);
  if (i < rows) silu_of_vector(Vec::loadu(scores + i, rows - i)).store(scores + i, rows - i);
}

#if defined(__aarch64__)
// 4 x 4 elements: target[j][i] = source[i][j].
inline void transpose_4x4(const float* source, int64_t ld_source, float* target, int64_t ld_target) {
  const float32x4_t a = vld1q_f32(source), b = vld1q_f32(source + ld_source);
  const float32x4_t c = vld1q_f32(source + 2 * ld_source), d = vld1q_f32(source + 3 * ld_source);
  const auto even_ab = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), odd_ab = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
  const auto even_cd = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), odd_cd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
  vst1q_f32(target, vreinterpretq_f32_f64(vtrn1q_f64(even_ab, even_cd)));
  vst1q_f32(target + ld_target, vreinterpretq_f32_f64(vtrn1q_f64(odd_ab, odd_cd)));
  vst1q_f32(target + 2 * ld_target, vreinterpretq_f32_f64(vtrn2q_f64(even_ab, even_cd)));
  vst1q_f32(target + 3 * ld_target, vreinterpretq_f32_f64(vtrn2q_f64(odd_ab, odd_cd)));
}
#endif

// target [n, m] = source [m, n] transposed; m and n are multiples of 16.
template <typename real_t>
void transpose(const real_t* source, int64_t ld_source, real_t* target, int64_t ld_target, int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; i += 16) {
    for (int64_t j = 0; j < n; j += 16) {
      const real_t* from = source + i * ld_source + j;
      real_t* to = target + j * ld_target + i;
#if defined(CPU_CAPABILITY_AVX512)
      if constexpr (std::is_same_v<real_t, float>) {
        transpose_16x16(from, ld_source, to, ld_target);
        continue;
      }
#elif defined(__aarch64__)
      if constexpr (std::is_same_v<real_t, float>) {
        for (int64_t r = 0; r < 16; r += 4) {
          for (int64_t c = 0; c < 16; c += 4) {
            transpose_4x4(from + r * ld_source + c, ld_source, to + c * ld_target + r, ld_target);
          }
        }
        continue;
      }
#endif
      at::vec::transpose_mxn<real_t>(from, ld_source, to, ld_target, 16, 16);
    }
  }
}

// As many elements as a panel has columns; zeros behind the first `count`.
template <int64_t length, typename scalar_t, typename real_t>
inline void load_part(const scalar_t* source, int64_t count, real_t* target) {
  if (count >= length) {
    if constexpr (std::is_same_v<scalar_t, real_t>) {
      using Vec = at::vec::Vectorized<real_t>;
      for (int64_t c = 0; c < length; c += Vec::size()) Vec::loadu(source + c).store(target + c);
    } else {
      at::vec::convert<scalar_t, real_t>(source, target, length);
    }
    return;
  }
  for (int64_t c = 0; c < length; ++c) target[c] = c < count ? static_cast<real_t>(source[c]) : real_t(0);
}

}  // namespace hstu
