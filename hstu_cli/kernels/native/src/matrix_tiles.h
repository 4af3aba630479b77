// Products of bf16 tiles: in matrix units where they are compiled for a CPU that has them, else in vectors that multiply pairs
// of bf16. The rest of `matrix_*.h` is the same for both.
#pragma once

#include "tiles.h"

#ifdef HSTU_BF16_TILES

// Older versions of clang spell these without the line.
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && (defined(__AMX_TILE__) || defined(__AMXTILE__))
#include "matrix_units.h"
#else
#include "vector_units.h"
#endif

namespace hstu {

template <Reuse reuse = Reuse::both, typename steps_t, typename beside_t>
inline __attribute__((always_inline)) void multiply_steps(
    steps_t steps, const Operands& a, const Operands& b, const TileSums& sums, const beside_t& beside) {
  NoLine none;
  multiply_steps<reuse>(steps, a, b, sums, beside, Lines<NoLine>{none, 0});
}

inline void multiply_steps(int64_t steps, const Operands& a, const Operands& b, const TileSums& sums) {
  multiply_steps(steps, a, b, sums, [](int64_t) {});
}

}  // namespace hstu

#endif
