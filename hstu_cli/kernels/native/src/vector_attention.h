// Attention of one head of a sequence in vectors of float or double, on any CPU.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "plan.h"
#include "scratch.h"

namespace hstu {

// Right operands are stored as panels of so many columns, one behind the other: a panel of a few hundred rows stays in
// the first-level cache, and no power of two lies between its rows. Half as fast without.
constexpr int64_t PANEL = 32;

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

// c [m, n] = a [m, k] b [k, n], or added to it; row-major. m and n are multiples of 16, as all tiles are.
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

// c [m, columns begin to end] = a [m, k] b [k, columns], or added to it; b in panels of `panel_rows` rows.
template <typename real_t>
void multiply_panels(
    int64_t m, int64_t begin, int64_t end, int64_t k, const real_t* a, int64_t lda, const real_t* b, int64_t panel_rows,
    real_t* c, int64_t ldc, bool add) {
  for (int64_t column = begin; column < end;) {
    const int64_t next = std::min((column / PANEL + 1) * PANEL, end);
    const real_t* panel = b + column / PANEL * PANEL * panel_rows + column % PANEL;
    for (int64_t i = 0; i < m; i += PANEL) {
      multiply(std::min(PANEL, m - i), next - column, k, a + i * lda, lda, panel, PANEL, c + i * ldc + column, ldc, add);
    }
    column = next;
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

// A row of `channels` elements as a tile row of `width`, the rest zero; a null row is all zero.
template <typename scalar_t, typename real_t>
void load_row(const scalar_t* source, int64_t channels, real_t* tile, int64_t width) {
  if (source == nullptr) channels = 0;
  if constexpr (std::is_same_v<scalar_t, real_t>) {
    if (channels) std::memcpy(tile, source, channels * sizeof(real_t));
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      tile[c] = static_cast<real_t>(source[c]);
    }
  }
  std::fill(tile + channels, tile + width, real_t(0));
}

// x * sigmoid(alpha * x) of a row, in place.
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

// Scores of a strip of keys are computed transposed (keys by rows), then SiLU, the mask, and the sum of values.
template <typename scalar_t, typename real_t>
class VectorTiles {
 public:
  using scalar_type = scalar_t;
  using sum_type = real_t;
  struct session_type {};
  static constexpr int64_t MAX_HEADS = 1;

  VectorTiles(int64_t head_dim, double alpha)
      : head_dim_(head_dim), width_(round_up(head_dim, PANEL)), alpha_(static_cast<real_t>(alpha)) {}

  void carve(Carver& carver, int64_t /*num_heads*/) {
    carver.take(queries_, QUERY_ROWS * width_);
    carver.take(queries_transposed_, QUERY_ROWS * width_);
    carver.take(keys_, SCORE_KEYS * ld_keys());
    carver.take(values_, CHUNK_KEYS * width_);
    carver.take(scores_, SCORE_KEYS * LD_SCORES);
    carver.take(weights_, QUERY_ROWS * LD_WEIGHTS);
  }

  // Rows get a vector more than they hold: at powers of two they would meet in the same cache sets.
  int64_t sums_per_row() const { return width_ + 16; }

  // How many keys to load next: none beyond the diagonal with those before it, and few on it, so that less is computed
  // in vain.
  int64_t num_chunk_keys(int64_t /*num_heads*/, int64_t before_diagonal) const {
    return before_diagonal > 0 ? std::min(CHUNK_KEYS, before_diagonal) : SCORE_KEYS;
  }

  template <typename row_t>
  void load_queries(int64_t /*slot*/, int64_t num_rows, int64_t padded_rows, const row_t& row) {
    for (int64_t i = 0; i < padded_rows; ++i) {
      load_row(i < num_rows ? row(i) : nullptr, head_dim_, queries_ + i * width_, width_);
    }
    for (int64_t i = 0; i < padded_rows; i += PANEL) {
      const int64_t count = std::min(PANEL, padded_rows - i);
      transpose(queries_ + i * width_, width_, queries_transposed_ + i * width_, PANEL, count, width_);
    }
  }

  // Loads the values; keys follow strip by strip.
  void load(const KeyRow<scalar_t>* rows, int64_t count, int64_t /*num_heads*/) {
    rows_ = rows;
    count_ = count;
    for (int64_t j = 0; j < round_up(count, PANEL); ++j) {
      const scalar_t* value = j < count ? rows[j].value : nullptr;
      for (int64_t c = 0; c < width_; c += PANEL) {
        const int64_t channels = std::clamp<int64_t>(head_dim_ - c, 0, PANEL);
        load_row(value ? value + c : nullptr, channels, values_ + c * CHUNK_KEYS + j * PANEL, PANEL);
      }
    }
  }

  // sums [rows, width] += SiLU(q k') v over the loaded keys; row i sees those with diagonal + key <= i.
  void attend(int64_t /*slot*/, int64_t padded_rows, int64_t diagonal, real_t* sums) {
    const int64_t padded = round_up(count_, PANEL);
    const int64_t from = std::min(std::max<int64_t>(0, diagonal) / 16 * 16, padded_rows);  // rows before see none of them
    const int64_t rows = padded_rows - from;
    for (int64_t j = 0; j < padded; j += SCORE_KEYS) {
      const int64_t keys = std::min(SCORE_KEYS, padded - j);
      for (int64_t i = 0; i < keys; ++i) {
        load_row(j + i < count_ ? rows_[j + i].key : nullptr, head_dim_, keys_ + i * ld_keys(), width_);
      }
      multiply_panels(
          keys, from, padded_rows, width_, keys_, ld_keys(), queries_transposed_, width_, scores_, LD_SCORES, false);
      for (int64_t i = 0; i < keys; ++i) {
        real_t* row = scores_ + i * LD_SCORES + from;
        silu_row(row, rows, alpha_);
        std::fill(row, row + std::clamp<int64_t>(diagonal + j + i - from, 0, rows), real_t(0));
      }
      transpose(scores_ + from, LD_SCORES, weights_ + from * LD_WEIGHTS + j, LD_WEIGHTS, keys, rows);
    }
    multiply_panels(
        rows, 0, width_, padded, weights_ + from * LD_WEIGHTS, LD_WEIGHTS, values_, CHUNK_KEYS,
        sums + from * sums_per_row(), sums_per_row(), true);
  }

  // Row i of sums: [width].
  void read_row(const real_t* sums, int64_t i, real_t* row) const {
    std::copy(sums + i * sums_per_row(), sums + i * sums_per_row() + width_, row);
  }

 private:
  static constexpr int64_t CHUNK_KEYS = 256, SCORE_KEYS = 128;
  static constexpr int64_t LD_WEIGHTS = CHUNK_KEYS + 32, LD_SCORES = QUERY_ROWS + 16;

  int64_t ld_keys() const { return width_ + 32; }

  int64_t head_dim_, width_;
  real_t alpha_;
  const KeyRow<scalar_t>* rows_ = nullptr;
  int64_t count_ = 0;
  // [rows, width]; [width, rows] in panels; [strip, width]; [chunk, width] in panels; [strip, rows]; [rows, chunk]
  real_t *queries_, *queries_transposed_, *keys_, *values_, *scores_, *weights_;
};

}  // namespace hstu
