// Attention of many rows in tiles: what they cost is products.
#pragma once

#include "matrix_rows.h"

#ifdef HSTU_BF16_TILES

namespace hstu {

// Keys are packed as right operands, for which there are rows enough: so scores come out rows by keys, as left operands
// of the values, and become weights without being turned round. 32 rows meet all keys of a chunk and then their values;
// their weights and queries stay in the first-level cache, which keys and values pass by. A block's SiLU runs beside the
// next block's products, because vectors and matrices are different units.
class ManyRows : public MatrixRows {
 public:
  using MatrixRows::MatrixRows;
  static constexpr int64_t LEAST_ROWS = 256;

  // Keys of a chunk. Sums are loaded and stored for so many; packed, with their values, they must stay in the
  // second-level cache.
  static constexpr int64_t CHUNK_KEYS = 512;

  // Elements of a packed chunk: keys as [keys / 16][steps] tiles and, behind them, values as [2 steps][key steps].
  int64_t chunk_size() const { return CHUNK_KEYS * width_ + 2 * steps_ * VALUES_APART; }

  void carve(Carver& carver) {
    carver.take(queries_, QUERY_ROWS * width_);
    carver.take(weights_, 2 * WEIGHTS_APART);
    carver.take(scores_, 2 * 4 * SUM_TILE);
  }

  template <typename row_t>
  void load_queries(int64_t head, int64_t num_rows, int64_t padded_rows, const row_t& row) {
    num_rows_ = num_rows;
    for (int64_t i = 0; i < padded_rows; ++i) {
      const bf16* query = i < num_rows ? row(i) : nullptr;
      bf16* tile = queries_ + (head * padded_rows + i / 16 * 16) * width_ + i % 16 * STEP;
      for (int64_t step = 0; step < steps_; ++step) _mm512_store_si512(tile + step * TILE, channels(query, step));
    }
  }

  // Packs the keys and values of some heads of these rows, each head's into a chunk of its own, so many elements apart.
  // Rows are read in the order in which they lie, and the next ones fetched. Zeros stand behind the last one.
  void pack(const KeyRow<bf16>* rows, int64_t count, int64_t num_heads, bf16* chunks, int64_t chunks_apart) const {
    for (int64_t j = 0; j < round_up(count, STEP); j += 16) {
      const int64_t here = std::clamp<int64_t>(count - j, 0, 16), next = std::clamp<int64_t>(count - j - 16, 0, 16);
      Ahead ahead(rows + j + here, next, &KeyRow<bf16>::key, num_heads * head_dim_);
      for (int64_t head = 0; head < num_heads; ++head) {
        const auto row = [&](int64_t i) {
          ahead();
          return rows[j + i].key + head * rows[j + i].key_head_stride;
        };
        load_transposed(row, here, head_dim_, chunks + head * chunks_apart + j * width_);
      }
    }
    constexpr int64_t ROWS_AHEAD = 4;
    for (int64_t pair = 0; pair < round_up(count, STEP) / 2; ++pair) {
      const int64_t next = std::clamp<int64_t>(count - 2 * pair - ROWS_AHEAD, 0, 2);
      Ahead ahead(rows + (next ? 2 * pair + ROWS_AHEAD : 0), next, &KeyRow<bf16>::value, num_heads * head_dim_);
      for (int64_t head = 0; head < num_heads; ++head) {
        bf16* values = chunks + head * chunks_apart + CHUNK_KEYS * width_;
        load_pair(rows, count, pair, head, VALUES_APART, values, [&] { ahead(); });
      }
    }
  }

  // sums [rows, width] = SiLU(q k') v of a head's queries over keys [begin, end) of a chunk, or that is added; row i sees
  // those with diagonal + key <= i, key counting from `begin`. next: what comes after this chunk, or null.
  void attend(
      int64_t head, const bf16* chunk, int64_t begin, int64_t end, const bf16* next, int64_t padded_rows,
      int64_t diagonal, float* sums, bool add) {
    start(end - begin, padded_rows, diagonal);
    keys_ = chunk + begin * width_;
    values_ = chunk + CHUNK_KEYS * width_ + begin / STEP * TILE;
    next_ = next == nullptr ? Next{chunk, 0} : Next{next, STEP};
    Block last;
    for (int64_t row = 0; row < padded_rows; row += ROW_STEP) {
      const int64_t key_steps = num_seen(row);
      if (key_steps == 0 && !add) std::fill_n(sums + row * width_, ROW_STEP * width_, 0.0f);
      for (int64_t step = 0; step < key_steps; ++step) {
        const Block block{head, row, step, diagonal + step * STEP - row, 1 - last.parity, true};
        multiply(block, last);
        if (last.exists && last.row != row) finish(last, sums, add);
        last = block;
      }
    }
    if (!last.exists) return;
    for (int64_t i = 0; i < ROW_STEP; ++i) scores_of(last).weigh<true>(i);
    finish(last, sums, add);
  }

 private:
  // An odd number of tiles between columns of values, or their rows would meet in few cache sets.
  static constexpr int64_t WEIGHTS_APART = CHUNK_KEYS / STEP * TILE, VALUES_APART = WEIGHTS_APART + TILE;

  // Scores of a block; beside it, the weights of the block before.
  void multiply(const Block& block, const Block& last) {
    with_steps([&](auto steps) { multiply_of(steps, block, last); });
  }

  template <typename steps_t>
  void multiply_of(steps_t steps, const Block& block, const Block& last) {
    const bf16* queries = queries_ + (block.head * padded_rows_ + block.row) * width_;
    const bf16* keys = keys_ + block.step * STEP * width_;
    TileSums sums{scores_ + block.parity * 4 * SUM_TILE};
    sums.rows = num_rows_ - block.row;
    const Scores scores = scores_of(last);
    Next next = next_;
    const auto add = [&](const auto& weigh_row) __attribute__((always_inline)) {
      multiply_steps<Reuse::left>(
          steps, {queries, queries + steps * TILE}, {keys, keys + steps * TILE}, sums,
          [&](int64_t i) __attribute__((always_inline)) {
            for (int64_t row = i * 16 / steps; row < (i + 1) * 16 / steps; ++row) weigh_row(row);
          },
          Lines<Next>{next, 1});
    };
    if (!last.exists) {
      add([](int64_t) {});
    } else if (last.masked()) {
      add([&](int64_t i) __attribute__((always_inline)) { scores.weigh<true>(i); });
    } else {
      add([&](int64_t i) __attribute__((always_inline)) { scores.weigh<false>(i); });
    }
    next_ = next;
  }

  // The scores of a block and where its weights belong. No members of `ManyRows`, nor is what is fetched beside products:
  // those the compiler would read again after every store.
  struct Scores {
    const float* scores;
    bf16* weights;
    int64_t shift;
    __m512 minus_alpha_log2e;

    // The weights of row i, as a row of a left operand.
    template <bool masked>
    inline __attribute__((always_inline)) void weigh(int64_t i) const {
      const float* row = scores + i / 16 * 2 * SUM_TILE + i % 16 * 16;
      __m512 low = silu_for_bf16(_mm512_load_ps(row), minus_alpha_log2e);
      __m512 high = silu_for_bf16(_mm512_load_ps(row + SUM_TILE), minus_alpha_log2e);
      if constexpr (masked) {
        const int64_t seen = i - shift + 1;  // keys of the block
        low = _mm512_mask_mov_ps(low, from(seen), _mm512_setzero_ps());
        high = _mm512_mask_mov_ps(high, from(seen - 16), _mm512_setzero_ps());
      }
      _mm512_store_si512(weights + i / 16 * WEIGHTS_APART + i % 16 * STEP, round_to_bf16(low, high));
    }
  };

  Scores scores_of(const Block& block) const {
    return {
        scores_ + block.parity * 4 * SUM_TILE, weights_ + block.step * TILE, block.shift, minus_alpha_log2e_};
  }

  // Adds the values up by the weights of 32 rows, of which this is the last block.
  void finish(const Block& block, float* sums, bool add) {
    Next next = next_;
    add_values<Reuse::left>(
        block.row, block.step + 1, weights_, WEIGHTS_APART, values_, VALUES_APART, sums + block.row * width_, add,
        Lines<Next>{next, 1});
    next_ = next;
  }

  // The next chunk, brought closer one line beside every second product: all of it by 512 rows that see all keys, a part
  // by fewer. Where there is none, one line of this chunk again and again, which costs less than to ask.
  struct Next {
    const bf16* at = nullptr;
    int64_t step = 0;

    void operator()() {
      _mm_prefetch(at, _MM_HINT_T1);
      at += step;
    }
  };

  bf16 *queries_, *weights_;  // tiles: [heads][rows / 16][steps]; of 32 rows [2][key steps]
  float* scores_;             // of two blocks, [2][2 x 2 tiles]
  const bf16 *keys_ = nullptr, *values_ = nullptr;
  Next next_;
};

}  // namespace hstu

#endif
