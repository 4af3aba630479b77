// Matrix products of training in tiles: bf16 operands that either lie as they are multiplied or transposed.
#pragma once

#include "matrix_linear.h"

#ifdef HSTU_BF16_TILES

namespace hstu {

// A matrix whose rows are contiguous and so many elements apart.
struct Matrix {
  const bf16* data;
  int64_t rows, columns, stride;

  const bf16* row(int64_t i) const { return data + i * stride; }
};

// Rows 32 step to 32 step + 31 and 32 columns as pairs of rows: 16 rows of even columns and of odd ones.
inline void interleave_step(const Matrix& m, int64_t step, int64_t column, bf16* even, bf16* odd) {
  for (int64_t pair = 0; pair < 16; ++pair) {
    const int64_t row = step * STEP + 2 * pair;
    auto columns = [&](int64_t i) {
      return i < m.rows ? load_channels(m.row(i) + column, 0, m.columns - column) : _mm512_setzero_si512();
    };
    interleave_rows(columns(row), columns(row + 1), even + pair * STEP, odd + pair * STEP);
  }
}

// The right operand of a product, [depth, columns], packed as `PackedWeight` says. Of a matrix that lies so, the even
// columns of 32 are in one tile and the odd ones in the other (`interleaved`).
struct RightOperand {
  PackedWeight shape;  // out: columns, in: depth
  bool interleaved;
  Array<bf16> memory;

  const bf16* tiles() const { return memory.get(); }

  // m [columns, depth] where `transposed`, else [depth, columns].
  RightOperand(const Matrix& m, bool transposed)
      : shape{transposed ? m.rows : m.columns, transposed ? m.columns : m.rows}, interleaved(!transposed) {
    memory = allocate<bf16>(shape.size());
    bf16* packed = memory.get();
    if (transposed) {
      shape.pack(m.data, packed);
      return;
    }
    parallel_for(shape.steps(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t step = begin; step < end; ++step) {
        for (int64_t block = 0; block < shape.blocks(); ++block) {
          bf16* tile = packed + block * shape.block_size() + 2 * step * TILE;
          interleave_step(m, step, block * PackedWeight::COLUMNS, tile, tile + TILE);
        }
      }
    });
  }
};

// Multiplies groups of rows, brought into tiles chunk by chunk of the depth, with blocks of 32 columns.
class ProductWorker {
 public:
  // left [rows, depth], or [depth, rows] where `transposed`: then even rows of 32 come before the odd ones.
  ProductWorker(
      const Matrix& left, bool transposed, const RightOperand& right, const RowGroups& groups, int64_t chunk_steps,
      int64_t part_blocks)
      : left_(left),
        transposed_(transposed),
        right_(right),
        groups_(groups),
        chunk_steps_(chunk_steps),
        part_blocks_(part_blocks) {
    Carver sizes;
    carve(sizes);
    Carver carver(scratch(sizes.used()));
    carve(carver);
  }

  ProductWorker(const ProductWorker&) = delete;

  // finish(row, column, low, high, exist): 32 sums of a row from a column on.
  template <typename finish_t>
  void run(int64_t group, int64_t block_begin, int64_t block_end, const finish_t& finish) {
    const int64_t row_begin = groups_.begin(group), count = groups_.end(group) - row_begin;
    const int64_t steps = right_.shape.steps();
    for (int64_t chunk = 0; chunk < steps; chunk += chunk_steps_) {
      const int64_t chunk_end = std::min(chunk + chunk_steps_, steps);
      if (group != loaded_group_ || chunk != loaded_chunk_) load(row_begin, count, chunk, chunk_end);
      loaded_group_ = group;
      loaded_chunk_ = chunk;
      for (int64_t block = block_begin; block < block_end; ++block) {
        float* block_sums = sums_ + (chunk_steps_ < steps ? (block - block_begin) * groups_.most_rows() * 32 : 0);
        for (int64_t step = chunk; step < chunk_end; step += DEPTH) {
          const int64_t depth = std::min(DEPTH, chunk_end - step);
          const bf16* right = right_.tiles() + block * right_.shape.block_size() + 2 * step * TILE;
          // What is multiplied next comes from memory meanwhile, a few lines at a time.
          NextLine<_MM_HINT_T1> next{right + 2 * depth * TILE};
          const Lines<NextLine<_MM_HINT_T1>> lines{next, std::max<int64_t>(1, 16 * 32 / round_up(count, 32))};
          for (int64_t row = 0; row < count; row += 32) {
            const bf16* left = tiles_ + row * (chunk_end - chunk) * STEP + 2 * (step - chunk) * TILE;
            float* sums = block_sums + row * 32;
            multiply_steps<Reuse::right>(
                depth, {left, left + TILE, 2 * TILE}, {right, right + TILE, 2 * TILE},
                {sums, step > 0, 2 * SUM_TILE, transposed_ ? 32 : count - row}, [](int64_t) {}, lines);
            if (step + depth == steps) {
              store(row_begin + row, std::min<int64_t>(32, count - row), block * 32, sums, finish);
            }
          }
        }
      }
    }
  }

 private:
  static constexpr int64_t DEPTH = 16;  // tiles at a time of the right operand: with all rows, from the first-level cache

  void carve(Carver& carver) {
    const bool whole = chunk_steps_ >= right_.shape.steps();
    carver.take(tiles_, groups_.most_rows() * std::min(chunk_steps_, right_.shape.steps()) * STEP);
    carver.take(sums_, groups_.most_rows() * 32 * (whole ? 1 : part_blocks_));
  }

  // Left operands: [rows / 32][steps][2].
  void load(int64_t row_begin, int64_t count, int64_t chunk, int64_t chunk_end) {
    const int64_t steps = chunk_end - chunk;
    if (transposed_) {
      alignas(64) bf16 even[TILE], odd[TILE];
      for (int64_t step = 0; step < steps; ++step) {
        for (int64_t i = 0; i < count; i += 32) {
          bf16* tile = tile_at(i, step, steps);
          interleave_step(left_, chunk + step, row_begin + i, even, odd);
          transpose_tile(even, tile);
          transpose_tile(odd, tile + TILE);
        }
      }
      return;
    }
    const PlainRows rows{left_.data + chunk * STEP, left_.stride};
    const int64_t width = std::min(steps * STEP, left_.columns - chunk * STEP);
    for (int64_t i = 0; i < round_up(count, 32); i += 16) {
      bf16* tiles = tile_at(i / 32 * 32, 0, steps) + i % 32 / 16 * TILE;
      rows.load(row_begin + i, std::clamp<int64_t>(count - i, 0, 16), width, tiles, 2 * TILE);
    }
  }

  // The first of a step's two tiles of 32 rows.
  bf16* tile_at(int64_t row, int64_t step, int64_t steps) const {
    return tiles_ + row * steps * STEP + 2 * step * TILE;
  }

  template <typename finish_t>
  void store(int64_t row, int64_t count, int64_t column, const float* sums, const finish_t& finish) {
    const __mmask32 exist = first_of_32(right_.shape.out - column);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = transposed_ ? i / 2 + i % 2 * 16 : i;  // among the rows of the tiles
      const float* tile = sums + place / 16 * 2 * SUM_TILE + place % 16 * 16;
      const __m512 a = _mm512_load_ps(tile), b = _mm512_load_ps(tile + SUM_TILE);
      if (right_.interleaved) {
        finish(row + i, column, in_order<0>(a, b), in_order<1>(a, b), exist);
      } else {
        finish(row + i, column, a, b, exist);
      }
    }
  }

  const Matrix& left_;
  bool transposed_;
  const RightOperand& right_;
  RowGroups groups_;
  int64_t chunk_steps_, part_blocks_, loaded_group_ = -1, loaded_chunk_ = -1;
  bf16* tiles_;
  float* sums_;
  TileSession session_;
};

// finish gets all of left times right, 32 sums at a time; left [rows, depth], or [depth, rows] where `transposed`.
template <typename finish_t>
void multiply_matrices(const Matrix& left, bool transposed, const RightOperand& right, const finish_t& finish) {
  // A group's tiles, and where the depth comes in chunks its sums too, stay in the second-level cache.
  constexpr int64_t CHUNK_STEPS = 64, SHALLOW_STEPS = 32, CHUNKED_BLOCKS = 32, TASKS_PER_THREAD = 2;
  const int64_t rows = transposed ? left.columns : left.rows, threads = at::get_num_threads();
  const int64_t steps = right.shape.steps(), blocks = right.shape.blocks();
  const int64_t most_rows = steps <= SHALLOW_STEPS ? 512 : 256;
  const int64_t least = (rows + most_rows - 1) / most_rows;
  const RowGroups groups(rows, least == 1 ? 1 : round_up(least, threads));
  const int64_t wanted = groups.count % threads == 0 ? 1 : (TASKS_PER_THREAD * threads + groups.count - 1) / groups.count;
  const int64_t parts = std::clamp<int64_t>(
      steps > CHUNK_STEPS ? std::max(wanted, (blocks + CHUNKED_BLOCKS - 1) / CHUNKED_BLOCKS) : wanted, 1, blocks);
  const int64_t part_blocks = (blocks + parts - 1) / parts;
  std::atomic<int64_t> next{0};
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      ProductWorker worker(left, transposed, right, groups, CHUNK_STEPS, part_blocks);
      for (int64_t i = next++; i < groups.count * parts; i = next++) {
        const int64_t first = std::min(i % parts * part_blocks, blocks);
        worker.run(i / parts, first, std::min(first + part_blocks, blocks), finish);
      }
    }
  });
}

// Stores rows, past the caches where they are many: memory need not be read first then.
struct StoreRows {
  bf16* data;
  int64_t stride;
  bool stream;

  StoreRows(bf16* data, int64_t rows, int64_t columns)
      : data(data),
        stride(columns),
        stream(rows * columns >= 8 << 20 && columns % 32 == 0 && reinterpret_cast<uintptr_t>(data) % 64 == 0) {}

  void put(int64_t row, int64_t column, __m512i values, __mmask32 exist) const {
    bf16* target = data + row * stride + column;
    if (stream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target), values);
    } else {
      _mm512_mask_storeu_epi16(target, exist, values);
    }
  }

  void operator()(int64_t row, int64_t column, __m512 low, __m512 high, __mmask32 exist) const {
    put(row, column, round_to_bf16(low, high), exist);
  }
};

// Adds a bias; stores what SiLU is taken of and, where wanted, SiLU of that as it was rounded.
struct StoreActivated {
  const bf16* bias;
  StoreRows linear, activated;

  void operator()(int64_t row, int64_t column, __m512 low, __m512 high, __mmask32 exist) const {
    low = _mm512_add_ps(low, load_as_float(bias + column, static_cast<__mmask16>(exist)));
    high = _mm512_add_ps(high, load_as_float(bias + column + 16, static_cast<__mmask16>(exist >> 16)));
    const __m512i rounded = round_to_bf16(low, high);
    linear.put(row, column, rounded, exist);
    const __m512 factor = _mm512_set1_ps(-1.44269504f);
    low = silu_for_bf16(widen_half<0>(rounded), factor);
    high = silu_for_bf16(widen_half<1>(rounded), factor);
    activated.put(row, column, round_to_bf16(low, high), exist);
  }

  template <int half>
  static __m512 widen_half(__m512i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(values, half)), 16));
  }
};

struct StoreSum {
  const bf16* residual;
  int64_t residual_stride;
  StoreRows rows;

  void operator()(int64_t row, int64_t column, __m512 low, __m512 high, __mmask32 exist) const {
    const bf16* other = residual + row * residual_stride + column;
    low = _mm512_add_ps(low, load_as_float(other, static_cast<__mmask16>(exist)));
    high = _mm512_add_ps(high, load_as_float(other + 16, static_cast<__mmask16>(exist >> 16)));
    rows(row, column, low, high, exist);
  }
};

}  // namespace hstu

#endif
