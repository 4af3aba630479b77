// Products of bf16 tiles in vectors of x86 that multiply pairs (AVX-512 BF16), for CPUs without matrix units.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <cstring>

#include "tiles.h"

namespace hstu {

constexpr const char* TILE_UNITS = "vectors";

// As in `matrix_units.h`; products take ten times as long here.
inline int64_t lines_beside(int64_t wanted) { return std::clamp<int64_t>(wanted, 1, 16); }

// As in `matrix_units.h`. Vectors need no setting up; at its end what was streamed is in memory.
struct TileSession {
  TileSession() = default;
  ~TileSession() { _mm_sfence(); }
  TileSession(const TileSession&) = delete;
};

// So many rows of the left operand by 16 or 32 columns: their sums in 16 registers, one or two vectors of the right operand
// in others, each pair of the left one in all lanes of another. Sums of before are added last: shorter sums round less. So
// many lines are fetched meanwhile, a few beside each step: behind many at a time products would wait for their own.
template <int64_t rows, int64_t vectors, typename line_t>
__attribute__((noinline)) void multiply_rows(
    int64_t steps, const char* left, int64_t left_step, int64_t row_bytes, const Operands& right, float* sums, bool add,
    line_t& lines, int64_t num_lines) {
  constexpr int64_t PAIRS = STEP / 2;
  line_t line = lines;  // what only this function has stays in registers
  const int64_t at_a_time = (num_lines + steps - 1) / std::max<int64_t>(steps, 1);
  __m512 results[rows][vectors];
  for (auto& row : results) std::fill_n(row, vectors, _mm512_setzero_ps());
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t i = 0; i < std::min(at_a_time, num_lines); ++i) line();
    num_lines -= at_a_time;
    const char* pairs = left + step * left_step;
    const bf16* columns[] = {right.first + step * right.step, right.second + step * right.step};
    for (int64_t pair = 0; pair < PAIRS; ++pair, pairs += 4) {
      __m512bh across[vectors];
      for (int64_t j = 0; j < vectors; ++j) {
        across[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(columns[j] + pair * STEP));
      }
      for (int64_t i = 0; i < rows; ++i) {
        int32_t one;
        std::memcpy(&one, pairs + i * row_bytes, sizeof(one));
        const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(one));
        for (int64_t j = 0; j < vectors; ++j) results[i][j] = _mm512_dpbf16_ps(results[i][j], both, across[j]);
      }
    }
  }
  lines = line;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < vectors; ++j) {
      float* target = sums + i * 16 + j * SUM_TILE;
      _mm512_storeu_ps(target, add ? _mm512_add_ps(results[i][j], _mm512_loadu_ps(target)) : results[i][j]);
    }
  }
}

// As in `matrix_units.h`, but rows and columns that nobody wants are left out, 8 or 16 at a time. What runs beside the
// products has no units of its own here.
template <Reuse reuse = Reuse::both, typename steps_t, typename beside_t, typename line_t>
inline __attribute__((always_inline)) void multiply_steps(
    steps_t steps, const Operands& a, const Operands& b, const TileSums& sums, const beside_t& beside,
    const Lines<line_t>& lines) {
  const int64_t rows = sums.columns > 16 ? 8 : 16, wanted = std::clamp<int64_t>(sums.rows, 1, 32);
  const int64_t parts = (wanted + rows - 1) / rows, num_lines = (2 * steps * lines.each + parts - 1) / parts;
  if (!sums.add && (sums.rows <= 24 || sums.columns <= 16)) {
    std::fill_n(sums.tiles, 2 * SUM_TILE, 0.0f);
    std::fill_n(sums.tiles + sums.below, 2 * SUM_TILE, 0.0f);
  }
  for (int64_t part = 0; part < 4; ++part) {
    const int64_t row = part * rows, in_tile = row % 16;
    if (row < wanted) {
      const char* left = reinterpret_cast<const char*>(row < 16 ? a.first : a.second) + in_tile * a.row_bytes;
      float* target = sums.tiles + row / 16 * sums.below + in_tile * 16;
      const auto multiply = rows == 8 ? multiply_rows<8, 2, line_t> : multiply_rows<16, 1, line_t>;
      multiply(
          steps, left, a.step * static_cast<int64_t>(sizeof(bf16)), a.row_bytes, b, target, sums.add, lines.fetch,
          num_lines);
    }
    for (int64_t i = part * steps / 2; i < (part + 1) * steps / 2; ++i) beside(i);
  }
}

// What is compiled for the CPU runs on it, unless oneDNN, if torch has it, is told to do without AVX-512.
inline bool tile_units_work() {
  static const bool work = [] {
    const auto supported = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
    return !supported || supported->typed<bool()>().call();
  }();
  return work;
}

}  // namespace hstu
