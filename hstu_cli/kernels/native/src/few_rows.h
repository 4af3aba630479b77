// Attention of few rows in tiles: what they cost is the way of keys and values from memory.
#pragma once

#include "matrix_rows.h"

#ifdef HSTU_BF16_TILES

namespace hstu {

// Scores are computed transposed (keys by rows): so keys are left operands, which pages hold as they are, and values
// need no more than interleaving. Rows meet the keys first, all heads of them, and then the values: each comes from
// memory in the order in which it lies there. A block's SiLU runs beside the next block's products, because vectors and
// matrices are different units.
class FewRows : public MatrixRows {
 public:
  using MatrixRows::MatrixRows;
  static constexpr int64_t MOST_KEYS = 256;

  void carve(Carver& carver, int64_t num_heads) {
    carver.take(queries_, QUERY_ROWS * width_);
    carver.take(keys_, std::max(num_heads * MANY_HEADS_KEYS, MOST_KEYS) * width_);
    carver.take(left_, std::max(num_heads * MANY_HEADS_KEYS, MOST_KEYS) / STEP);
    carver.take(values_, (MOST_KEYS + STEP) * width_);
    carver.take(weights_, QUERY_ROWS * MOST_KEYS);
    carver.take(scores_, 2 * 4 * SUM_TILE);
    carver.take(pairs_, 2 * SUM_TILE);
  }

  // How many keys to take next. More need fewer passes over the sums, but what they need must stay in the second-level
  // cache.
  int64_t num_chunk_keys(int64_t num_heads) const { return num_heads == 1 ? MOST_KEYS : MANY_HEADS_KEYS; }

  template <typename row_t>
  void load_queries(int64_t head, int64_t num_rows, int64_t padded_rows, const row_t& row) {
    num_rows_ = num_rows;
    for (int64_t i = 0; i < padded_rows; i += 16) {
      load_transposed(
          [&](int64_t j) { return row(i + j); }, std::clamp<int64_t>(num_rows - i, 0, 16), head_dim_,
          queries_ + (head * padded_rows + i) * width_);
    }
  }

  // sums [heads, rows, width] = SiLU(q k') v over these keys, or that is added; row i sees those with
  // diagonal + key <= i.
  void attend(const Keys<bf16>& keys, int64_t padded_rows, int64_t diagonal, float* sums, bool add) {
    start(keys.count, padded_rows, diagonal);
    const int64_t values_apart = (key_steps_ | 1) * TILE;  // odd, or rows of tiles would meet in few cache sets
    find_keys(keys.rows, keys.count, keys.num_heads);
    fetch_ahead(keys.rows, keys.count, &KeyRow<bf16>::value, keys.num_heads);
    Block last;
    for (int64_t head = 0; head < keys.num_heads; ++head) {
      for (int64_t row = 0; row < padded_rows; row += ROW_STEP) {
        const int64_t key_steps = num_seen(row);
        for (int64_t step = 0; step < key_steps; ++step) {
          const Block block{head, row, step, diagonal + step * STEP - row, 1 - last.parity, true};
          multiply(block, last);
          settle(last);
          last = block;
        }
      }
    }
    for (int64_t pair = 0; pair < 16 && last.exists; ++pair) scores_of(last).weigh<true>(pair);
    settle(last);
    fetch_ahead(keys.next_rows, keys.next_count, &KeyRow<bf16>::key, keys.num_heads);
    for (int64_t head = 0; head < keys.num_heads; ++head) {
      for (int64_t pair = 0; pair < 16 * key_steps_; ++pair) {
        load_pair(keys.rows, keys.count, pair, head, values_apart, values_, [] {});
      }
      for (int64_t row = 0; row < padded_rows; row += ROW_STEP) {
        add_values<Reuse::both>(
            row, num_seen(row), weights_of(head, row), key_steps_ * TILE, values_, values_apart,
            sums + (head * padded_rows + row) * width_, add, Lines<Ahead>{ahead_, lines_beside(lines_wanted_)});
      }
    }
  }

 private:
  static constexpr int64_t MANY_HEADS_KEYS = 160;

  // What comes after the products of a chunk with all its keys, or with all its values, is fetched beside them.
  void fetch_ahead(const KeyRow<bf16>* rows, int64_t count, const bf16* KeyRow<bf16>::*part, int64_t num_heads) {
    const int64_t half_steps = 2 * num_heads * (padded_rows_ / ROW_STEP) * key_steps_ * steps_;
    ahead_ = Ahead(rows, count, part, num_heads * head_dim_);
    lines_wanted_ = (ahead_.num_lines() + half_steps - 1) / std::max<int64_t>(half_steps, 1);
  }

  // Takes a step's keys where they lie if they do so evenly, and copies the others.
  void find_keys(const KeyRow<bf16>* rows, int64_t count, int64_t num_heads) {
    for (int64_t step = 0; step < key_steps_; ++step) {
      const KeyRow<bf16>* keys = rows + step * STEP;
      const int64_t here = std::min(count - step * STEP, STEP);
      const int64_t stride = here == STEP ? distance(keys) : 0;
      const bool even = stride && distance(keys + 16) == stride;
      for (int64_t head = 0; head < num_heads; ++head) {
        Operands& left = left_[head * key_steps_ + step];
        if (even) {
          left = {
              keys[0].key + head * keys[0].key_head_stride, keys[16].key + head * keys[16].key_head_stride, STEP, stride};
        } else {
          bf16* copy = keys_ + (head * key_steps_ + step) * STEP * width_;
          copy_keys(keys, here, head, copy);
          left = {copy, copy + 16 * width_};
        }
      }
    }
  }

  // 32 keys of a head as tiles: [2][steps]. Zeros stand behind the last one.
  void copy_keys(const KeyRow<bf16>* keys, int64_t count, int64_t head, bf16* tiles) const {
    for (int64_t j = 0; j < STEP; ++j) {
      const bf16* key = j < count ? keys[j].key + head * keys[j].key_head_stride : nullptr;
      for (int64_t step = 0; step < steps_; ++step) {
        _mm512_store_si512(tiles + (j / 16 * steps_ + step) * TILE + j % 16 * STEP, channels(key, step));
      }
    }
  }

  // Bytes from each of 16 keys to the next; 0 where it varies for some head, where their last step is not whole, or
  // where so many are between them that a tile's rows meet in one set of the first-level cache.
  int64_t distance(const KeyRow<bf16>* keys) const {
    const auto place = [&](int64_t j) { return reinterpret_cast<intptr_t>(keys[j].key); };
    const int64_t bytes = place(1) - place(0);
    if (head_dim_ != width_ || bytes <= 0 || bytes % 4096 == 0) return 0;
    for (int64_t j = 2; j < 16; ++j) {
      if (place(j) - place(j - 1) != bytes || keys[j].key_head_stride != keys[0].key_head_stride) return 0;
    }
    return bytes;
  }

  // Scores of a block; beside it, the weights of the block before.
  void multiply(const Block& block, const Block& last) {
    with_steps([&](auto steps) { multiply_of(steps, block, last); });
  }

  template <typename steps_t>
  void multiply_of(steps_t steps, const Block& block, const Block& last) {
    const Operands left = left_[block.head * key_steps_ + block.step];
    const bf16* queries = queries_ + (block.head * padded_rows_ + block.row) * width_;
    TileSums sums{scores_ + block.parity * 4 * SUM_TILE};
    sums.columns = num_rows_ - block.row;
    const Scores scores = scores_of(last);
    Ahead ahead = ahead_;
    const Lines<Ahead> lines{ahead, lines_beside(lines_wanted_)};
    const auto add = [&](const auto& weigh_pair) __attribute__((always_inline)) {
      multiply_steps<Reuse::right>(
          steps, left, {queries, queries + steps * TILE}, sums,
          [&](int64_t i) __attribute__((always_inline)) {
            for (int64_t pair = i * 8 / steps; pair < (i + 1) * 8 / steps; ++pair) weigh_pair(pair);
          },
          lines);
    };
    if (!last.exists) {
      add([](int64_t) {});
    } else if (last.masked()) {
      add([&](int64_t pair) __attribute__((always_inline)) { scores.weigh<true>(pair); });
    } else {
      add([&](int64_t pair) __attribute__((always_inline)) { scores.weigh<false>(pair); });
    }
    ahead_ = ahead;
  }

  // The scores of a block and where its weights belong. No members of `FewRows`, nor is what is fetched beside products:
  // those the compiler would read again after every store.
  struct Scores {
    const float* scores;
    uint32_t* pairs;
    int64_t shift;
    __m512 minus_alpha_log2e;

    // The weights of keys 2 pair and 2 pair + 1, as pairs of bf16.
    template <bool masked>
    inline __attribute__((always_inline)) void weigh(int64_t pair) const {
      const float* keys = scores + (pair >= 8 ? 2 * SUM_TILE : 0) + 2 * (pair % 8) * 16;
      for (int64_t half = 0; half < 2; ++half) {
        __m512 first = silu_for_bf16(_mm512_load_ps(keys + half * SUM_TILE), minus_alpha_log2e);
        __m512 second = silu_for_bf16(_mm512_load_ps(keys + half * SUM_TILE + 16), minus_alpha_log2e);
        if constexpr (masked) {
          first = _mm512_maskz_mov_ps(from(shift + 2 * pair - 16 * half), first);
          second = _mm512_maskz_mov_ps(from(shift + 2 * pair + 1 - 16 * half), second);
        }
        _mm512_store_si512(pairs + half * SUM_TILE + pair * 16, to_pairs(first, second));
      }
    }
  };

  Scores scores_of(const Block& block) const {
    return {scores_ + block.parity * 4 * SUM_TILE, pairs_, block.shift, minus_alpha_log2e_};
  }

  // Stores a block's weights as left operands.
  void settle(const Block& block) {
    if (!block.exists) return;
    bf16* weights = weights_of(block.head, block.row) + block.step * TILE;
    for (int64_t half = 0; half < 2; ++half) {
      transpose_tile(reinterpret_cast<const bf16*>(pairs_ + half * SUM_TILE), weights + half * key_steps_ * TILE);
    }
  }

  bf16* weights_of(int64_t head, int64_t row) { return weights_ + (head * padded_rows_ + row) * key_steps_ * STEP; }

  // Tiles: [heads][rows / 16][steps]; keys that were copied, the same; values of one head, [2 steps][key steps];
  // [heads][rows / 16][key steps].
  bf16 *queries_, *keys_, *values_, *weights_;
  Ahead ahead_;
  int64_t lines_wanted_ = 0;  // of `ahead_`, beside half a step
  Operands* left_;  // 2 x 16 keys, [heads][key steps]
  float* scores_;   // of two blocks, [2][2 x 2 tiles]
  uint32_t* pairs_;  // [2][16 pairs of keys][16 rows]
};

}  // namespace hstu

#endif
