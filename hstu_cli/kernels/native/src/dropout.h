// Dropout that is decided by a seed, a row and a column alone, so that no mask is kept.
#pragma once

#include <cstdint>
#include <cstring>

namespace hstu {

// Philox 4x32-10 of "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011): a keyed bijection of 128-bit counters. One
// call decides eight columns, 16 bits each.
struct Dropout {
  int64_t seed = 0;
  int64_t level = 0;  // of 2^16 elements so many are dropped

  static constexpr int64_t LANES = 16, COLUMNS = 8 * LANES;
  static int64_t padded(int64_t width) { return (width + COLUMNS - 1) / COLUMNS * COLUMNS; }

  // 16 random bits for each column of a row: [padded(width)].
  void draw(int64_t row, int64_t width, uint16_t* numbers) const {
    for (int64_t column = 0; column < width; column += COLUMNS) {
      uint32_t words[4][LANES];
      for (int64_t i = 0; i < LANES; ++i) {
        words[0][i] = static_cast<uint32_t>(column / COLUMNS * LANES + i);
        words[1][i] = static_cast<uint32_t>(row);
        words[2][i] = static_cast<uint32_t>(row >> 32);
        words[3][i] = 0;
      }
      scramble(words);
      std::memcpy(numbers + column, words, sizeof(words));
    }
  }

  template <typename real_t>
  void apply(const uint16_t* numbers, int64_t width, real_t* row) const {
    const auto factor = static_cast<real_t>(65536.0 / static_cast<double>(65536 - level));
    const auto dropped = static_cast<uint16_t>(level);
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) row[c] = numbers[c] < dropped ? real_t(0) : row[c] * factor;
  }

 private:
  void scramble(uint32_t (&words)[4][LANES]) const {
    auto key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma omp simd
      for (int64_t i = 0; i < LANES; ++i) {
        const uint64_t a = static_cast<uint64_t>(words[0][i]) * 0xD2511F53u;
        const uint64_t b = static_cast<uint64_t>(words[2][i]) * 0xCD9E8D57u;
        words[0][i] = static_cast<uint32_t>(b >> 32) ^ words[1][i] ^ key_0;
        words[2][i] = static_cast<uint32_t>(a >> 32) ^ words[3][i] ^ key_1;
        words[1][i] = static_cast<uint32_t>(b);
        words[3][i] = static_cast<uint32_t>(a);
      }
      key_0 += 0x9E3779B9u;
      key_1 += 0xBB67AE85u;
    }
  }
};

}  // namespace hstu
