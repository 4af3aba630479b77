// Operators on rows: layer norms, and copies of keys and values into pages.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "bf16_norm.h"
#include "threads.h"
#include "vectors.h"

namespace hstu {

constexpr int64_t ROW_GRAIN = 1 << 15;  // elements that are worth waking a thread

// Calls f(at, low, high) for two vectors of elements at a time, widened where the dtype is narrow, and then
// rest(at) for each element behind the last of them.
template <typename scalar_t, typename f_t, typename rest_t>
inline void for_vectors(const scalar_t* x, int64_t width, const f_t& f, const rest_t& rest) {
  using Vec = at::vec::Vectorized<wide_t<scalar_t>>;
  int64_t i = 0;
  for (; i + 2 * Vec::size() <= width; i += 2 * Vec::size()) {
    if constexpr (std::is_same_v<scalar_t, wide_t<scalar_t>>) {
      f(i, Vec::loadu(x + i), Vec::loadu(x + i + Vec::size()));
    } else {
      const auto [low, high] = at::vec::convert_to_float<scalar_t>(at::vec::Vectorized<scalar_t>::loadu(x + i));
      f(i, low, high);
    }
  }
  for (; i < width; ++i) rest(i);
}

// Two vectors as elements of x.
template <typename scalar_t>
inline void store_vectors(
    at::vec::Vectorized<wide_t<scalar_t>> low, at::vec::Vectorized<wide_t<scalar_t>> high, scalar_t* x) {
  if constexpr (std::is_same_v<scalar_t, wide_t<scalar_t>>) {
    low.store(x);
    high.store(x + low.size());
  } else {
    at::vec::convert_from_float<scalar_t>(low, high).store(x);
  }
}

template <typename real_t>
inline real_t sum_of_lanes(at::vec::Vectorized<real_t> v) {
  real_t lanes[at::vec::Vectorized<real_t>::size()], sum = 0;
  v.store(lanes);
  for (const real_t lane : lanes) sum += lane;
  return sum;
}

// out = (x - mean) / sqrt(variance + eps) * weight + bias, times u where there is one, in three passes over a row of
// which the first alone reads memory. wide: [width], for what a narrow dtype is widened to.
template <bool gated, typename scalar_t>
void norm_row_with(
    const scalar_t* x, const scalar_t* u, const wide_t<scalar_t>* weight, const wide_t<scalar_t>* bias, double eps,
    int64_t width, wide_t<scalar_t>* wide, scalar_t* out) {
  using real_t = wide_t<scalar_t>;
  using Vec = at::vec::Vectorized<real_t>;
  const real_t* row = wide;
  if constexpr (std::is_same_v<scalar_t, real_t>) row = x;
  Vec low_sum(real_t(0)), high_sum(real_t(0));
  real_t rest_sum = 0;
  for_vectors(
      x, width,
      [&](int64_t i, Vec low, Vec high) {
        low_sum = low_sum + low;
        high_sum = high_sum + high;
        if (row == wide) {
          low.store(wide + i);
          high.store(wide + i + Vec::size());
        }
      },
      [&](int64_t i) {
        wide[i] = static_cast<real_t>(x[i]);
        rest_sum += wide[i];
      });
  const real_t mean = (sum_of_lanes(low_sum + high_sum) + rest_sum) / static_cast<real_t>(width);
  low_sum = high_sum = Vec(real_t(0));
  rest_sum = 0;
  for_vectors(
      row, width,
      [&](int64_t, Vec low, Vec high) {
        low = low - Vec(mean);
        high = high - Vec(mean);
        low_sum = at::vec::fmadd(low, low, low_sum);
        high_sum = at::vec::fmadd(high, high, high_sum);
      },
      [&](int64_t i) { rest_sum += (row[i] - mean) * (row[i] - mean); });
  const real_t variance = (sum_of_lanes(low_sum + high_sum) + rest_sum) / static_cast<real_t>(width);
  const real_t scale = real_t(1) / std::sqrt(variance + static_cast<real_t>(eps));
  const auto normed = [&](int64_t i, Vec v) {
    return at::vec::fmadd((v - Vec(mean)) * Vec(scale), Vec::loadu(weight + i), Vec::loadu(bias + i));
  };
  const auto rest = [&](int64_t i) {
    const real_t value = (row[i] - mean) * scale * weight[i] + bias[i];
    out[i] = static_cast<scalar_t>(gated ? value * static_cast<real_t>(u[i]) : value);
  };
  if constexpr (gated) {
    for_vectors(
        u, width,
        [&](int64_t i, Vec low, Vec high) {
          const int64_t next = i + Vec::size();
          store_vectors(normed(i, Vec::loadu(row + i)) * low, normed(next, Vec::loadu(row + next)) * high, out + i);
        },
        rest);
  } else {
    for_vectors(
        row, width,
        [&](int64_t i, Vec low, Vec high) { store_vectors(normed(i, low), normed(i + Vec::size(), high), out + i); },
        rest);
  }
}

// See `norm_row_with`; bf16_norm.h has another one for bf16, and of the next function too.
template <typename scalar_t>
void norm_row(
    const scalar_t* x, const scalar_t* u, const wide_t<scalar_t>* weight, const wide_t<scalar_t>* bias, double eps,
    int64_t width, wide_t<scalar_t>* wide, scalar_t* out) {
  if (u != nullptr) {
    norm_row_with<true>(x, u, weight, bias, eps, width, wide, out);
  } else {
    norm_row_with<false>(x, u, weight, bias, eps, width, wide, out);
  }
}

// A norm's parameter of width elements as `norm_row` wants it, [width rounded up to 32].
template <typename scalar_t>
void widen_parameter(const scalar_t* x, int64_t width, wide_t<scalar_t>* wide) {
  widen(x, width, wide);
}

// A norm's weight and bias as rows are normed with them.
template <typename scalar_t>
class NormParameters {
 public:
  using real_t = wide_t<scalar_t>;

  NormParameters(const scalar_t* weight, const scalar_t* bias, int64_t width)
      : padded_((width + 31) / 32 * 32), values_(new real_t[2 * padded_]) {
    widen_parameter(weight, width, values_.get());
    widen_parameter(bias, width, values_.get() + padded_);
  }

  const real_t* weight() const { return values_.get(); }
  const real_t* bias() const { return values_.get() + padded_; }

 private:
  int64_t padded_;
  std::unique_ptr<real_t[]> values_;
};

// out [rows, width] = LayerNorm(x), times u where there is one; the rows of x and u lie so far apart.
template <typename scalar_t>
void layer_norm(
    const scalar_t* x, int64_t x_stride, const scalar_t* u, int64_t u_stride, const scalar_t* weight,
    const scalar_t* bias, double eps, int64_t rows, int64_t width, scalar_t* out) {
  using real_t = wide_t<scalar_t>;
  const NormParameters<scalar_t> parameters(weight, bias, width);
  parallel_for(rows, std::max<int64_t>(1, ROW_GRAIN / width), [&](int64_t begin, int64_t end) {
    std::unique_ptr<real_t[]> wide(new real_t[width]);
    for (int64_t i = begin; i < end; ++i) {
      const scalar_t* factors = u == nullptr ? nullptr : u + i * u_stride;
      norm_row(
          x + i * x_stride, factors, parameters.weight(), parameters.bias(), eps, width, wide.get(), out + i * width);
    }
  });
}

// Copies rows of `bytes` each: source(i) to target(i).
template <typename source_t, typename target_t>
void copy_rows(int64_t count, int64_t bytes, const source_t& source, const target_t& target) {
  const int64_t grain = std::max<int64_t>(1, 4 * ROW_GRAIN / std::max<int64_t>(bytes, 1));
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(target(i), source(i), bytes);
    }
  });
}

}  // namespace hstu
