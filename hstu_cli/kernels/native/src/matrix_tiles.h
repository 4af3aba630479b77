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

#endif
