// Gradients of attention's inputs, of one head of a sequence, in bf16 tiles: scores again, block by block.
#pragma once

#include "matrix_tiles.h"

#ifdef HSTU_BF16_TILES

#include "plan.h"
#include "scratch.h"

namespace hstu {

// Scores and their gradients are computed transposed (keys by rows). As they leave the products they are, two rows
// side by side, left operands of the sums over rows (gradients of keys and values) and, two keys side by side, right
// operands of the transposed sums over keys (gradients of queries): nothing moves between lanes. A block's SiLU and its
// slope are computed beside the next block's products.
class MatrixGradientTiles {
 public:
  using scalar_type = bf16;
  using sum_type = float;
  using session_type = TileSession;
  // What meets at a time: more keys need fewer passes over rows and their sums, but all must stay in the second-level
  // cache.
  static constexpr int64_t CHUNK_KEYS = 256, BLOCK_ROWS = 256;

  MatrixGradientTiles(int64_t head_dim, double alpha)
      : head_dim_(head_dim),
        width_(round_up(head_dim, STEP)),
        steps_(width_ / STEP),
        alpha_(_mm512_set1_ps(static_cast<float>(alpha))),
        minus_alpha_log2e_(_mm512_set1_ps(static_cast<float>(-alpha * 1.4426950408889634))) {}

  // Elements of a row of sums.
  int64_t width() const { return width_; }

  void carve(Carver& carver) {
    const int64_t loaded = BLOCK_ROWS * width_;
    carver.take(queries_across_, loaded);
    carver.take(queries_along_, loaded);
    carver.take(outputs_across_, loaded);
    carver.take(outputs_along_, loaded);
    carver.take(keys_, CHUNK_KEYS * width_);
    carver.take(keys_transposed_, CHUNK_KEYS * width_);
    carver.take(values_, CHUNK_KEYS * width_);
    carver.take(grad_keys_, CHUNK_KEYS * width_);
    carver.take(grad_values_, CHUNK_KEYS * width_);
    carver.take(weights_, 2 * ROW_STEPS * TILE);
    carver.take(slopes_, 2 * ROW_STEPS * TILE);
    carver.take(pairs_, ROW_STEPS * 2 * KEY_STEPS * TILE);
    carver.take(scores_, 2 * 8 * SUM_TILE);
  }

  // Queries and the gradients of their outputs; zeros stand behind the last row.
  template <typename row_t>
  void load_rows(const row_t& query, const row_t& output, int64_t count) {
    row_steps_ = (count + STEP - 1) / STEP;
    load_operand(query, count, queries_across_, queries_along_);
    load_operand(output, count, outputs_across_, outputs_along_);
  }

  // Zeros stand behind the last key: it adds nothing to any sum.
  template <typename row_t>
  void load_keys(const row_t& key, const row_t& value, int64_t count) {
    key_steps_ = (count + STEP - 1) / STEP;
    for (int64_t j = 0; j < key_steps_ * STEP; ++j) {
      const bf16 *one_key = j < count ? key(j) : nullptr, *one_value = j < count ? value(j) : nullptr;
      const int64_t at = j / 16 * steps_ * TILE + j % 16 * STEP;
      for (int64_t step = 0; step < steps_; ++step) {
        _mm512_store_si512(keys_ + at + step * TILE, channels(one_key, step));
        _mm512_store_si512(values_ + at + step * TILE, channels(one_value, step));
      }
    }
    alignas(64) bf16 even[TILE], odd[TILE];
    for (int64_t key_step = 0; key_step < key_steps_; ++key_step) {
      for (int64_t step = 0; step < steps_; ++step) {
        for (int64_t pair = 0; pair < 16; ++pair) {
          const int64_t j = pair / 8 * 16 + pair % 8 * 2;
          const bf16* tile = keys_ + ((key_step * 2 + j / 16) * steps_ + step) * TILE + j % 16 * STEP;
          interleave_rows(
              _mm512_load_si512(tile), _mm512_load_si512(tile + STEP), even + pair * STEP, odd + pair * STEP);
        }
        transpose_tile(even, keys_transposed_ + (2 * step * KEY_STEPS + key_step) * TILE);
        transpose_tile(odd, keys_transposed_ + ((2 * step + 1) * KEY_STEPS + key_step) * TILE);
      }
    }
  }

  // Adds what the loaded keys and rows are to each other. Row i sees those keys p where diagonal + p <= i; diagonal is
  // a multiple of 32. sums [rows, width]: of the queries.
  void add(int64_t diagonal, float* sums) {
    Block last;
    int64_t parity = 0;
    for (int64_t key_step = 0; key_step < key_steps_; ++key_step) {
      const int64_t own = diagonal / STEP + key_step, from = std::max<int64_t>(0, own);
      for (int64_t row_step = from; row_step < row_steps_; ++row_step) {
        multiply(key_step, row_step, parity, last);
        settle(last);
        last = {key_step, row_step, from, row_steps_, own >= 0, row_step == own};
        parity ^= 1;
      }
    }
    if (!last.row_steps) return;
    for (int64_t pair = 0; pair < 16; ++pair) weigh<true>(parity ^ 1, last, pair);
    settle(last);
    for (int64_t row_step = 0; row_step < row_steps_; ++row_step) {
      const int64_t key_steps = std::min(key_steps_, row_step + 1 - diagonal / STEP);
      if (key_steps <= 0) continue;
      add_to_queries(key_steps, pairs_ + row_step * 2 * KEY_STEPS * TILE, sums + row_step * STEP * width_);
    }
  }

  // Rows [32, width] of the sums of queries, from row 32 * step on.
  void read_queries(const float* sums, int64_t step, float* rows) const {
    alignas(64) float even[SUM_TILE], odd[SUM_TILE];
    const float* tile = sums + step * STEP * width_;
    for (int64_t column = 0; column < width_; column += STEP, tile += 4 * SUM_TILE) {
      for (int64_t half = 0; half < 2; ++half) {
        transpose_16x16(tile + half * SUM_TILE, 16, even, 16);
        transpose_16x16(tile + (2 + half) * SUM_TILE, 16, odd, 16);
        for (int64_t i = 0; i < 16; ++i) {
          store_in_order(even + i * 16, odd + i * 16, rows + (half * 16 + i) * width_ + column);
        }
      }
    }
  }

  // Rows [32, width] of the sums of keys and of values, from the loaded key 32 * step on.
  void read_keys(int64_t step, float* rows) const { read_key_sums(grad_keys_, step, rows); }
  void read_values(int64_t step, float* rows) const { read_key_sums(grad_values_, step, rows); }

 private:
  static constexpr int64_t KEY_STEPS = CHUNK_KEYS / STEP, ROW_STEPS = BLOCK_ROWS / STEP;

  // 32 keys and 32 rows of a block, of which the rows [from, row_steps) see these keys. fresh: they are the first rows
  // that do; diagonal: row i sees key p where p <= i.
  struct Block {
    int64_t key_step = 0, row_step = 0, from = 0, row_steps = 0;
    bool fresh = false, diagonal = false;
  };

  __m512i channels(const bf16* row, int64_t step) const {
    return row ? load_channels(row, step * STEP, head_dim_) : _mm512_setzero_si512();
  }

  // across: to be summed over channels, [rows / 16][steps] tiles; along: over rows, of which i and i + 16 are a pair,
  // [steps][even, odd channels][rows / 32].
  template <typename row_t>
  void load_operand(const row_t& row, int64_t count, bf16* across, bf16* along) const {
    for (int64_t i = 0; i < round_up(count, STEP); i += 16) {
      load_transposed(
          [&](int64_t j) { return row(i + j); }, std::clamp<int64_t>(count - i, 0, 16), head_dim_,
          across + i * width_);
    }
    for (int64_t i = 0; i < count; i += STEP) {
      bf16* target = along + i / STEP * TILE;
      for (int64_t j = 0; j < 16; ++j) {
        const bf16* first = i + j < count ? row(i + j) : nullptr;
        const bf16* second = i + j + 16 < count ? row(i + j + 16) : nullptr;
        for (int64_t step = 0; step < steps_; ++step) {
          bf16* tile = target + 2 * step * ROW_STEPS * TILE + j * STEP;
          interleave_rows(channels(first, step), channels(second, step), tile, tile + ROW_STEPS * TILE);
        }
      }
    }
  }

  // Scores of 32 keys and 32 rows and the gradients of their weights; beside it, what follows from those of the block
  // before.
  void multiply(int64_t key_step, int64_t row_step, int64_t parity, const Block& last) {
    switch (steps_) {  // the usual widths get loops of known length
      case 2: return multiply_of(std::integral_constant<int64_t, 2>(), key_step, row_step, parity, last);
      case 4: return multiply_of(std::integral_constant<int64_t, 4>(), key_step, row_step, parity, last);
      case 8: return multiply_of(std::integral_constant<int64_t, 8>(), key_step, row_step, parity, last);
      default: return multiply_of(steps_, key_step, row_step, parity, last);
    }
  }

  template <typename steps_t>
  void multiply_of(steps_t steps, int64_t key_step, int64_t row_step, int64_t parity, const Block& last) {
    const bf16 *keys = keys_ + key_step * STEP * width_, *values = values_ + key_step * STEP * width_;
    const bf16 *queries = queries_across_ + row_step * STEP * width_;
    const bf16 *outputs = outputs_across_ + row_step * STEP * width_;
    float* scores = scores_ + parity * 8 * SUM_TILE;
    const auto weigh_nothing = [](int64_t) {};
    const auto weigh_masked = [&](int64_t i) { weigh_part<true>(i, 4 * steps, parity ^ 1, last); };
    const auto weigh_all = [&](int64_t i) { weigh_part<false>(i, 4 * steps, parity ^ 1, last); };
    if (!last.row_steps) {
      products(steps, keys, queries, scores, weigh_nothing);
      products(steps, values, outputs, scores + 4 * SUM_TILE, weigh_nothing);
    } else if (last.diagonal) {
      products(steps, keys, queries, scores, weigh_masked);
      products(steps, values, outputs, scores + 4 * SUM_TILE, [&](int64_t i) { weigh_masked(2 * steps + i); });
    } else {
      products(steps, keys, queries, scores, weigh_all);
      products(steps, values, outputs, scores + 4 * SUM_TILE, [&](int64_t i) { weigh_all(2 * steps + i); });
    }
  }

  template <typename steps_t, typename beside_t>
  static inline __attribute__((always_inline)) void products(
      steps_t steps, const bf16* left, const bf16* right, float* results, const beside_t& beside) {
    multiply_steps(steps, {left, left + steps * TILE}, {right, right + steps * TILE}, {results}, beside);
  }

  // Part i of so many of a block's weights.
  template <bool masked>
  inline __attribute__((always_inline)) void weigh_part(int64_t i, int64_t parts, int64_t parity, const Block& block) {
    for (int64_t pair = i * 16 / parts; pair < (i + 1) * 16 / parts; ++pair) weigh<masked>(parity, block, pair);
  }

  // Scores x of 16 rows become weights x * sigmoid(alpha x), the weights' gradients those of alpha x.
  inline __attribute__((always_inline)) void differentiate(__m512& x, __m512& grad) const {
    const __m512 t = _mm512_mul_ps(x, minus_alpha_log2e_);
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 gate = _mm512_rcp14_ps(_mm512_add_ps(exp2_for_bf16(t), one));
    x = _mm512_mul_ps(x, gate);
    const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(x, alpha_), _mm512_sub_ps(one, gate), gate);
    grad = _mm512_mul_ps(grad, slope);
  }

  // Keys 2 pair and 2 pair + 1 of a block; masked: it may be on the diagonal.
  template <bool masked>
  inline __attribute__((always_inline)) void weigh(int64_t parity, const Block& block, int64_t pair) {
    const int64_t key = 2 * pair % 16, half = pair / 8;
    const float* scores = scores_ + parity * 8 * SUM_TILE + half * 2 * SUM_TILE + key * 16;
    __m512 weights[4], grads[4];  // [key][half of the rows]
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t at = i / 2 * 16 + i % 2 * SUM_TILE;
      weights[i] = _mm512_load_ps(scores + at);
      grads[i] = _mm512_load_ps(scores + 4 * SUM_TILE + at);
      differentiate(weights[i], grads[i]);
      if constexpr (masked) {
        if (block.diagonal) {
          const __mmask16 seen = rows_from(2 * pair + i / 2 - i % 2 * 16);
          weights[i] = _mm512_maskz_mov_ps(seen, weights[i]);
          grads[i] = _mm512_maskz_mov_ps(seen, grads[i]);
        }
      }
    }
    const int64_t left = (half * ROW_STEPS + block.row_step) * TILE + key * STEP;
    _mm512_store_si512(weights_ + left, to_pairs(weights[0], weights[1]));
    _mm512_store_si512(weights_ + left + STEP, to_pairs(weights[2], weights[3]));
    _mm512_store_si512(slopes_ + left, to_pairs(grads[0], grads[1]));
    _mm512_store_si512(slopes_ + left + STEP, to_pairs(grads[2], grads[3]));
    bf16* right = pairs_ + (block.row_step * 2 * KEY_STEPS + block.key_step) * TILE + pair * STEP;
    _mm512_store_si512(right, to_pairs(grads[0], grads[2]));
    _mm512_store_si512(right + KEY_STEPS * TILE, to_pairs(grads[1], grads[3]));
  }

  // Of 16 rows those from `row` on.
  static __mmask16 rows_from(int64_t row) {
    return row <= 0 ? 0xffff : row >= 16 ? 0 : static_cast<__mmask16>(0xffff << row);
  }

  // Behind the last rows of a block that see some keys: adds up what these rows are to the keys.
  void settle(const Block& block) {
    if (!block.row_steps || block.row_step + 1 < block.row_steps) return;
    const int64_t at = block.from * TILE, below = ROW_STEPS * TILE;
    const bf16 *queries = queries_along_ + at, *outputs = outputs_along_ + at;
    for (int64_t step = 0; step < steps_; ++step, queries += 2 * below, outputs += 2 * below) {
      const int64_t place = block.key_step * STEP * width_ + step * 4 * SUM_TILE;
      add_to_keys(block, weights_ + at, outputs, grad_values_ + place);
      add_to_keys(block, slopes_ + at, queries, grad_keys_ + place);
    }
  }

  void add_to_keys(const Block& block, const bf16* left, const bf16* right, float* sums) const {
    const int64_t below = ROW_STEPS * TILE;
    multiply_steps(block.row_steps - block.from, {left, left + below}, {right, right + below}, {sums, !block.fresh});
  }

  // sums [2 steps][2] tiles, channels by rows.
  void add_to_queries(int64_t key_steps, const bf16* pairs, float* sums) const {
    const int64_t below = KEY_STEPS * TILE;
    const bf16* left = keys_transposed_;
    for (int64_t step = 0; step < steps_; ++step, left += 2 * below, sums += 4 * SUM_TILE) {
      multiply_steps(key_steps, {left, left + below}, {pairs, pairs + below}, {sums, true});
    }
  }

  void read_key_sums(const float* sums, int64_t step, float* rows) const {
    const float* tile = sums + step * STEP * width_;
    for (int64_t column = 0; column < width_; column += STEP, tile += 4 * SUM_TILE) {
      for (int64_t i = 0; i < STEP; ++i) {
        const float* even = tile + i / 16 * 2 * SUM_TILE + i % 16 * 16;
        store_in_order(even, even + SUM_TILE, rows + i * width_ + column);
      }
    }
  }

  // 16 even and 16 odd channels as 32.
  static void store_in_order(const float* even, const float* odd, float* row) {
    const __m512 a = _mm512_load_ps(even), b = _mm512_load_ps(odd);
    _mm512_storeu_ps(row, in_order<0>(a, b));
    _mm512_storeu_ps(row + 16, in_order<1>(a, b));
  }

  int64_t head_dim_, width_, steps_;
  __m512 alpha_, minus_alpha_log2e_;
  int64_t key_steps_ = 0, row_steps_ = 0;
  bf16 *queries_across_, *queries_along_, *outputs_across_, *outputs_along_;  // see load_operand
  bf16 *keys_, *values_;             // [keys / 16][steps] tiles
  bf16* keys_transposed_;            // [steps][even, odd channels][key steps]
  float *grad_keys_, *grad_values_;  // [key steps][steps][2 x 2] tiles: 16 keys by even or odd channels
  bf16 *weights_, *slopes_;          // of 32 keys: [2][row steps] tiles
  bf16* pairs_;                      // [row steps][2][key steps] tiles: pairs of keys by rows
  float* scores_;                    // of two blocks: scores and gradients of the weights, 2 x 2 tiles each
};

}  // namespace hstu

#endif
