// Linear layers in tiles: y = f(x W') of bf16, with the bias and SiLU or the residual added to the sums.
#pragma once

#include "matrix_tiles.h"

#ifdef HSTU_BF16_TILES

#include <atomic>

#include "plan.h"
#include "rows.h"
#include "scratch.h"
#include "threads.h"

namespace hstu {

// A weight [out, in] as right operands in the order in which they are used: [out / 32][in / 32][2] tiles. Zeros fill up
// both dimensions.
struct PackedWeight {
  static constexpr int64_t COLUMNS = 32;

  int64_t out, in;

  int64_t steps() const { return (in + STEP - 1) / STEP; }
  int64_t blocks() const { return (out + COLUMNS - 1) / COLUMNS; }
  int64_t block_size() const { return 2 * steps() * TILE; }
  int64_t size() const { return blocks() * block_size(); }

  void pack(const bf16* weight, bf16* packed) const {
    parallel_for(blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t half = 2 * begin; half < 2 * end; ++half) {  // 16 columns
        const int64_t columns = std::clamp<int64_t>(out - half * 16, 0, 16);
        for (int64_t step = 0; step < steps(); ++step) {
          load_transposed(
              [&](int64_t i) { return weight + (half * 16 + i) * in + step * STEP; }, columns,
              std::min(STEP, in - step * STEP), packed + half / 2 * block_size() + (2 * step + half % 2) * TILE);
        }
      }
    });
  }
};

inline __m512 load_as_float(const bf16* x, __mmask16 exist) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(exist, x)), 16));
}

// What becomes of 16 sums of a row from `column` on, of which those in `exist` are results.
struct BiasSilu {
  static constexpr int64_t MOST_ROWS = 512;  // in tiles at a time, in the second-level cache

  const bf16* bias;

  void fetch(int64_t /*row*/, int64_t /*column*/) const {}

  __m512 operator()(__m512 sums, int64_t /*row*/, int64_t column, __mmask16 exist) const {
    return silu_for_bf16(_mm512_add_ps(sums, load_as_float(bias + column, exist)), _mm512_set1_ps(-1.44269504f));
  }
};

struct AddResidual {
  static constexpr int64_t MOST_ROWS = 256;  // leaves room for as many rows of the residual

  const bf16* residual;
  int64_t stride;

  // What the next columns need: from memory it takes too long for these. Inlined by force: of a call that only fetches
  // g++ believes that it does nothing.
  inline __attribute__((always_inline)) void fetch(int64_t row, int64_t column) const {
    _mm_prefetch(residual + row * stride + column + PackedWeight::COLUMNS, _MM_HINT_T1);
  }

  __m512 operator()(__m512 sums, int64_t row, int64_t column, __mmask16 exist) const {
    return _mm512_add_ps(sums, load_as_float(residual + row * stride + column, exist));
  }
};

// Rows that are read next, brought closer line by line beside what is computed.
struct RowsAhead {
  const bf16* row;
  int64_t stride, width, c = 0;

  void fetch() {
    _mm_prefetch(row + c, _MM_HINT_T1);
    c += STEP;
    if (c < width) return;
    c = 0;
    row += stride;
  }
};

// Rows as they lie.
struct PlainRows {
  const bf16* x;
  int64_t stride;

  // Up to 16 rows as tiles, one for each 32 channels and so far apart; zeros behind the last row and channel. Tile by
  // tile, as lines of one row in all tiles would meet in few sets of the first-level cache.
  void load(int64_t row, int64_t count, int64_t width, bf16* tile, int64_t tiles_apart) const {
    for (int64_t c = 0; c < width; c += STEP, tile += tiles_apart) {
      for (int64_t i = 0; i < 16; ++i) {
        const __m512i values = i < count ? load_channels(x + (row + i) * stride, c, width) : _mm512_setzero_si512();
        _mm512_store_si512(tile + i * STEP, values);
      }
    }
  }
};

// The layer norm of rows, times u where there is one, taken on their way into tiles: no memory holds it.
struct NormedRows {
  const bf16 *x, *u;
  int64_t x_stride, u_stride;
  const float *weight, *bias;  // as `NormParameters` has them
  double eps;

  // See `PlainRows`.
  void load(int64_t row, int64_t count, int64_t width, bf16* tile, int64_t tiles_apart) const {
    RowNorm norms[16];
    for (int64_t i = 0; i < count; ++i) norms[i] = RowNorm(x + (row + i) * x_stride, eps, width);
    const bf16* factors = u == nullptr ? nullptr : u + row * u_stride;
    RowsAhead next_x{x + (row + 16) * x_stride, x_stride, width}, next_u{nullptr, u_stride, width};
    if (factors != nullptr) next_u.row = factors + 16 * u_stride;
    for (int64_t c = 0; c < width; c += STEP, tile += tiles_apart) {
      const NormBlock block(weight + c, bias + c);
      const __mmask32 exist = first_of_32(width - c);
      for (int64_t i = 0; i < count; ++i) {
        const bf16* factor = factors == nullptr ? nullptr : factors + i * u_stride + c;
        const __m512i values = block(norms[i], x + (row + i) * x_stride + c, factor, exist);
        _mm512_store_si512(tile + i * STEP, _mm512_maskz_mov_epi16(exist, values));
        next_x.fetch();
        if (factors != nullptr) next_u.fetch();
      }
      for (int64_t i = count; i < 16; ++i) _mm512_store_si512(tile + i * STEP, _mm512_setzero_si512());
    }
  }
};

// Rows divided into groups of about equal length, 32 rows at a time: into as many as are wanted, but none is empty.
struct RowGroups {
  int64_t rows, blocks, count;

  RowGroups(int64_t rows, int64_t wanted)
      : rows(rows),
        blocks((rows + ROW_STEP - 1) / ROW_STEP),
        count(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(blocks, 1))) {}

  int64_t begin(int64_t group) const { return std::min(rows, blocks * group / count * ROW_STEP); }
  int64_t end(int64_t group) const { return begin(group + 1); }
  int64_t most_rows() const { return (blocks + count - 1) / count * ROW_STEP; }
};

// Multiplies groups of rows, brought into tiles once, with blocks of 32 columns.
template <typename source_t>
class LinearWorker {
 public:
  LinearWorker(
      const source_t& source, const RowGroups& groups, const bf16* packed, const PackedWeight& weight, bf16* y,
      int64_t part_width)
      : source_(source),
        groups_(groups),
        packed_(packed),
        weight_(weight),
        y_(y),
        part_width_(part_width) {
    Carver sizes;
    carve(sizes);
    Carver carver(scratch(sizes.used()));
    carve(carver);
    stream_ = groups.rows * weight.out >= STREAMED && part_width % 32 == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
  }

  LinearWorker(const LinearWorker&) = delete;

  template <typename finish_t>
  void run(int64_t group, int64_t block_begin, int64_t block_end, const finish_t& finish) {
    const int64_t row_begin = groups_.begin(group), count = groups_.end(group) - row_begin;
    if (group != loaded_) load(row_begin, count);
    loaded_ = group;
    // Few rows need the weights as fast as these come, so close by, and in small portions, beside which rows have room.
    if (count <= FEW_ROWS) {
      multiply<Reuse::both, _MM_HINT_T0, 8>(row_begin, count, block_begin, block_end, finish);
    } else {
      multiply<Reuse::right, _MM_HINT_T1, 16>(row_begin, count, block_begin, block_end, finish);
    }
  }

 private:
  static constexpr int64_t FEW_ROWS = 64;

  void carve(Carver& carver) {
    carver.take(tiles_, groups_.most_rows() * weight_.steps() * STEP);
    carver.take(sums_, std::max<int64_t>(groups_.most_rows(), 2 * ROW_STEP) * PackedWeight::COLUMNS);
  }

  // The sums of up to 32 rows in 32 columns, and where their results belong. What becomes of them is computed beside the
  // next product, because vectors and matrices are different units.
  struct Sums {
    const float* tiles = nullptr;
    int64_t row = 0, count = 0, column = 0;
    __mmask32 exist = 0;
    bf16* y = nullptr;
    int64_t y_stride = 0;
    bool stream = false;

    // Results of rows begin to end.
    template <typename finish_t>
    inline __attribute__((always_inline)) void store(int64_t begin, int64_t end, const finish_t& finish) const {
      for (int64_t i = begin; i < std::min(end, count); ++i) {
        const float* tile = tiles + i / 16 * 2 * SUM_TILE + i % 16 * 16;
        const __m512 low = finish(_mm512_load_ps(tile), row + i, column, static_cast<__mmask16>(exist));
        const __m512 high =
            finish(_mm512_load_ps(tile + SUM_TILE), row + i, column + 16, static_cast<__mmask16>(exist >> 16));
        const __m512i both = round_to_bf16(low, high);
        if (stream) {
          _mm512_stream_si512(reinterpret_cast<__m512i*>(y + i * y_stride), both);
        } else {
          _mm512_mask_storeu_epi16(y + i * y_stride, exist, both);
        }
      }
    }
  };

  // Where the sums of rows from `row` on are while a block of columns is multiplied. Those of a single step of rows change
  // places from block to block: the last block's are still read beside its products.
  float* place(int64_t row, int64_t count, int64_t block) const {
    return sums_ + (count > ROW_STEP ? row : block % 2 * ROW_STEP) * PackedWeight::COLUMNS;
  }

  // The sums of rows from `row` on in a block of columns.
  Sums sums_of(int64_t row_begin, int64_t row, int64_t count, int64_t block) const {
    const int64_t column = block * PackedWeight::COLUMNS;
    bf16* part = y_ + column / part_width_ * groups_.rows * part_width_ + column % part_width_;
    return {
        place(row, count, block),
        row_begin + row,
        std::min<int64_t>(32, count - row),
        column,
        first_of_32(weight_.out - column),
        part + (row_begin + row) * part_width_,
        part_width_,
        stream_};
  }

  // Multiplies blocks in portions of so many tiles, each with all rows.
  template <Reuse reuse, auto hint, int64_t most_depth, typename finish_t>  // hint: one of _MM_HINT, an int to clang
  void multiply(int64_t row_begin, int64_t count, int64_t block_begin, int64_t block_end, const finish_t& finish) {
    const int64_t steps = weight_.steps();
    Sums done;
    for (int64_t block = block_begin; block < block_end; ++block) {
      for (int64_t step = 0; step < steps; step += most_depth) {
        const auto multiply_depth = [&](auto depth) __attribute__((always_inline)) {
          done = multiply_portion<reuse, hint>(depth, step, block, row_begin, count, done, finish);
        };
        if (steps - step >= most_depth) {
          multiply_depth(std::integral_constant<int64_t, most_depth>());  // a loop of known length
        } else {
          multiply_depth(steps - step);
        }
      }
    }
    done.store(0, 32, finish);
  }

  // Multiplies all rows with a portion of a block, as deep as a number or, for a loop of known length, a constant says.
  // done: sums whose results are stored beside the first products; returned are those left for the next portion.
  template <Reuse reuse, auto hint, typename depth_t, typename finish_t>
  inline __attribute__((always_inline)) Sums multiply_portion(
      depth_t depth, int64_t step, int64_t block, int64_t row_begin, int64_t count, Sums done, const finish_t& finish) {
    const int64_t steps = weight_.steps();
    const bool last = step + depth == steps;
    const int64_t rows_each = (32 + 2 * depth - 1) / (2 * depth);  // whose results are stored at a time
    const bf16* right = packed_ + block * weight_.block_size() + 2 * step * TILE;
    // What is multiplied next comes from memory meanwhile, a few lines at a time.
    NextLine<hint> next{right + 2 * depth * TILE};
    const Lines<NextLine<hint>> lines{next, std::max<int64_t>(1, 16 * 32 / round_up(count, 32))};
    for (int64_t row = 0; row < count; row += 32) {
      const bf16* left = tiles_ + row * steps * STEP + 2 * step * TILE;
      float* sums = place(row, count, block);
      const auto add = [&](const auto& beside) __attribute__((always_inline)) {
        multiply_steps<reuse>(
            depth, {left, left + TILE, 2 * TILE}, {right, right + TILE, 2 * TILE},
            {sums, step > 0, 2 * SUM_TILE, count - row},
            [&](int64_t i) __attribute__((always_inline)) {
              beside(i);
              done.store(i * rows_each, (i + 1) * rows_each, finish);
            },
            lines);
      };
      if (last) {
        add([&](int64_t i) __attribute__((always_inline)) {
          for (int64_t j = i * rows_each; j < (i + 1) * rows_each; ++j) {
            finish.fetch(row_begin + row + j, block * PackedWeight::COLUMNS);
          }
        });
      } else {
        add([](int64_t) {});
      }
      done = last ? sums_of(row_begin, row, count, block) : Sums{};
    }
    return done;
  }

  // Rows as left operands: [rows / 32][steps][2].
  void load(int64_t row_begin, int64_t count) {
    const int64_t steps = weight_.steps();
    for (int64_t i = 0; i < round_up(count, 32); i += 16) {
      bf16* tiles = tiles_ + i / 32 * 2 * steps * TILE + i % 32 / 16 * TILE;
      source_.load(row_begin + i, std::clamp<int64_t>(count - i, 0, 16), weight_.in, tiles, 2 * TILE);
    }
  }

  source_t source_;
  RowGroups groups_;
  const bf16* packed_;
  const PackedWeight& weight_;
  bf16* y_;
  int64_t part_width_, loaded_ = -1;
  bf16* tiles_;
  float* sums_;
  bool stream_;
  TileSession session_;
};

// How a product is divided into tasks: groups of rows by parts of the columns.
struct Division {
  RowGroups groups;
  int64_t parts;
};

// Where each thread gets rows enough for the weights that it reads, it takes as many groups as the others, with all
// columns: so each row is brought into tiles once. Else all threads share a group's columns.
inline Division divide(int64_t rows, int64_t most_rows, const PackedWeight& weight) {
  constexpr int64_t LEAST_ROWS = 128, TASKS_PER_THREAD = 8;
  const int64_t threads = at::get_num_threads(), least = std::max<int64_t>(1, (rows + most_rows - 1) / most_rows);
  const bool by_rows = threads == 1 || (least > 1 && rows >= LEAST_ROWS * threads);
  const int64_t most_parts = std::max<int64_t>(1, weight.blocks());
  const int64_t groups = by_rows ? round_up(least, threads) : least, wanted = TASKS_PER_THREAD * threads;
  const int64_t parts = by_rows ? 1 : std::clamp((wanted + groups - 1) / groups, int64_t(1), most_parts);
  return {RowGroups(rows, groups), parts};
}

// y [out / part_width, rows, part_width] = finish(x W') of the rows of a source, [rows, in], columns in parts of as
// many, of which all are multiples of 32 or there is one.
template <typename source_t, typename finish_t>
void linear(
    const source_t& source, int64_t rows, const bf16* packed, const PackedWeight& weight, bf16* y, int64_t part_width,
    const finish_t& finish) {
  const Division division = divide(rows, finish_t::MOST_ROWS, weight);
  const int64_t parts = division.parts, num_tasks = division.groups.count * parts;
  const int64_t part_blocks = (weight.blocks() + parts - 1) / parts;
  std::atomic<int64_t> next{0};
  parallel_for(at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      LinearWorker<source_t> worker(source, division.groups, packed, weight, y, part_width);
      for (int64_t i = next++; i < num_tasks; i = next++) {
        const int64_t first = std::min(i % parts * part_blocks, weight.blocks());
        worker.run(i / parts, first, std::min(first + part_blocks, weight.blocks()), finish);
      }
    }
  });
}

}  // namespace hstu

#endif
