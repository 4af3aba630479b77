// Attention of some heads of a sequence in matrix units: scores, SiLU and the sum of values, block by block.
#pragma once

#include "matrix_tiles.h"

#ifdef HSTU_MATRIX_TILES

namespace hstu {

// Keys and values are fetched for all heads of a task at once, row by row as they lie in memory, and brought into tiles
// piece by piece: 32 keys, or 32 channels of the values, which then stay in the first-level cache for all query rows.
// Scores are computed transposed (keys by rows), so that keys need no more than copying and values interleaving. A
// block's SiLU runs beside the next block's products: vectors and matrices are different units.
class MatrixTiles {
 public:
  using scalar_type = bf16;
  using sum_type = float;
  using session_type = TileSession;
  static constexpr int64_t MAX_HEADS = 16;

  MatrixTiles(int64_t head_dim, double alpha)
      : head_dim_(head_dim),
        width_(round_up(head_dim, STEP)),
        steps_(width_ / STEP),
        minus_alpha_log2e_(_mm512_set1_ps(static_cast<float>(-alpha * 1.4426950408889634))) {}

  void carve(Carver& carver, int64_t /*num_heads*/) {
    carver.take(queries_, QUERY_ROWS * width_);
    carver.take(keys_, STEP * width_);
    carver.take(values_, STEP * CHUNK_KEYS);
    carver.take(weights_, QUERY_ROWS * CHUNK_KEYS);
    carver.take(scores_, 2 * 4 * SUM_TILE);
    carver.take(pairs_, 2 * SUM_TILE);
  }

  int64_t sums_per_row() const { return width_; }

  // How many keys to take next. More need fewer passes over the sums, but must stay in the second-level cache.
  int64_t num_chunk_keys(int64_t /*num_heads*/) const { return CHUNK_KEYS; }

  template <typename row_t>
  void load_queries(int64_t slot, int64_t num_rows, int64_t padded_rows, const row_t& row) {
    slot_queries_ = padded_rows * width_;
    for (int64_t i = 0; i < padded_rows; i += 16) {
      load_transposed(
          [&](int64_t j) { return row(i + j); }, std::clamp<int64_t>(num_rows - i, 0, 16), head_dim_,
          queries_ + slot * slot_queries_ + i * width_);
    }
  }

  void load(const KeyRow<bf16>* rows, int64_t count, int64_t num_heads) {
    rows_ = rows;
    count_ = count;
    key_steps_ = (count + STEP - 1) / STEP;
    if (num_heads == 1) return;
    for (int64_t j = 0; j < count; ++j) fetch(rows[j].key, rows[j].key_head_stride, num_heads);
    for (int64_t j = 0; j < count; ++j) fetch(rows[j].value, rows[j].value_head_stride, num_heads);
  }

  // sums [rows, width] += SiLU(q k') v over the keys; row i sees those with diagonal + key <= i.
  void attend(int64_t slot, int64_t padded_rows, int64_t diagonal, float* sums) {
    const bf16* queries = queries_ + slot * slot_queries_;
    Block last;
    int64_t parity = 0;
    for (int64_t step = 0; step < key_steps_; ++step) {
      const int64_t first_row = std::max<int64_t>(0, diagonal + step * STEP) / 32 * 32;
      if (first_row >= padded_rows) break;
      load_keys(slot, step);
      for (int64_t row = first_row; row < padded_rows; row += 32) {
        multiply(queries + row * width_, parity, last);
        store_weights(last);
        last = {weights_ + row * CHUNK_KEYS + step * TILE, diagonal + step * STEP - row};
        parity ^= 1;
      }
    }
    if (!last.weights) return;
    for (int64_t pair = 0; pair < 16; ++pair) weigh<true>(parity ^ 1, last.shift, pair);
    store_weights(last);
    for (int64_t tile = 0; tile < 2 * steps_; tile += 2) {
      load_values(slot, tile / 2);
      for (int64_t row = 0; row < padded_rows; row += 32) {
        const int64_t seen = row + 31 - diagonal;  // the last key that the last of 32 rows sees
        if (seen < 0) continue;
        const bf16* weights = weights_ + row * CHUNK_KEYS;
        float* block_sums = sums + row * width_ + tile * SUM_TILE;
        load_sums(block_sums, 16 * width_);
        add_products(
            std::min(seen / STEP + 1, key_steps_), weights, weights + 16 * CHUNK_KEYS, values_,
            values_ + CHUNK_KEYS * 16);
        store_sums(block_sums, 16 * width_);
      }
    }
  }

  // Row i of sums, its channels in order: [width].
  void read_row(const float* sums, int64_t i, float* row) const {
    const float* tile = sums + i / 16 * width_ * 16 + i % 16 * 16;
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int64_t step = 0; step < steps_; ++step) {
      const __m512 even = _mm512_loadu_ps(tile + 2 * step * SUM_TILE);
      const __m512 odd = _mm512_loadu_ps(tile + (2 * step + 1) * SUM_TILE);
      _mm512_storeu_ps(row + step * STEP, _mm512_permutex2var_ps(even, low, odd));
      _mm512_storeu_ps(row + step * STEP + 16, _mm512_permutex2var_ps(even, high, odd));
    }
  }

 private:
  static constexpr int64_t CHUNK_KEYS = 192;

  // 32 keys and 32 rows: where their weights go, or null. Row i sees key p of the block where shift + p <= i.
  struct Block {
    bf16* weights = nullptr;
    int64_t shift = 0;
  };

  // Brings a row of all heads into the second-level cache.
  void fetch(const bf16* row, int64_t head_stride, int64_t num_heads) const {
    for (int64_t head = 0; head < num_heads; ++head) {
      for (int64_t channel = 0; channel < head_dim_; channel += STEP) {
        _mm_prefetch(row + head * head_stride + channel, _MM_HINT_T1);
      }
    }
  }

  // The keys of a step as left operands: [2][steps] tiles. Zeros stand behind the last key: their scores are zero, and
  // so are their weights.
  void load_keys(int64_t slot, int64_t step) {
    for (int64_t i = 0; i < STEP; ++i) {
      const int64_t j = step * STEP + i;
      const bf16* key = j < count_ ? rows_[j].key + slot * rows_[j].key_head_stride : nullptr;
      bf16* tile = keys_ + i / 16 * steps_ * TILE + i % 16 * STEP;
      for (int64_t c = 0; c < steps_; ++c) {
        _mm512_store_si512(tile + c * TILE, channels(key, c));
      }
    }
  }

  // 32 channels of all values as right operands: [2][key steps] tiles, of the even channels and of the odd ones, so that
  // nothing moves between lanes. `read_row` puts the channels in order again.
  void load_values(int64_t slot, int64_t step) {
    for (int64_t j = 0; j < key_steps_ * STEP; j += 2) {
      const __m512i a = channels(value(slot, j), step), b = channels(value(slot, j + 1), step);
      bf16* tile = values_ + j * 16;
      _mm512_store_si512(tile, _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)));
      _mm512_store_si512(tile + CHUNK_KEYS * 16, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
    }
  }

  const bf16* value(int64_t slot, int64_t j) const {
    return j < count_ ? rows_[j].value + slot * rows_[j].value_head_stride : nullptr;
  }

  __m512i channels(const bf16* row, int64_t step) const {
    return row ? load_channels(row, step * STEP, head_dim_) : _mm512_setzero_si512();
  }

  // Scores of the loaded keys and 32 rows; beside it, the weights of the block before, whose scores are the other ones.
  void multiply(const bf16* queries, int64_t parity, const Block& last) {
    switch (steps_) {  // the usual widths get loops of known length
      case 2: return multiply_of(std::integral_constant<int64_t, 2>(), queries, parity, last);
      case 4: return multiply_of(std::integral_constant<int64_t, 4>(), queries, parity, last);
      case 8: return multiply_of(std::integral_constant<int64_t, 8>(), queries, parity, last);
      default: return multiply_of(steps_, queries, parity, last);
    }
  }

  template <typename steps_t>
  void multiply_of(steps_t steps, const bf16* queries, int64_t parity, const Block& last) {
    const int64_t right = steps * TILE;
    zero_sums();
    if (!last.weights) {
      add_products(steps, keys_, keys_ + right, queries, queries + right);
    } else if (last.shift + STEP - 1 > 0) {
      add_products(steps, keys_, keys_ + right, queries, queries + right, [&](int64_t i) {
        weigh_part<true>(i, 2 * steps, parity ^ 1, last.shift);
      });
    } else {
      add_products(steps, keys_, keys_ + right, queries, queries + right, [&](int64_t i) {
        weigh_part<false>(i, 2 * steps, parity ^ 1, 0);
      });
    }
    store_sums(scores_ + parity * 4 * SUM_TILE, 2 * SUM_TILE);
  }

  // Part i of so many of a block's weights.
  template <bool masked>
  inline __attribute__((always_inline)) void weigh_part(int64_t i, int64_t parts, int64_t parity, int64_t shift) {
    for (int64_t pair = i * 16 / parts; pair < (i + 1) * 16 / parts; ++pair) weigh<masked>(parity, shift, pair);
  }

  // The weights of keys 2 pair and 2 pair + 1 of a block, as pairs of bf16.
  template <bool masked>
  inline __attribute__((always_inline)) void weigh(int64_t parity, int64_t shift, int64_t pair) {
    const float* scores = scores_ + parity * 4 * SUM_TILE + (pair >= 8 ? 2 * SUM_TILE : 0) + 2 * (pair % 8) * 16;
    for (int64_t half = 0; half < 2; ++half) {
      __m512 first = silu_for_bf16(_mm512_load_ps(scores + half * SUM_TILE), minus_alpha_log2e_);
      __m512 second = silu_for_bf16(_mm512_load_ps(scores + half * SUM_TILE + 16), minus_alpha_log2e_);
      if constexpr (masked) {
        first = _mm512_maskz_mov_ps(rows_from(shift + 2 * pair - 16 * half), first);
        second = _mm512_maskz_mov_ps(rows_from(shift + 2 * pair + 1 - 16 * half), second);
      }
      _mm512_store_si512(pairs_ + half * SUM_TILE + pair * 16, to_pairs(first, second));
    }
  }

  // Of 16 rows those from `row` on.
  static __mmask16 rows_from(int64_t row) {
    return row <= 0 ? 0xffff : row >= 16 ? 0 : static_cast<__mmask16>(0xffff << row);
  }

  // Stores a block's weights as left operands.
  void store_weights(const Block& block) const {
    if (!block.weights) return;
    transpose_tile(reinterpret_cast<const bf16*>(pairs_), block.weights);
    transpose_tile(reinterpret_cast<const bf16*>(pairs_ + SUM_TILE), block.weights + 16 * CHUNK_KEYS);
  }

  int64_t head_dim_, width_, steps_;
  __m512 minus_alpha_log2e_;
  const KeyRow<bf16>* rows_ = nullptr;
  int64_t count_ = 0, key_steps_ = 0, slot_queries_ = 0;
  // Tiles: [slots][rows / 16][steps]; [2][steps]; [2][key steps]; [rows / 16][key steps].
  bf16 *queries_, *keys_, *values_, *weights_;
  float* scores_;                               // two blocks, [2][2 x 2 tiles]
  uint32_t* pairs_;                             // [2][16 pairs of keys][16 rows]
};

}  // namespace hstu

#endif
