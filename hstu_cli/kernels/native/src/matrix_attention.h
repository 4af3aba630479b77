// Attention of some heads of a sequence in matrix units: scores, SiLU and the sum of values, block by block.
#pragma once

#include "matrix_tiles.h"

#ifdef HSTU_MATRIX_TILES

namespace hstu {

// Scores are computed transposed (keys by rows): so keys are left operands, which pages hold as they are, and values
// need no more than interleaving. Rows meet the keys first, all heads of them, and then the values: each comes from
// memory in the order in which it lies there. A block's SiLU runs beside the next block's products, because vectors and
// matrices are different units.
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
    carver.take(queries_, QUERY_ROWS * width_);
    carver.take(keys_, std::max(num_heads * MANY_HEADS_KEYS, MOST_KEYS) * width_);
    carver.take(left_, std::max(num_heads * MANY_HEADS_KEYS, MOST_KEYS) / STEP);
    carver.take(values_, (MOST_KEYS + STEP) * width_);
    carver.take(weights_, QUERY_ROWS * MOST_KEYS);
    carver.take(scores_, 2 * 4 * SUM_TILE);
    carver.take(pairs_, 2 * SUM_TILE);
  }

  int64_t sums_per_row() const { return width_; }

  // How many keys to take next. More need fewer passes over the sums, but what they need must stay in the second-level
  // cache.
  int64_t num_chunk_keys(int64_t num_heads) const { return num_heads == 1 ? MOST_KEYS : MANY_HEADS_KEYS; }

  template <typename row_t>
  void load_queries(int64_t head, int64_t num_rows, int64_t padded_rows, const row_t& row) {
    for (int64_t i = 0; i < padded_rows; i += 16) {
      load_transposed(
          [&](int64_t j) { return row(i + j); }, std::clamp<int64_t>(num_rows - i, 0, 16), head_dim_,
          queries_ + (head * padded_rows + i) * width_);
    }
  }

  // sums [heads, rows, width] = SiLU(q k') v over these keys, or that is added; row i sees those with
  // diagonal + key <= i.
  void attend(const Keys<bf16>& keys, int64_t padded_rows, int64_t diagonal, float* sums, bool add) {
    key_steps_ = (keys.count + STEP - 1) / STEP;
    padded_rows_ = padded_rows;
    diagonal_ = diagonal;
    find_keys(keys.rows, keys.count, keys.num_heads);
    ahead_ = Ahead(keys.rows, keys.count, &KeyRow<bf16>::value, keys.num_heads * head_dim_);
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
    for (int64_t pair = 0; pair < 16 && last.exists; ++pair) weigh<true>(last, pair);
    settle(last);
    ahead_ = Ahead(keys.next_rows, keys.next_count, &KeyRow<bf16>::key, keys.num_heads * head_dim_);
    for (int64_t head = 0; head < keys.num_heads; ++head) {
      load_values(keys.rows, keys.count, head);
      for (int64_t row = 0; row < padded_rows; row += ROW_STEP) {
        add_values(head, row, sums + (head * padded_rows + row) * width_, add);
      }
    }
  }

  // Row i of sums times a factor as a row of results; false where only read_row can.
  bool write_row(const float* sums, int64_t i, float factor, bf16* out) const {
    if (head_dim_ != width_) return false;
    const float* tile = row_of(sums, i);
    const __m512 scale = _mm512_set1_ps(factor);
    for (int64_t step = 0; step < steps_; ++step) {
      const __m512 even = _mm512_mul_ps(_mm512_loadu_ps(tile + 2 * step * SUM_TILE), scale);
      const __m512 odd = _mm512_mul_ps(_mm512_loadu_ps(tile + (2 * step + 1) * SUM_TILE), scale);
      const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
      const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
      _mm512_storeu_si512(out + step * STEP, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    return true;
  }

  // Row i of sums, its channels in order: [width].
  void read_row(const float* sums, int64_t i, float* row) const {
    const float* tile = row_of(sums, i);
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

  // Rows that are needed soon, brought closer line by line: one at a time beside a tile product costs little, more make
  // the products wait for their own operands.
  class Ahead {
   public:
    Ahead() = default;
    Ahead(const KeyRow<bf16>* rows, int64_t count, const bf16* KeyRow<bf16>::*part, int64_t elements)
        : row_(rows), last_(rows + count), part_(part), bytes_(elements * 2) {}

    void fetch() {
      if (row_ == last_) return;
      _mm_prefetch(reinterpret_cast<const char*>(row_->*part_) + at_, _MM_HINT_T1);
      at_ += 64;
      if (at_ < bytes_) return;
      at_ = 0;
      ++row_;
    }

   private:
    const KeyRow<bf16> *row_ = nullptr, *last_ = nullptr;
    const bf16* KeyRow<bf16>::*part_ = nullptr;
    int64_t at_ = 0, bytes_ = 0;
  };

  // Where a row begins in its first tile.
  const float* row_of(const float* sums, int64_t i) const { return sums + i / 16 * width_ * 16 + i % 16 * 16; }

  // 32 rows of a head from `row` on and the 32 keys of a step. Row i sees key p of it where shift + p <= i.
  struct Block {
    int64_t head = 0, row = 0, step = 0, shift = 0, parity = 0;
    bool exists = false;
  };

  // Steps of keys of which the last of 32 rows sees one.
  int64_t num_seen(int64_t row) const {
    const int64_t seen = row + ROW_STEP - 1 - diagonal_;
    return seen < 0 ? 0 : std::min(seen / STEP + 1, key_steps_);
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
          const int64_t offset = head * keys->key_head_stride;
          left = {keys[0].key + offset, keys[16].key + offset, STEP, stride};
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

  // Bytes from each of 16 keys to the next; 0 where it varies, where their last step is not whole, or where so many are
  // between them that a tile's rows meet in one set of the first-level cache.
  int64_t distance(const KeyRow<bf16>* keys) const {
    const auto place = [&](int64_t j) { return reinterpret_cast<intptr_t>(keys[j].key); };
    const int64_t bytes = place(1) - place(0);
    if (head_dim_ != width_ || bytes <= 0 || bytes % 4096 == 0) return 0;
    for (int64_t j = 2; j < 16; ++j) {
      if (place(j) - place(j - 1) != bytes) return 0;
    }
    return bytes;
  }

  // Values as right operands: pairs of keys, those of even channels in one tile and of odd ones in the next, so that
  // nothing moves between lanes. `read_row` puts the channels in order again. Zeros stand behind the last key.
  void load_values(const KeyRow<bf16>* rows, int64_t count, int64_t head) {
    const int64_t next = right_values();
    for (int64_t j = 0; j < key_steps_ * STEP; j += 2) {
      const bf16* first = j < count ? rows[j].value + head * rows[j].value_head_stride : nullptr;
      const bf16* second = j + 1 < count ? rows[j + 1].value + head * rows[j + 1].value_head_stride : nullptr;
      bf16* target = values_ + j / STEP * TILE + j % STEP / 2 * STEP;
      for (int64_t step = 0; step < steps_; ++step) {
        const __m512i a = channels(first, step), b = channels(second, step);
        _mm512_store_si512(target, _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)));
        _mm512_store_si512(target + next, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
        target += 2 * next;
      }
    }
  }

  // From one column of value tiles to the next; an odd number of tiles, or their rows would meet in few cache sets.
  int64_t right_values() const { return (key_steps_ | 1) * TILE; }

  __m512i channels(const bf16* row, int64_t step) const {
    return row ? load_channels(row, step * STEP, head_dim_) : _mm512_setzero_si512();
  }

  // Scores of a block; beside it, the weights of the block before.
  void multiply(const Block& block, const Block& last) {
    switch (steps_) {  // the usual widths get loops of known length
      case 2: return multiply_of(std::integral_constant<int64_t, 2>(), block, last);
      case 4: return multiply_of(std::integral_constant<int64_t, 4>(), block, last);
      case 8: return multiply_of(std::integral_constant<int64_t, 8>(), block, last);
      default: return multiply_of(steps_, block, last);
    }
  }

  template <typename steps_t>
  void multiply_of(steps_t steps, const Block& block, const Block& last) {
    const Operands& left = left_[block.head * key_steps_ + block.step];
    const bf16* queries = queries_ + (block.head * padded_rows_ + block.row) * width_;
    auto add = [&](const auto& beside) {
      add_products<Reuse::right>(steps, left, {queries, queries + steps * TILE}, beside);
    };
    zero_sums();
    if (!last.exists) {
      add([&](int64_t) { ahead_.fetch(); });
    } else if (last.shift + STEP - 1 > 0) {
      add([&](int64_t i) {
        weigh_part<true>(i, 2 * steps, last);
        ahead_.fetch();
      });
    } else {
      add([&](int64_t i) {
        weigh_part<false>(i, 2 * steps, last);
        ahead_.fetch();
      });
    }
    store_sums(scores_ + block.parity * 4 * SUM_TILE, 2 * SUM_TILE);
  }

  // Part i of so many of a block's weights.
  template <bool masked>
  inline __attribute__((always_inline)) void weigh_part(int64_t i, int64_t parts, const Block& block) {
    for (int64_t pair = i * 16 / parts; pair < (i + 1) * 16 / parts; ++pair) weigh<masked>(block, pair);
  }

  // The weights of keys 2 pair and 2 pair + 1 of a block, as pairs of bf16.
  template <bool masked>
  inline __attribute__((always_inline)) void weigh(const Block& block, int64_t pair) {
    const float* scores = scores_ + block.parity * 4 * SUM_TILE + (pair >= 8 ? 2 * SUM_TILE : 0) + 2 * (pair % 8) * 16;
    for (int64_t half = 0; half < 2; ++half) {
      __m512 first = silu_for_bf16(_mm512_load_ps(scores + half * SUM_TILE), minus_alpha_log2e_);
      __m512 second = silu_for_bf16(_mm512_load_ps(scores + half * SUM_TILE + 16), minus_alpha_log2e_);
      if constexpr (masked) {
        first = _mm512_maskz_mov_ps(rows_from(block.shift + 2 * pair - 16 * half), first);
        second = _mm512_maskz_mov_ps(rows_from(block.shift + 2 * pair + 1 - 16 * half), second);
      }
      _mm512_store_si512(pairs_ + half * SUM_TILE + pair * 16, to_pairs(first, second));
    }
  }

  // Of 16 rows those from `row` on.
  static __mmask16 rows_from(int64_t row) {
    return row <= 0 ? 0xffff : row >= 16 ? 0 : static_cast<__mmask16>(0xffff << row);
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

  // sums of 32 rows = weights values, or these are added.
  void add_values(int64_t head, int64_t row, float* sums, bool add) {
    const int64_t key_steps = num_seen(row), below = 16 * width_, right = right_values();
    const bf16* weights = weights_of(head, row);
    for (int64_t tile = 0; tile < 2 * steps_ && (key_steps || !add); tile += 2) {
      if (add) {
        load_sums(sums + tile * SUM_TILE, below);
      } else {
        zero_sums();
      }
      add_products<Reuse::left>(
          key_steps, {weights, weights + key_steps_ * TILE}, {values_ + tile * right, values_ + (tile + 1) * right},
          [&](int64_t) { ahead_.fetch(); });
      store_sums(sums + tile * SUM_TILE, below);
    }
  }

  int64_t head_dim_, width_, steps_;
  __m512 minus_alpha_log2e_;
  int64_t key_steps_ = 0, padded_rows_ = 0, diagonal_ = 0;
  // Tiles: [heads][rows / 16][steps]; keys that were copied, the same; values of one head, [2 steps][key steps];
  // [heads][rows / 16][key steps].
  bf16 *queries_, *keys_, *values_, *weights_;
  Ahead ahead_;
  Operands* left_;   // 2 x 16 keys, [heads][key steps]
  float* scores_;    // of two blocks, [2][2 x 2 tiles]
  uint32_t* pairs_;  // [2][16 pairs of keys][16 rows]
};

}  // namespace hstu

#endif
