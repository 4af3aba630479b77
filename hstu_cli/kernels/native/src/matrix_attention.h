// Attention of some heads of a sequence in bf16 tiles: by `FewRows` or `ManyRows`, as the rows are.
#pragma once

#include "few_rows.h"
#include "many_rows.h"

#ifdef HSTU_BF16_TILES

namespace hstu {

class MatrixTiles {
 public:
  using scalar_type = bf16;
  using sum_type = float;
  using session_type = TileSession;
  static constexpr bool PACKS = true;  // the keys of many rows
  static constexpr int64_t MAX_HEADS = 16, CHUNK_KEYS = ManyRows::CHUNK_KEYS;
  static constexpr int64_t MOST_KEYS = std::max(FewRows::MOST_KEYS, CHUNK_KEYS);

  MatrixTiles(int64_t head_dim, double alpha) : few_(head_dim, alpha), many_(head_dim, alpha) {}

  void carve(Carver& carver, int64_t num_heads) {
    few_.carve(carver, num_heads);
    many_.carve(carver);
  }

  // Whether rows of a head meet packed keys.
  static bool are_many(int64_t padded_rows) { return padded_rows >= ManyRows::LEAST_ROWS; }

  ManyRows& many() { return many_; }
  const ManyRows& many() const { return many_; }

  template <typename row_t>
  void load_queries(int64_t head, int64_t num_rows, int64_t padded_rows, const row_t& row) {
    if (are_many(padded_rows)) {
      many_.load_queries(head, num_rows, padded_rows, row);
    } else {
      few_.load_queries(head, num_rows, padded_rows, row);
    }
  }

  int64_t sums_per_row() const { return few_.sums_per_row(); }  // the same in both, and so are sums themselves

  int64_t num_chunk_keys(int64_t num_heads) const { return few_.num_chunk_keys(num_heads); }

  void attend(const Keys<bf16>& keys, int64_t padded_rows, int64_t diagonal, float* sums, bool add) {
    few_.attend(keys, padded_rows, diagonal, sums, add);
  }

  bool write_row(const float* sums, int64_t i, float factor, bool stream, bf16* out) const {
    return few_.write_row(sums, i, factor, stream, out);
  }

  void read_row(const float* sums, int64_t i, float* row) const { few_.read_row(sums, i, row); }

 private:
  FewRows few_;
  ManyRows many_;
};

}  // namespace hstu

#endif
