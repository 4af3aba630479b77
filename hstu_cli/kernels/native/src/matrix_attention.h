// Attention of some heads of a sequence in matrix units: scores, SiLU and the sum of values, block by block.
#pragma once

#include "matrix_tiles.h"

#ifdef HSTU_MATRIX_TILES

namespace hstu {

// Keys and values are loaded for all heads of a task at once, row by row as they lie in memory. Scores are computed
// transposed (keys by rows), so that keys and values need no more than copying and interleaving; a block's SiLU runs
// beside the next block's products, because vectors and matrices are different units.
class MatrixTiles {
 public:
  using scalar_type = bf16;
  using sum_type = float;
  using session_type = TileSession;
  static constexpr int64_t MAX_HEADS = 16, MOST_KEYS = 256;

  MatrixTiles(int64_t head_dim, double alpha)
      : head_dim_(head_dim),
        width_(round_up(head_dim, STEP)),
        steps_(width_ / STEP),
        minus_alpha_log2e_(_mm512_set1_ps(static_cast<float>(-alpha * 1.4426950408889634))) {}

  void carve(Carver& carver, int64_t num_heads) {
    const int64_t loaded = std::max(num_heads * MANY_HEADS_KEYS, MOST_KEYS) * width_;
    carver.take(queries_, QUERY_ROWS * width_);
    carver.take(keys_, loaded);
    carver.take(values_, loaded);
    carver.take(weights_, 2 * MOST_KEYS / STEP * TILE);
    carver.take(scores_, 2 * 4 * SUM_TILE);
    carver.take(pairs_, 2 * SUM_TILE);
  }

  int64_t sums_per_row() const { return width_; }

  // How many keys to load next. More need fewer passes over the sums, but must stay in the second-level cache.
  int64_t num_chunk_keys(int64_t num_heads) const { return num_heads == 1 ? MOST_KEYS : MANY_HEADS_KEYS; }

  template <typename row_t>
  void load_queries(int64_t slot, int64_t num_rows, int64_t padded_rows, const row_t& row) {
    slot_queries_ = padded_rows * width_;
    for (int64_t i = 0; i < padded_rows; i += 16) {
      load_transposed(
          [&](int64_t j) { return row(i + j); }, std::clamp<int64_t>(num_rows - i, 0, 16), head_dim_,
          queries_ + slot * slot_queries_ + i * width_);
    }
  }

  // Zeros stand behind the last key: their scores are zero, and so are their weights.
  void load(const KeyRow<bf16>* rows, int64_t count, int64_t num_heads) {
    key_steps_ = (count + STEP - 1) / STEP;
    slot_keys_ = key_steps_ * STEP * width_;
    const KeyRow<bf16> none{nullptr, nullptr, 0, 0};
    auto row = [&](int64_t j) -> const KeyRow<bf16>& { return j < count ? rows[j] : none; };
    for (int64_t j = 0; j < key_steps_ * STEP; ++j) {
      load_key(row(j), num_heads, keys_ + j / 16 * steps_ * TILE + j % 16 * STEP);
    }
    for (int64_t j = 0; j < key_steps_ * STEP; j += 2) {
      load_values(row(j), row(j + 1), num_heads, values_ + j / STEP * TILE + j % STEP / 2 * STEP);
    }
  }

  // sums [rows, width] += SiLU(q k') v over the loaded keys; row i sees those with diagonal + key <= i.
  void attend(int64_t slot, int64_t padded_rows, int64_t diagonal, float* sums) {
    const bf16 *queries = queries_ + slot * slot_queries_, *keys = keys_ + slot * slot_keys_;
    const bf16* values = values_ + slot * slot_keys_;
    Block last;
    int64_t parity = 0;
    for (int64_t row = 0; row < padded_rows; row += 2 * 16) {
      const int64_t seen = row + 31 - diagonal;  // the last key that the block's last row sees
      const int64_t key_steps = seen < 0 ? 0 : std::min(seen / STEP + 1, key_steps_);
      for (int64_t step = 0; step < key_steps; ++step) {
        multiply(keys + step * 2 * steps_ * TILE, queries + row * width_, parity, last);
        settle(last, values, sums);
        last = {row, step, key_steps, diagonal + step * STEP - row};
        parity ^= 1;
      }
    }
    if (last.key_steps) {
      for (int64_t pair = 0; pair < 16; ++pair) weigh<true>(parity ^ 1, last.shift, pair);
      settle(last, values, sums);
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
  static constexpr int64_t MANY_HEADS_KEYS = 160;

  // A key of each head as a row of left operands.
  void load_key(const KeyRow<bf16>& row, int64_t num_heads, bf16* tile) const {
    for (int64_t head = 0; head < num_heads; ++head) {
      const bf16* key = row.key ? row.key + head * row.key_head_stride : nullptr;
      for (int64_t step = 0; step < steps_; ++step) {
        _mm512_store_si512(tile + head * slot_keys_ + step * TILE, channels(key, step));
      }
    }
  }

  // The values of two keys as a row of right operands: pairs, those of even channels in one tile and of odd ones in the
  // next, so that nothing moves between lanes. `read_row` puts the channels in order again.
  void load_values(const KeyRow<bf16>& first, const KeyRow<bf16>& second, int64_t num_heads, bf16* tile) const {
    for (int64_t head = 0; head < num_heads; ++head) {
      const bf16* first_value = first.value ? first.value + head * first.value_head_stride : nullptr;
      const bf16* second_value = second.value ? second.value + head * second.value_head_stride : nullptr;
      bf16* target = tile + head * slot_keys_;
      for (int64_t step = 0; step < steps_; ++step) {
        const __m512i a = channels(first_value, step), b = channels(second_value, step);
        _mm512_store_si512(target, _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)));
        target += key_steps_ * TILE;
        _mm512_store_si512(target, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
        target += key_steps_ * TILE;
      }
    }
  }

  __m512i channels(const bf16* row, int64_t step) const {
    return row ? load_channels(row, step * STEP, head_dim_) : _mm512_setzero_si512();
  }

  // 32 rows from `row` on and the 32 keys of a step. Row i sees key p of it where shift + p <= i.
  struct Block {
    int64_t row = 0, step = 0, key_steps = 0, shift = 0;
  };

  // Scores of 32 keys and 32 rows; beside it, the weights of the block before, whose scores are the other ones.
  void multiply(const bf16* keys, const bf16* queries, int64_t parity, const Block& last) {
    switch (steps_) {  // the usual widths get loops of known length
      case 2: return multiply_of(std::integral_constant<int64_t, 2>(), keys, queries, parity, last);
      case 4: return multiply_of(std::integral_constant<int64_t, 4>(), keys, queries, parity, last);
      case 8: return multiply_of(std::integral_constant<int64_t, 8>(), keys, queries, parity, last);
      default: return multiply_of(steps_, keys, queries, parity, last);
    }
  }

  template <typename steps_t>
  void multiply_of(steps_t steps, const bf16* keys, const bf16* queries, int64_t parity, const Block& last) {
    const int64_t right = steps * TILE;
    zero_sums();
    if (!last.key_steps) {
      add_products(steps, keys, keys + right, queries, queries + right);
    } else if (last.shift + STEP - 1 > 0) {
      add_products(steps, keys, keys + right, queries, queries + right, [&](int64_t i) {
        weigh_part<true>(i, 2 * steps, parity ^ 1, last.shift);
      });
    } else {
      add_products(steps, keys, keys + right, queries, queries + right, [&](int64_t i) {
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

  // Stores a block's weights as left operands and, behind the last step of its rows, adds their values up.
  void settle(const Block& block, const bf16* values, float* sums) {
    if (!block.key_steps) return;
    for (int64_t half = 0; half < 2; ++half) {
      transpose_tile(
          reinterpret_cast<const bf16*>(pairs_ + half * SUM_TILE), weights_ + (half * key_steps_ + block.step) * TILE);
    }
    if (block.step + 1 < block.key_steps) return;
    float* row_sums = sums + block.row * width_;
    const int64_t below = 16 * width_, right = key_steps_ * TILE;
    for (int64_t tile = 0; tile < 2 * steps_; tile += 2) {
      load_sums(row_sums + tile * SUM_TILE, below);
      add_products(
          block.key_steps, weights_, weights_ + right, values + tile * right, values + (tile + 1) * right);
      store_sums(row_sums + tile * SUM_TILE, below);
    }
  }

  int64_t head_dim_, width_, steps_;
  __m512 minus_alpha_log2e_;
  int64_t slot_queries_ = 0, slot_keys_ = 0, key_steps_ = 0;
  // Tiles: [slots][rows / 16][steps]; the same of keys; [slots][2 steps][key steps]; [2][key steps].
  bf16 *queries_, *keys_, *values_, *weights_;
  float* scores_;    // of two blocks, [2][2 x 2 tiles]
  uint32_t* pairs_;  // [2][16 pairs of keys][16 rows]
};

}  // namespace hstu

#endif
