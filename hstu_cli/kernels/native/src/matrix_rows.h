// What attention in tiles shares, whether few rows meet the keys or many: values as tiles, sums as rows of results, and
// what is fetched ahead.
#pragma once

#include "matrix_tiles.h"

#ifdef HSTU_BF16_TILES

#include "plan.h"
#include "scratch.h"

namespace hstu {

class MatrixRows {
 public:
  MatrixRows(int64_t head_dim, double alpha)
      : head_dim_(head_dim),
        width_(round_up(head_dim, STEP)),
        steps_(width_ / STEP),
        minus_alpha_log2e_(_mm512_set1_ps(static_cast<float>(-alpha * 1.4426950408889634))) {}

  int64_t sums_per_row() const { return width_; }

  // Row i of sums times a factor as a row of results, past the caches where `stream`; false where only read_row can.
  bool write_row(const float* sums, int64_t i, float factor, bool stream, bf16* out) const {
    if (head_dim_ != width_) return false;
    const float* tile = row_of(sums, i);
    const __m512 scale = _mm512_set1_ps(factor);
    for (int64_t step = 0; step < steps_; ++step) {
      const __m512 even = _mm512_mul_ps(_mm512_loadu_ps(tile + 2 * step * SUM_TILE), scale);
      const __m512 odd = _mm512_mul_ps(_mm512_loadu_ps(tile + (2 * step + 1) * SUM_TILE), scale);
      const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
      const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
      const __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
      if (stream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + step * STEP), both);
      } else {
        _mm512_storeu_si512(out + step * STEP, both);
      }
    }
    return true;
  }

  // Row i of sums, its channels in order: [width].
  void read_row(const float* sums, int64_t i, float* row) const {
    const float* tile = row_of(sums, i);
    for (int64_t step = 0; step < steps_; ++step) {
      const __m512 even = _mm512_loadu_ps(tile + 2 * step * SUM_TILE);
      const __m512 odd = _mm512_loadu_ps(tile + (2 * step + 1) * SUM_TILE);
      _mm512_storeu_ps(row + step * STEP, in_order<0>(even, odd));
      _mm512_storeu_ps(row + step * STEP + 16, in_order<1>(even, odd));
    }
  }

 protected:
  // Rows that are needed soon, brought closer line by line.
  class Ahead {
   public:
    Ahead() = default;
    Ahead(const KeyRow<bf16>* rows, int64_t count, const bf16* KeyRow<bf16>::*part, int64_t elements)
        : row_(rows), last_(rows + count), part_(part), bytes_(elements * 2) {}

    int64_t num_lines() const { return (last_ - row_) * ((bytes_ + 63) / 64); }

    void operator()() {
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

  // 32 rows of a head from `row` on and the 32 keys of a step; row i sees key p of it where shift + p <= i.
  struct Block {
    int64_t head = 0, row = 0, step = 0, shift = 0, parity = 0;
    bool exists = false;

    // Whether some row does not see some key.
    bool masked() const { return shift + STEP - 1 > 0; }
  };

  // Steps of keys of which the last of 32 rows sees one.
  int64_t num_seen(int64_t row) const {
    const int64_t seen = row + ROW_STEP - 1 - diagonal_;
    return seen < 0 ? 0 : std::min(seen / STEP + 1, key_steps_);
  }

  // Of 16 numbers those from `first` on.
  static __mmask16 from(int64_t first) {
    return first <= 0 ? 0xffff : first >= 16 ? 0 : static_cast<__mmask16>(0xffff << first);
  }

  // Calls f with the number of steps of a row, as a constant where the width is a usual one: loops of known length.
  template <typename f_t>
  void with_steps(const f_t& f) const {
    switch (steps_) {
      case 2: return f(std::integral_constant<int64_t, 2>());
      case 4: return f(std::integral_constant<int64_t, 4>());
      case 8: return f(std::integral_constant<int64_t, 8>());
      default: return f(steps_);
    }
  }

  void start(int64_t num_keys, int64_t padded_rows, int64_t diagonal) {
    key_steps_ = (num_keys + STEP - 1) / STEP;
    padded_rows_ = padded_rows;
    diagonal_ = diagonal;
  }

  // Values 2 pair and 2 pair + 1 of a head among right operands: pairs of keys, those of even channels in one tile and
  // of odd ones in the next, so that nothing moves between lanes. `read_row` puts the channels in order again. Zeros
  // stand behind the last key. Columns of tiles begin so many elements apart. beside() runs twice a step.
  template <typename beside_t>
  void load_pair(
      const KeyRow<bf16>* rows, int64_t count, int64_t pair, int64_t head, int64_t columns_apart, bf16* values,
      const beside_t& beside) const {
    const auto value = [&](int64_t j) {
      return j < count ? rows[j].value + head * rows[j].value_head_stride : nullptr;
    };
    const bf16 *first = value(2 * pair), *second = value(2 * pair + 1);
    bf16* target = values + pair / 16 * TILE + pair % 16 * STEP;
    for (int64_t step = 0; step < steps_; ++step, target += 2 * columns_apart) {
      beside();
      beside();
      interleave_rows(channels(first, step), channels(second, step), target, target + columns_apart);
    }
  }

  __m512i channels(const bf16* row, int64_t step) const {
    return row ? load_channels(row, step * STEP, head_dim_) : _mm512_setzero_si512();
  }

  // sums of 32 rows from `row` on = weights values over so many steps of keys, or these are added; tiles of weights below
  // each other and of values beside each other begin so far apart. The sums of the next columns, or behind the last ones
  // of the next rows, are brought into the first-level cache meanwhile.
  template <Reuse reuse, typename line_t>
  void add_values(
      int64_t row, int64_t key_steps, const bf16* weights, int64_t weights_apart, const bf16* values,
      int64_t values_apart, float* sums, bool add, const Lines<line_t>& lines) const {
    if (key_steps == 0 && add) return;
    const int64_t below = 16 * width_, next_lines = (16 + key_steps - 1) / std::max<int64_t>(key_steps, 1);  // at a time
    for (int64_t tile = 0; tile < 2 * steps_; tile += 2) {
      const float* next = sums + (tile + 2 < 2 * steps_ ? (tile + 2) * SUM_TILE : 2 * below);
      multiply_steps<reuse>(
          key_steps, {weights, weights + weights_apart},
          {values + tile * values_apart, values + (tile + 1) * values_apart},
          {sums + tile * SUM_TILE, add, below, num_rows_ - row},
          [&](int64_t) {
            for (int64_t line = 0; line < next_lines; ++line, next += 16) {
              _mm_prefetch(next, _MM_HINT_T0);
              _mm_prefetch(next + below, _MM_HINT_T0);
            }
          },
          lines);
    }
  }

  int64_t head_dim_, width_, steps_;
  __m512 minus_alpha_log2e_;
  int64_t key_steps_ = 0, num_rows_ = 0, padded_rows_ = 0, diagonal_ = 0;
};

}  // namespace hstu

#endif
