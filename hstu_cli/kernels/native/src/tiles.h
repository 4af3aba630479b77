// Tiles of one thread: products of them, and how rows of keys, values and queries are brought into them.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace hstu {

// A tile holds bf16 where the CPU multiplies that in matrix units, else the type that sums are kept in.
template <typename tile_t>
using sum_t = std::conditional_t<std::is_same_v<tile_t, double>, double, float>;

template <typename tile_t>
constexpr bool is_paired = std::is_same_v<tile_t, at::BFloat16>;

constexpr int64_t ROW_STEP = 16;  // query rows come in multiples of this,
constexpr int64_t KEY_STEP = 32;  // keys and channels of a head in multiples of that: whole matrix tiles

// Right operands are stored as panels of so many columns, one behind the other: a panel of a few hundred rows stays in
// the first-level cache, and no power of two lies between its rows. Half as fast without.
template <typename tile_t>
constexpr int64_t PANEL = is_paired<tile_t> ? 64 : 32;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// c [m, n] = a [m, k] b [k, n], or added to it; row-major, of a bf16 b two rows interleaved.
inline void multiply(
    int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb, float* c,
    int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/true);
}

// Gives the matrix units back; after the last product of a thread.
template <typename tile_t>
void release_tiles() {
  if constexpr (is_paired<tile_t>) {
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  }
}

// A block of the product that stays in registers: M rows of N vectors.
template <typename real_t, int M, int N>
inline void multiply_block(
    int64_t k, const real_t* a, int64_t lda, const real_t* b, int64_t ldb, real_t* c, int64_t ldc, bool add) {
  using Vec = at::vec::Vectorized<real_t>;
  Vec sums[M][N];
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      sums[i][j] = add ? Vec::loadu(c + i * ldc + j * Vec::size()) : Vec(real_t(0));
    }
  }
  for (int64_t l = 0; l < k; ++l) {
    Vec right[N];
    for (int j = 0; j < N; ++j) {
      right[j] = Vec::loadu(b + l * ldb + j * Vec::size());
    }
    for (int i = 0; i < M; ++i) {
      const Vec left(a[i * lda + l]);
      for (int j = 0; j < N; ++j) {
        sums[i][j] = at::vec::fmadd(left, right[j], sums[i][j]);
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      sums[i][j].store(c + i * ldc + j * Vec::size());
    }
  }
}

// The same of float and double on any CPU. m and n are multiples of 16, as all tiles are.
template <typename real_t>
void multiply(
    int64_t m, int64_t n, int64_t k, const real_t* a, int64_t lda, const real_t* b, int64_t ldb, real_t* c, int64_t ldc,
    bool add) {
  constexpr int64_t lanes = at::vec::Vectorized<real_t>::size();
  constexpr int M = lanes * sizeof(real_t) >= 64 ? 8 : 4;  // as many sums as there are registers for
  for (int64_t j = 0; j < n; j += 2 * lanes) {
    for (int64_t i = 0; i < m; i += M) {
      const auto run = n - j >= 2 * lanes ? multiply_block<real_t, M, 2> : multiply_block<real_t, M, 1>;
      run(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, add);
    }
  }
}

// A row of `channels` elements as a tile row of `width`, the rest zero.
template <typename scalar_t, typename tile_t>
void load_row(const scalar_t* source, int64_t channels, tile_t* tile, int64_t width) {
  if constexpr (std::is_same_v<scalar_t, tile_t>) {
    std::memcpy(tile, source, channels * sizeof(tile_t));
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      tile[c] = static_cast<tile_t>(source[c]);
    }
  }
  std::fill(tile + channels, tile + width, tile_t(0));
}

// Rows [count] in memory, each `channels` long, as the left operand of a product: [count, width].
template <typename scalar_t, typename tile_t>
void load_rows(
    const scalar_t* const* rows, int64_t count, int64_t channels, tile_t* tile, int64_t ld_tile, int64_t width) {
  for (int64_t j = 0; j < count; ++j) {
    load_row(rows[j], channels, tile + j * ld_tile, width);
  }
}

// 32 channels of two rows as pairs: first those of the even channels, then those of the odd ones.
inline void interleave(const at::BFloat16* first, const at::BFloat16* second, at::BFloat16* pairs) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  _mm512_storeu_si512(pairs, _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)));
  _mm512_storeu_si512(pairs + 32, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
#else
  for (int c = 0; c < 32; ++c) {
    pairs[c % 2 * 32 + c / 2 * 2] = first[c];
    pairs[c % 2 * 32 + c / 2 * 2 + 1] = second[c];
  }
#endif
}

// c [m, columns begin to end] = a [m, k] b [k, columns], or added to it; b in panels of `panel_rows` rows.
template <typename tile_t>
void multiply_panels(
    int64_t m, int64_t begin, int64_t end, int64_t k, const tile_t* a, int64_t lda, const tile_t* b, int64_t panel_rows,
    sum_t<tile_t>* c, int64_t ldc, bool add) {
  constexpr int64_t interleaved = is_paired<tile_t> ? 2 : 1, ld = PANEL<tile_t>;
  for (int64_t column = begin; column < end;) {
    const int64_t next = std::min((column / ld + 1) * ld, end);
    const tile_t* panel = b + column / ld * ld * panel_rows + column % ld * interleaved;
    for (int64_t i = 0; i < m; i += ld) {
      multiply(std::min(ld, m - i), next - column, k, a + i * lda, lda, panel, ld, c + i * ldc + column, ldc, add);
    }
    column = next;
  }
}

// Rows [count] in memory as the right operand of a product, [padded, width] in panels of `panel_rows`; rows behind
// count are zero. spare: two rows.
//
// Two rows of bf16 are interleaved. Of each 32 channels the even ones come first, then the odd ones: then a shift and a
// mask do it without moving anything between vector lanes. `store_row` puts the product's columns in order again.
template <typename scalar_t, typename tile_t>
void load_values(
    const scalar_t* const* rows, int64_t count, int64_t padded, int64_t channels, tile_t* tile, int64_t panel_rows,
    int64_t width, tile_t* spare) {
  constexpr int64_t step = is_paired<tile_t> ? 2 : 1, ld = PANEL<tile_t>;
  for (int64_t j = 0; j < padded; j += step) {
    const tile_t* source[step];
    for (int64_t r = 0; r < step; ++r) {
      if constexpr (std::is_same_v<scalar_t, tile_t>) {
        if (channels == width && j + r < count) {
          source[r] = rows[j + r];
          continue;
        }
      }
      const bool exists = j + r < count;
      load_row(exists ? rows[j + r] : rows[0], exists ? channels : 0, spare + r * width, width);
      source[r] = spare + r * width;
    }
    for (int64_t c = 0; c < width; c += KEY_STEP) {
      tile_t* target = tile + c / ld * ld * panel_rows + j * ld + c % ld * step;
      if constexpr (is_paired<tile_t>) {
        interleave(source[0] + c, source[1] + c, target);
      } else {
        std::copy(source[0] + c, source[0] + c + KEY_STEP, target);
      }
    }
  }
}

template <typename real_t>
void transpose(const real_t* source, int64_t ld_source, real_t* target, int64_t ld_target, int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; i += 16) {
    for (int64_t j = 0; j < n; j += 16) {
      at::vec::transpose_mxn<real_t>(
          source + i * ld_source + j, ld_source, target + j * ld_target + i, ld_target, std::min<int64_t>(16, m - i),
          std::min<int64_t>(16, n - j));
    }
  }
}

// Queries [rows, width] as the right operand, [width, rows] in panels; of bf16 two channels are interleaved.
template <typename tile_t>
void transpose_queries(const tile_t* queries, int64_t width, tile_t* tile, int64_t rows) {
  for (int64_t i = 0; i < rows; i += PANEL<tile_t>) {
    const int64_t count = std::min(PANEL<tile_t>, rows - i);
    tile_t* panel = tile + i * width;
    if constexpr (is_paired<tile_t>) {  // two bf16 move as one float, which no instruction here interprets
      const auto* source = reinterpret_cast<const float*>(queries + i * width);
      transpose(source, width / 2, reinterpret_cast<float*>(panel), PANEL<tile_t>, count, width / 2);
    } else {
      transpose(queries + i * width, width, panel, PANEL<tile_t>, count, width);
    }
  }
}

// A row of a product as the output's dtype: scale * sums + own, in the order of the channels; row: scratch.
template <typename tile_t, typename scalar_t>
void store_row(
    const sum_t<tile_t>* sums, const sum_t<tile_t>* own, sum_t<tile_t> scale, int64_t channels, int64_t width,
    sum_t<tile_t>* row, scalar_t* out) {
  using real_t = sum_t<tile_t>;
  if constexpr (is_paired<tile_t>) {
    for (int64_t c = 0; c < width; c += 32) {
      for (int64_t lane = 0; lane < 16; ++lane) {
        row[c + 2 * lane] = sums[c + lane] * scale;
        row[c + 2 * lane + 1] = sums[c + 16 + lane] * scale;
      }
    }
  } else {
    for (int64_t c = 0; c < width; ++c) {
      row[c] = sums[c] * scale;
    }
  }
  if (own != nullptr) {
    for (int64_t c = 0; c < channels; ++c) {
      row[c] += own[c];
    }
  }
  if constexpr (std::is_same_v<scalar_t, real_t>) {
    std::copy(row, row + channels, out);
  } else {
    at::vec::convert<real_t, scalar_t>(row, out, channels);
  }
}

}  // namespace hstu
