// Operators on rows: layer norms, and copies of keys and values into pages.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace hstu {

constexpr int64_t ROW_GRAIN = 1 << 15;  // elements that are worth waking a thread

// The sum of f(x) over a row; lanes behind its end add nothing.
template <typename real_t, typename f_t>
real_t sum_of(const real_t* x, int64_t width, const f_t& f) {
  using Vec = at::vec::Vectorized<real_t>;
  Vec sums[2] = {Vec(real_t(0)), Vec(real_t(0))};
  int64_t i = 0;
  for (; i + 2 * Vec::size() <= width; i += 2 * Vec::size()) {
    sums[0] = sums[0] + f(Vec::loadu(x + i));
    sums[1] = sums[1] + f(Vec::loadu(x + i + Vec::size()));
  }
  real_t lanes[Vec::size()];
  (sums[0] + sums[1]).store(lanes);
  real_t sum = 0;
  for (const real_t lane : lanes) sum += lane;
  for (; i < width; ++i) {
    real_t one[Vec::size()];
    f(Vec(x[i])).store(one);
    sum += one[0];
  }
  return sum;
}

// out [rows, width] = LayerNorm(x), times u where there is one; the rows of x and u lie so far apart.
template <typename scalar_t>
void layer_norm(
    const scalar_t* x, int64_t x_stride, const scalar_t* u, int64_t u_stride, const scalar_t* weight,
    const scalar_t* bias, double eps, int64_t rows, int64_t width, scalar_t* out) {
  using real_t = wide_t<scalar_t>;
  std::vector<real_t> parameters(2 * width);
  widen(weight, width, parameters.data());
  widen(bias, width, parameters.data() + width);
  at::parallel_for(0, rows, std::max<int64_t>(1, ROW_GRAIN / width), [&](int64_t begin, int64_t end) {
    using Vec = at::vec::Vectorized<real_t>;
    std::vector<real_t> wide(2 * width);
    real_t *row = wide.data(), *factor = row + width;
    const real_t *w = parameters.data(), *b = w + width;
    for (int64_t i = begin; i < end; ++i) {
      widen(x + i * x_stride, width, row);
      const auto mean = sum_of(row, width, [](Vec v) { return v; }) / static_cast<real_t>(width);
      const Vec mean_lanes(mean);
      const auto squares = sum_of(row, width, [&](Vec v) { return (v - mean_lanes) * (v - mean_lanes); });
      const auto scale = real_t(1) / std::sqrt(squares / static_cast<real_t>(width) + static_cast<real_t>(eps));
      for (int64_t c = 0; c < width; ++c) {
        row[c] = (row[c] - mean) * scale * w[c] + b[c];
      }
      if (u != nullptr) {
        widen(u + i * u_stride, width, factor);
        for (int64_t c = 0; c < width; ++c) {
          row[c] *= factor[c];
        }
      }
      narrow(row, width, out + i * width);
    }
  });
}

// Copies rows of `bytes` each: source(i) to target(i).
template <typename source_t, typename target_t>
void copy_rows(int64_t count, int64_t bytes, const source_t& source, const target_t& target) {
  const int64_t grain = std::max<int64_t>(1, 4 * ROW_GRAIN / std::max<int64_t>(bytes, 1));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(target(i), source(i), bytes);
    }
  });
}

}  // namespace hstu
