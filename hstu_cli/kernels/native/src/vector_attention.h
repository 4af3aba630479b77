// Attention of one head of a sequence in vectors of float or double, on any CPU.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

#include "plan.h"
#include "scratch.h"
#include "vectors.h"

namespace hstu {

// Right operands are stored as panels of so many columns, one behind the other: a panel of a few hundred rows stays in
// the first-level cache, and no power of two lies between its rows. Half as fast without.
constexpr int64_t PANEL = 32;

// A block of the product that stays in registers: M rows of N of the compiler's vectors.
template <typename real_t, int M, int N>
inline void multiply_block(
    int64_t k, const real_t* a, int64_t lda, const real_t* b, int64_t ldb, real_t* c, int64_t ldc, bool add) {
  constexpr int64_t lanes = LanesOf<real_t>::COUNT;
  Lanes<real_t> sums[M][N] = {};
  for (int64_t l = 0; l < k; ++l) {
    Lanes<real_t> right[N];
    for (int j = 0; j < N; ++j) {
      right[j] = load_lanes(b + l * ldb + j * lanes);
    }
    for (int i = 0; i < M; ++i) {
      const real_t left = a[i * lda + l];
      for (int j = 0; j < N; ++j) {
        sums[i][j] += left * right[j];
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      // Added last: shorter sums round less.
      real_t* target = c + i * ldc + j * lanes;
      store_lanes<real_t>(add ? load_lanes(target) + sums[i][j] : sums[i][j], target);
    }
  }
}

// c [m, n] = a [m, k] b [k, n], or added to it; row-major. m and n are multiples of 16.
template <typename real_t>
void multiply(
    int64_t m, int64_t n, int64_t k, const real_t* a, int64_t lda, const real_t* b, int64_t ldb, real_t* c, int64_t ldc,
    bool add) {
  constexpr int64_t lanes = LanesOf<real_t>::COUNT;
  // As many sums as there are registers for: 16 of 32 of them, or 8 of 16.
#if defined(__aarch64__)
  constexpr int M = 4, N = 4;
#else
  constexpr int M = VECTOR_BYTES >= 64 ? 8 : 4, N = 2;
#endif
  constexpr int64_t columns = N * lanes;
  static_assert(16 % columns == 0 || (columns == 32 && 16 % (2 * M) == 0));
  int64_t j = 0;
  for (; j + columns <= n; j += columns) {
    for (int64_t i = 0; i < m; i += M) {
      multiply_block<real_t, M, N>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, add);
    }
  }
  if constexpr (columns == 32) {
    for (int64_t i = 0; j < n && i < m; i += 2 * M) {
      multiply_block<real_t, 2 * M, N / 2>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, add);
    }
  }
}

// c [m, n] = a [m, k] b [k, n], or added to it; b in panels of `panel_rows` rows, the last of which may be half a panel.
template <typename real_t>
void multiply_panels(
    int64_t m, int64_t n, int64_t k, const real_t* a, int64_t lda, const real_t* b, int64_t panel_rows, real_t* c,
    int64_t ldc, bool add) {
  for (int64_t column = 0; column < n; column += PANEL) {
    const real_t* panel = b + column * panel_rows;
    for (int64_t i = 0; i < m; i += PANEL) {
      multiply(
          std::min(PANEL, m - i), std::min(PANEL, n - column), k, a + i * lda, lda, panel, PANEL, c + i * ldc + column,
          ldc, add);
    }
  }
}

// The elements of a row from `channel` on; null of none.
template <typename scalar_t>
const scalar_t* part_of(const scalar_t* row, int64_t channel) {
  return row == nullptr ? row : row + channel;
}

// A row of `channels` elements as a tile row of `width`, the rest zero; a null row is all zero.
template <typename scalar_t, typename real_t>
void load_row(const scalar_t* source, int64_t channels, real_t* tile, int64_t width) {
  for (int64_t c = 0; c < width; c += PANEL) {
    load_part<PANEL>(part_of(source, c), source == nullptr ? 0 : channels - c, tile + c);
  }
}

// Block by block of rows, scores are computed transposed (keys by rows) and become weights in the first-level cache,
// which then meet the values.
template <typename scalar_t, typename real_t>
class VectorTiles {
 public:
  using scalar_type = scalar_t;
  using sum_type = real_t;
  struct session_type {};
  static constexpr bool PACKS = false;
  static constexpr int64_t MAX_HEADS = 1, MOST_KEYS = 256;

  VectorTiles(int64_t head_dim, double alpha)
      : head_dim_(head_dim), width_(round_up(head_dim, PANEL)), alpha_(static_cast<real_t>(alpha)) {}

  void carve(Carver& carver, int64_t /*num_heads*/) {
    carver.take(queries_, BLOCK_ROWS * width_);
    carver.take(queries_transposed_, QUERY_ROWS * width_);
    carver.take(keys_, MOST_KEYS * ld_keys());
    carver.take(values_, MOST_KEYS * width_);
    carver.take(scores_, STRIP_KEYS * LD_SCORES);
    carver.take(weights_, BLOCK_ROWS * LD_WEIGHTS);
  }

  // Rows get a vector more than they hold: at powers of two they would meet in the same cache sets.
  int64_t sums_per_row() const { return width_ + 16; }

  int64_t num_chunk_keys(int64_t /*num_heads*/) const { return MOST_KEYS; }

  template <typename row_t>
  void load_queries(int64_t /*head*/, int64_t num_rows, int64_t padded_rows, const row_t& row) {
    num_rows_ = num_rows;
    for (int64_t i = 0; i < padded_rows; i += PANEL) {
      for (int64_t j = 0; j < PANEL; ++j) {
        const scalar_t* query = i + j < num_rows ? row(i + j) : nullptr;
        load_row(query, head_dim_, queries_ + j * width_, width_);
      }
      transpose(queries_, width_, queries_transposed_ + i * width_, PANEL, PANEL, width_);
    }
  }

  // sums [rows, width] = SiLU(q k') v over these keys, or that is added; row i sees those with diagonal + key <= i.
  void attend(const Keys<scalar_t>& keys, int64_t padded_rows, int64_t diagonal, real_t* sums, bool add) {
    load(keys.rows, keys.count);
    for (int64_t row = 0; row < padded_rows; row += BLOCK_ROWS) {
      const int64_t block_rows = std::min(BLOCK_ROWS, round_up(num_rows_ - row, 16));
      const int64_t seen = row + block_rows - diagonal;  // by the last row
      const int64_t num_seen = std::clamp<int64_t>(round_up(seen, 16), 0, padded_keys_);
      if (num_seen == 0 && add) continue;
      real_t* block_sums = sums + row * sums_per_row();
      if (!add) std::fill(block_sums + block_rows * sums_per_row(), block_sums + BLOCK_ROWS * sums_per_row(), real_t(0));
      for (int64_t j = 0; j < num_seen; j += STRIP_KEYS) {
        weigh(row, block_rows, j, std::min(STRIP_KEYS, num_seen - j), diagonal);
      }
      multiply_panels(
          block_rows, width_, num_seen, weights_, LD_WEIGHTS, values_, MOST_KEYS, block_sums, sums_per_row(), add);
    }
  }

  // Row i of sums times a factor as a row of results; false where only read_row can.
  bool write_row(
      const real_t* /*sums*/, int64_t /*i*/, real_t /*factor*/, bool /*stream*/, scalar_t* /*out*/) const {
    return false;
  }

  // Row i of sums: [width].
  void read_row(const real_t* sums, int64_t i, real_t* row) const {
    std::copy(sums + i * sums_per_row(), sums + i * sums_per_row() + width_, row);
  }

 private:
  static constexpr int64_t STRIP_KEYS = 128, BLOCK_ROWS = 32;
  static constexpr int64_t LD_WEIGHTS = MOST_KEYS + 32, LD_SCORES = BLOCK_ROWS + 16;

  void load(const KeyRow<scalar_t>* rows, int64_t count) {
    padded_keys_ = round_up(count, PANEL);
    for (int64_t j = 0; j < padded_keys_; ++j) {
      load_row(j < count ? rows[j].key : nullptr, head_dim_, keys_ + j * ld_keys(), width_);
    }
    for (int64_t j = 0; j < padded_keys_; ++j) {
      const scalar_t* value = j < count ? rows[j].value : nullptr;
      for (int64_t c = 0; c < width_; c += PANEL) {
        load_part<PANEL>(part_of(value, c), value ? head_dim_ - c : 0, values_ + c * MOST_KEYS + j * PANEL);
      }
    }
  }

  // The weights of a block of rows and a strip of keys. Zeros stand behind the last key: so are its weights.
  void weigh(int64_t row, int64_t rows, int64_t first_key, int64_t keys, int64_t diagonal) {
    multiply_panels(
        keys, rows, width_, keys_ + first_key * ld_keys(), ld_keys(), queries_transposed_ + row * width_, width_,
        scores_, LD_SCORES, false);
    for (int64_t i = 0; i < keys; ++i) {
      real_t* scores = scores_ + i * LD_SCORES;
      silu_row(scores, rows, alpha_);
      std::fill(scores, scores + std::clamp<int64_t>(diagonal + first_key + i - row, 0, rows), real_t(0));
    }
    transpose(scores_, LD_SCORES, weights_ + first_key, LD_WEIGHTS, keys, rows);
  }

  int64_t ld_keys() const { return width_ + 32; }

  int64_t head_dim_, width_, num_rows_ = 0, padded_keys_ = 0;
  real_t alpha_;
  // [panel, width]; [width, rows] in panels; [chunk, width]; [chunk, width] in panels; [strip, block]; [block, chunk]
  real_t *queries_, *queries_transposed_, *keys_, *values_, *scores_, *weights_;
};

}  // namespace hstu
