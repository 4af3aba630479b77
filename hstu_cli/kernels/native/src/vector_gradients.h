// Gradients of attention's inputs, of one head of a sequence, in vectors of float or double, on any CPU.
#pragma once

#include "vector_attention.h"

namespace hstu {

// As in tiles: scores and their gradients are computed transposed, 32 keys with a block of rows at a time.
template <typename scalar_t, typename real_t>
class VectorGradientTiles {
 public:
  using scalar_type = scalar_t;
  using sum_type = real_t;
  struct session_type {};
  static constexpr int64_t CHUNK_KEYS = 128, BLOCK_ROWS = 128;

  VectorGradientTiles(int64_t head_dim, double alpha)
      : head_dim_(head_dim), width_(round_up(head_dim, PANEL)), alpha_(static_cast<real_t>(alpha)) {}

  int64_t width() const { return width_; }

  void carve(Carver& carver) {
    const int64_t loaded = BLOCK_ROWS * width_;
    carver.take(queries_across_, loaded);
    carver.take(queries_along_, loaded);
    carver.take(outputs_across_, loaded);
    carver.take(outputs_along_, loaded);
    carver.take(keys_, CHUNK_KEYS * ld_keys());
    carver.take(keys_along_, CHUNK_KEYS * width_);
    carver.take(values_, CHUNK_KEYS * ld_keys());
    carver.take(grad_keys_, CHUNK_KEYS * ld_keys());
    carver.take(grad_values_, CHUNK_KEYS * ld_keys());
    carver.take(weights_, PANEL * LD_ROWS);
    carver.take(slopes_, PANEL * LD_ROWS);
    carver.take(slopes_transposed_, BLOCK_ROWS * LD_KEYS_OF_ROW);
    carver.take(wide_, PANEL * width_);
  }

  template <typename row_t>
  void load_rows(const row_t& query, const row_t& output, int64_t count) {
    padded_rows_ = round_up(count, PANEL);
    load_operand(query, count, queries_across_, queries_along_);
    load_operand(output, count, outputs_across_, outputs_along_);
  }

  template <typename row_t>
  void load_keys(const row_t& key, const row_t& value, int64_t count) {
    padded_keys_ = round_up(count, PANEL);
    for (int64_t j = 0; j < padded_keys_; ++j) {
      load_row(j < count ? key(j) : nullptr, head_dim_, keys_ + j * ld_keys(), width_);
      load_row(j < count ? value(j) : nullptr, head_dim_, values_ + j * ld_keys(), width_);
    }
    to_panels(keys_, ld_keys(), padded_keys_, CHUNK_KEYS, keys_along_);
    std::fill(grad_keys_, grad_keys_ + padded_keys_ * ld_keys(), real_t(0));
    std::fill(grad_values_, grad_values_ + padded_keys_ * ld_keys(), real_t(0));
  }

  // See MatrixGradientTiles.
  void add(int64_t diagonal, real_t* sums) {
    const int64_t rows = padded_rows_;
    for (int64_t key = 0; key < padded_keys_; key += PANEL) {
      const int64_t from = std::max<int64_t>(0, diagonal + key);
      if (from >= rows) break;
      multiply_across(keys_ + key * ld_keys(), queries_across_, from, rows, weights_);
      multiply_across(values_ + key * ld_keys(), outputs_across_, from, rows, slopes_);
      for (int64_t j = 0; j < PANEL; ++j) {
        differentiate(weights_ + j * LD_ROWS + from, slopes_ + j * LD_ROWS + from, rows - from);
        const int64_t unseen = std::clamp<int64_t>(diagonal + key + j - from, 0, rows - from);
        std::fill_n(weights_ + j * LD_ROWS + from, unseen, real_t(0));
        std::fill_n(slopes_ + j * LD_ROWS + from, unseen, real_t(0));
      }
      multiply_along(weights_, outputs_along_, from, rows, grad_values_ + key * ld_keys());
      multiply_along(slopes_, queries_along_, from, rows, grad_keys_ + key * ld_keys());
      transpose(
          slopes_ + from, LD_ROWS, slopes_transposed_ + from * LD_KEYS_OF_ROW + key, LD_KEYS_OF_ROW, PANEL,
          rows - from);
    }
    for (int64_t row = 0; row < rows; row += PANEL) {
      const int64_t keys = std::min(padded_keys_, row + PANEL - diagonal);
      if (keys <= 0) continue;
      multiply_panels(
          PANEL, width_, keys, slopes_transposed_ + row * LD_KEYS_OF_ROW, LD_KEYS_OF_ROW, keys_along_, CHUNK_KEYS,
          sums + row * width_, width_, true);
    }
  }

  void read_queries(const real_t* sums, int64_t step, real_t* rows) const {
    std::copy_n(sums + step * PANEL * width_, PANEL * width_, rows);
  }

  void read_keys(int64_t step, real_t* rows) const { read_rows(grad_keys_, step, rows); }
  void read_values(int64_t step, real_t* rows) const { read_rows(grad_values_, step, rows); }

 private:
  // Rows get some elements more than they hold: at powers of two they would meet in the same cache sets.
  static constexpr int64_t LD_ROWS = BLOCK_ROWS + 16, LD_KEYS_OF_ROW = CHUNK_KEYS + 16;
  int64_t ld_keys() const { return width_ + 16; }

  // across: [width, rows] in panels; along: [rows, width] in panels.
  template <typename row_t>
  void load_operand(const row_t& row, int64_t count, real_t* across, real_t* along) {
    for (int64_t i = 0; i < count; i += PANEL) {
      for (int64_t j = 0; j < PANEL; ++j) {
        load_row(i + j < count ? row(i + j) : nullptr, head_dim_, wide_ + j * width_, width_);
      }
      transpose(wide_, width_, across + i * width_, PANEL, PANEL, width_);
      to_panels(wide_, width_, PANEL, BLOCK_ROWS, along + i * PANEL);
    }
  }

  // Rows [count, width] as panels of `panel_rows` rows.
  void to_panels(const real_t* rows, int64_t ld_rows, int64_t count, int64_t panel_rows, real_t* panels) const {
    for (int64_t c = 0; c < width_; c += PANEL) {
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(rows + i * ld_rows + c, PANEL, panels + c * panel_rows + i * PANEL);
      }
    }
  }

  // target [PANEL, rows] = left [PANEL, width] times the rows [from, rows) transposed.
  void multiply_across(const real_t* left, const real_t* across, int64_t from, int64_t rows, real_t* target) const {
    multiply_panels(
        PANEL, rows - from, width_, left, ld_keys(), across + from * width_, width_, target + from, LD_ROWS, false);
  }

  // sums [PANEL, width] += left [PANEL, rows] times the rows [from, rows).
  void multiply_along(const real_t* left, const real_t* along, int64_t from, int64_t rows, real_t* sums) const {
    multiply_panels(
        PANEL, width_, rows - from, left + from, LD_ROWS, along + from * PANEL, BLOCK_ROWS, sums, ld_keys(), true);
  }

  // Scores x become weights x * sigmoid(alpha x), the weights' gradients those of alpha x.
  void differentiate(real_t* scores, real_t* grads, int64_t count) const {
    using Vec = at::vec::Vectorized<real_t>;
    const Vec alpha(alpha_), minus_alpha(-alpha_), one(real_t(1));
    for (int64_t i = 0; i < count; i += Vec::size()) {
      const Vec x = Vec::loadu(scores + i), gate = one / (one + exp_of(x * minus_alpha)), weight = x * gate;
      weight.store(scores + i);
      (Vec::loadu(grads + i) * (gate + alpha * weight * (one - gate))).store(grads + i);
    }
  }

  void read_rows(const real_t* sums, int64_t step, real_t* rows) const {
    for (int64_t i = 0; i < PANEL; ++i) {
      std::copy_n(sums + (step * PANEL + i) * ld_keys(), width_, rows + i * width_);
    }
  }

  int64_t head_dim_, width_, padded_keys_ = 0, padded_rows_ = 0;
  real_t alpha_;
  real_t *queries_across_, *queries_along_, *outputs_across_, *outputs_along_;  // see load_operand
  real_t *keys_, *values_, *keys_along_;  // [chunk, width], [chunk, width], [chunk, width] in panels
  real_t *grad_keys_, *grad_values_;      // [chunk, width]
  real_t *weights_, *slopes_;             // [PANEL, block]
  real_t *slopes_transposed_, *wide_;     // [block, chunk], [PANEL, width]
};

}  // namespace hstu
