// Row-wise operators of the training layer: layer norms, SiLU and their gradients, with dropout that a seed decides.
//
// Gradients of weights and biases are sums over all rows. Blocks of rows are added up apart, then the blocks in order;
// how many there are depends on the rows alone, so sums do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "dropout.h"
#include "matrix_tiles.h"
#include "rows.h"

namespace hstu {

// Rows of any dtype, read and written as real_t, which is float, or double where any operand is double.
template <typename real_t>
class AnyRows {
 public:
  AnyRows() = default;
  explicit AnyRows(const at::Tensor& x)
      : data_(static_cast<char*>(const_cast<void*>(x.const_data_ptr()))),
        type_(x.scalar_type()),
        stride_(x.stride(0) * static_cast<int64_t>(x.element_size())) {}

  // The same rows without their first columns.
  AnyRows from(int64_t column) const {
    AnyRows rest = *this;
    rest.data_ += column * static_cast<int64_t>(c10::elementSize(type_));
    return rest;
  }

  void load(int64_t row, int64_t width, real_t* target) const {
    visit([&](auto* x) {
      using scalar_t = std::remove_pointer_t<decltype(x)>;
      if constexpr (std::is_same_v<wide_t<scalar_t>, real_t>) {
        widen(static_cast<const scalar_t*>(x), width, target);
      } else {
        std::copy(x, x + width, target);
      }
    }, row);
  }

  void store(int64_t row, int64_t width, const real_t* source) const {
    visit([&](auto* x) {
      using scalar_t = std::remove_pointer_t<decltype(x)>;
      if constexpr (std::is_same_v<wide_t<scalar_t>, real_t>) {
        narrow(source, width, x);
      } else {
        for (int64_t c = 0; c < width; ++c) x[c] = static_cast<scalar_t>(source[c]);
      }
    }, row);
  }

 private:
  template <typename f_t>
  void visit(const f_t& f, int64_t row) const {
    char* at = data_ + row * stride_;
    switch (type_) {
      case at::kBFloat16: return f(reinterpret_cast<at::BFloat16*>(at));
      case at::kHalf: return f(reinterpret_cast<at::Half*>(at));
      case at::kDouble: return f(reinterpret_cast<double*>(at));
      default: return f(reinterpret_cast<float*>(at));
    }
  }

  char* data_ = nullptr;
  at::ScalarType type_ = at::kFloat;
  int64_t stride_ = 0;
};

// Sums of rows, kept apart for blocks of them.
template <typename real_t>
class BlockSums {
 public:
  BlockSums(int64_t rows, int64_t width)
      : rows_(rows),
        width_(width),
        block_rows_(std::max<int64_t>(64, (rows + MOST_BLOCKS - 1) / MOST_BLOCKS)),
        sums_((rows + block_rows_ - 1) / block_rows_ * width) {}

  // f(first row, end, sums [width] of zeros) for each block, on all threads.
  template <typename f_t>
  void run(const f_t& f) {
    parallel_for((rows_ + block_rows_ - 1) / block_rows_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        f(block * block_rows_, std::min((block + 1) * block_rows_, rows_), sums_.data() + block * width_);
      }
    });
  }

  void total(real_t* out) const {
    std::fill(out, out + width_, real_t(0));
    for (size_t i = 0; i < sums_.size(); i += width_) {
      for (int64_t c = 0; c < width_; ++c) out[c] += sums_[i + c];
    }
  }

 private:
  static constexpr int64_t MOST_BLOCKS = 64;

  int64_t rows_, width_, block_rows_;
  std::vector<real_t> sums_;
};

// The sum of f(i, v) over the vectors v of a row, f(i, x) of the elements behind the last of them.
template <typename real_t, typename f_t>
real_t sum_of(const real_t* x, int64_t width, const f_t& f) {
  using Vec = at::vec::Vectorized<real_t>;
  Vec sums[2] = {Vec(real_t(0)), Vec(real_t(0))};
  int64_t i = 0;
  for (; i + 2 * Vec::size() <= width; i += 2 * Vec::size()) {
    sums[0] = sums[0] + f(i, Vec::loadu(x + i));
    sums[1] = sums[1] + f(i + Vec::size(), Vec::loadu(x + i + Vec::size()));
  }
  real_t sum = sum_of_lanes(sums[0] + sums[1]);
  for (; i < width; ++i) sum += f(i, x[i]);
  return sum;
}

// LayerNorm(x), or with u dropout(LayerNorm(x) * u). mean, scale: of each row the mean and 1 / deviation.
template <typename real_t>
struct Norm {
  using Vec = at::vec::Vectorized<real_t>;

  int64_t rows, width;
  const real_t *weight, *bias;
  double eps;
  bool gated;
  Dropout dropout;

  void forward(
      const AnyRows<real_t>& x, const AnyRows<real_t>& u, const AnyRows<real_t>& out, real_t* mean,
      real_t* scale) const {
    parallel_for(rows, std::max<int64_t>(1, ROW_GRAIN / width), [&](int64_t begin, int64_t end) {
      std::vector<real_t> wide(2 * width);
      std::vector<uint16_t> numbers(Dropout::padded(width));
      real_t *row = wide.data(), *gate = row + width;
      for (int64_t i = begin; i < end; ++i) {
        x.load(i, width, row);
        const real_t m = sum_of(row, width, [](int64_t, auto v) { return v; }) / static_cast<real_t>(width);
        const real_t squares = sum_of(row, width, [&](int64_t, auto v) {
          const decltype(v) centred = v - decltype(v)(m);
          return centred * centred;
        });
        const real_t s = 1 / std::sqrt(squares / static_cast<real_t>(width) + static_cast<real_t>(eps));
        mean[i] = m;
        scale[i] = s;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) row[c] = (row[c] - m) * s * weight[c] + bias[c];
        if (gated) {
          u.load(i, width, gate);
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) row[c] *= gate[c];
          if (dropout.level) {
            dropout.draw(i, width, numbers.data());
            dropout.apply(numbers.data(), width, row);
          }
        }
        out.store(i, width, row);
      }
    });
  }

  // For grad, the gradient of the result: that of x, with `residual` added where not gated; where gated also that of
  // u, and the result once more. sums [2, width]: gradients of weight and bias.
  void backward(
      const AnyRows<real_t>& grad, const AnyRows<real_t>& x, const AnyRows<real_t>& u, const real_t* mean,
      const real_t* scale, const AnyRows<real_t>& residual, const AnyRows<real_t>& grad_x,
      const AnyRows<real_t>& grad_u, const AnyRows<real_t>& result, real_t* sums) const {
    BlockSums<real_t> block_sums(rows, 2 * width);
    block_sums.run([&](int64_t begin, int64_t end, real_t* own) {
      std::vector<real_t> wide(4 * width);
      std::vector<uint16_t> numbers(Dropout::padded(width));
      real_t *g = wide.data(), *normed = g + width, *gate = normed + width, *other = gate + width;
      for (int64_t i = begin; i < end; ++i) {
        grad.load(i, width, g);
        x.load(i, width, normed);
        const real_t m = mean[i], s = scale[i];
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) normed[c] = (normed[c] - m) * s;
        if (gated) {
          u.load(i, width, gate);
          if (dropout.level) {
            dropout.draw(i, width, numbers.data());
            dropout.apply(numbers.data(), width, g);
          }
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) other[c] = (normed[c] * weight[c] + bias[c]) * g[c];
          grad_u.store(i, width, other);
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) other[c] = (normed[c] * weight[c] + bias[c]) * gate[c];
          if (dropout.level) dropout.apply(numbers.data(), width, other);
          result.store(i, width, other);
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) g[c] *= gate[c];
        } else {
          residual.load(i, width, other);
        }
        differentiate(g, normed, s, own);
        if (!gated) {
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) g[c] += other[c];
        }
        grad_x.store(i, width, g);
      }
    });
    block_sums.total(sums);
  }

 private:
  // g, of the norm's result, becomes that of its input; adds up those of weight and bias.
  void differentiate(real_t* g, const real_t* normed, real_t scale, real_t* sums) const {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      sums[c] += g[c] * normed[c];
      sums[width + c] += g[c];
      g[c] *= weight[c];
    }
    const real_t mean = sum_of(g, width, [](int64_t, auto v) { return v; }) / static_cast<real_t>(width);
    const real_t slope = sum_of(g, width, [&](int64_t c, auto v) {
      if constexpr (std::is_same_v<decltype(v), Vec>) {
        return v * Vec::loadu(normed + c);
      } else {
        return v * normed[c];
      }
    }) / static_cast<real_t>(width);
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) g[c] = (g[c] - normed[c] * slope - mean) * scale;
  }
};

// SiLU of a row that was rounded to bf16, or of any other; what is computed again must be this, bit for bit.
template <typename real_t>
void activate_row(real_t* row, int64_t width, [[maybe_unused]] bool is_bf16) {
#ifdef HSTU_BF16_TILES
  if constexpr (std::is_same_v<real_t, float>) {
    if (is_bf16) {
      const __m512 factor = _mm512_set1_ps(-1.44269504f);
      for (int64_t c = 0; c < width; c += 16) {
        const auto exist = static_cast<__mmask16>(width - c >= 16 ? 0xffff : (1 << (width - c)) - 1);
        _mm512_mask_storeu_ps(row + c, exist, silu_for_bf16(_mm512_maskz_loadu_ps(exist, row + c), factor));
      }
      return;
    }
  }
#endif
  silu_row(row, width, real_t(1));
}

// g times the slope of SiLU at x, of COLUMNS or fewer; both have room for whole vectors.
template <typename real_t>
void multiply_by_slope(const real_t* x, real_t* g, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<real_t, float>) {
    const __m512 factor = _mm512_set1_ps(-1.4426950408889634f), one = _mm512_set1_ps(1.0f);
    for (int64_t c = 0; c < count; c += 16) {
      const __m512 v = _mm512_loadu_ps(x + c);
      // Bounded as in silu_of.
      const __m512 t = _mm512_min_ps(_mm512_mul_ps(v, factor), _mm512_set1_ps(126.0f));
      const __m512 divisor = _mm512_add_ps(exp2_of(t), one), r = _mm512_rcp14_ps(divisor);
      const __m512 gate = _mm512_fmadd_ps(r, _mm512_fnmadd_ps(divisor, r, one), r);
      const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(v, gate), _mm512_sub_ps(one, gate), gate);
      _mm512_storeu_ps(g + c, _mm512_mul_ps(_mm512_loadu_ps(g + c), slope));
    }
    return;
  }
#endif
  using Vec = at::vec::Vectorized<real_t>;
  const Vec one(real_t(1)), minus_one(real_t(-1));
  for (int64_t c = 0; c < count; c += Vec::size()) {
    const Vec v = Vec::loadu(x + c), gate = one / (one + exp_of(v * minus_one));
    (Vec::loadu(g + c) * (gate + v * gate * (one - gate))).store(g + c);
  }
}

// Makes grad of SiLU's result that of x, in place; sums [width]: it, over the rows.
template <typename real_t>
void silu_gradients(
    const AnyRows<real_t>& grad, const AnyRows<real_t>& x, int64_t rows, int64_t width, real_t* sums) {
  constexpr int64_t COLUMNS = 1024;  // at a time: sums of wider rows would not stay in the first-level cache
  BlockSums<real_t> block_sums(rows, width);
  block_sums.run([&](int64_t begin, int64_t end, real_t* own) {
    std::vector<real_t> wide(2 * COLUMNS);
    real_t *g = wide.data(), *row = g + COLUMNS;
    for (int64_t column = 0; column < width; column += COLUMNS) {
      const int64_t count = std::min(COLUMNS, width - column);
      const AnyRows<real_t> some_grad = grad.from(column), some_x = x.from(column);
      for (int64_t i = begin; i < end; ++i) {
        some_grad.load(i, count, g);
        some_x.load(i, count, row);
        multiply_by_slope(row, g, count);
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) own[column + c] += g[c];
        some_grad.store(i, count, g);
      }
    }
  });
  block_sums.total(sums);
}

}  // namespace hstu
