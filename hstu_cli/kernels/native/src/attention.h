// HSTU attention of a batch: runs each task on the tiles of one thread, adds up the tasks that share rows.
#pragma once

#include <atomic>
#include <cmath>
#include <memory>

#include "matrix_attention.h"
#include "packed_keys.h"
#include "plan.h"
#include "scratch.h"
#include "threads.h"
#include "vector_attention.h"
#include "vectors.h"

namespace hstu {

template <typename tiles_t>
class Worker {
  using scalar_t = typename tiles_t::scalar_type;
  using real_t = typename tiles_t::sum_type;

 public:
  // partial_sums: where tasks that share rows leave theirs.
  Worker(const Batch<scalar_t>& batch, const PackedKeys<tiles_t>& packed, int64_t num_heads, real_t* partial_sums)
      : batch_(batch), packed_(packed), tiles_(batch.head_dim, batch.alpha), partial_sums_(partial_sums) {
    Carver sizes;
    carve(sizes, num_heads);
    Carver carver(scratch(sizes.used()));
    carve(carver, num_heads);
  }

  static int64_t sums_per_row(const Batch<scalar_t>& batch) {
    return tiles_t(batch.head_dim, batch.alpha).sums_per_row();
  }

  void run(const Task& task) {
    const Sequence& s = batch_.sequences[task.sequence];
    const int64_t rows = task.padded_rows(), head_sums = rows * tiles_.sums_per_row();
    real_t* sums = task.num_parts > 1 ? partial_sums_ + task.sums_offset * tiles_.sums_per_row() : sums_;
    if (task.key_begin == task.key_end) std::fill(sums, sums + task.num_heads() * head_sums, real_t(0));
    for (int64_t head = task.head_begin; head < task.head_end && task.key_begin < task.key_end; ++head) {
      tiles_.load_queries(head - task.head_begin, task.num_rows(), rows, [&](int64_t i) {
        return batch_.q.at(s.first_row + task.row_begin + i, head);
      });
    }
    bool packed = false;
    if constexpr (tiles_t::PACKS) packed = tiles_t::are_many(rows);
    if (packed) {
      meet_packed_keys(task, sums);
    } else {
      meet_keys(task, sums);
    }
    if (task.num_parts > 1) return;
    for (int64_t slot = 0; slot < task.num_heads(); ++slot) {
      finish(task, task.head_begin + slot, sums + slot * head_sums);
    }
  }

  // Adds the parts of a head's rows up, always in the same order, and writes the rows. first: the task of part 0.
  void combine(const Task& first, int64_t head) {
    const int64_t head_sums = first.padded_rows() * tiles_.sums_per_row();
    const real_t* part =
        partial_sums_ + first.sums_offset * tiles_.sums_per_row() + (head - first.head_begin) * head_sums;
    std::copy(part, part + head_sums, sums_);
    for (int64_t i = 1; i < first.num_parts; ++i) {
      part += first.num_heads() * head_sums;
      for (int64_t c = 0; c < head_sums; ++c) {
        sums_[c] += part[c];
      }
    }
    finish(first, head, sums_);
  }

 private:
  void carve(Carver& carver, int64_t num_heads) {
    tiles_.carve(carver, num_heads);
    carver.take(sums_, QUERY_ROWS * tiles_.sums_per_row());
    carver.take(row_, tiles_.sums_per_row());
    carver.take(own_, 2 * batch_.head_dim);
    carver.take(key_rows_, tiles_t::MOST_KEYS);
    carver.take(next_rows_, tiles_t::MOST_KEYS);
    if constexpr (tiles_t::PACKS) carver.take(chunk_, tiles_.many().chunk_size());
  }

  // The keys as they lie, chunk by chunk.
  void meet_keys(const Task& task, real_t* sums) {
    const Sequence& s = batch_.sequences[task.sequence];
    const int64_t own_key = s.num_cached + task.row_begin;  // of the first row, the last one that it sees
    const int64_t chunk = tiles_.num_chunk_keys(task.num_heads());
    auto find = [&](int64_t begin, KeyRow<scalar_t>* rows) {
      const int64_t end = std::min(begin + chunk, task.key_end);
      batch_.find_rows(s, task.head_begin, begin, end, rows);
      return end;
    };
    int64_t next = find(task.key_begin, key_rows_);
    for (int64_t begin = task.key_begin; begin < task.key_end;) {
      const int64_t end = next;
      next = find(end, next_rows_);
      const Keys<scalar_t> keys{key_rows_, end - begin, next_rows_, next - end, task.num_heads()};
      tiles_.attend(keys, task.padded_rows(), begin - own_key, sums, begin > task.key_begin);
      std::swap(key_rows_, next_rows_);
      begin = end;
    }
  }

  // The keys as they were packed for all tasks, or are now for this one.
  void meet_packed_keys(const Task& task, real_t* all_sums) {
    if constexpr (tiles_t::PACKS) {
      constexpr int64_t CHUNK = tiles_t::CHUNK_KEYS;
      const Sequence& s = batch_.sequences[task.sequence];
      const int64_t rows = task.padded_rows(), own_key = s.num_cached + task.row_begin;
      for (int64_t head = task.head_begin; head < task.head_end; ++head) {
        const bool shared = packed_.has(task.sequence, head);
        real_t* sums = all_sums + (head - task.head_begin) * rows * tiles_.sums_per_row();
        for (int64_t begin = task.key_begin, end; begin < task.key_end; begin = end) {
          const int64_t chunk_begin = begin / CHUNK * CHUNK;
          end = std::min(chunk_begin + CHUNK, task.key_end);
          const scalar_t *chunk = chunk_, *next = nullptr;
          if (shared) {
            chunk = packed_.chunk(task.sequence, head, chunk_begin);
            if (end < task.key_end) next = packed_.chunk(task.sequence, head, end);
          } else {
            batch_.find_rows(s, head, begin, end, key_rows_);
            tiles_.many().pack(key_rows_, end - begin, 1, chunk_, 0);
          }
          const int64_t first = shared ? begin - chunk_begin : 0;  // of these keys in the chunk
          tiles_.many().attend(
              head - task.head_begin, chunk, first, first + end - begin, next, rows, begin - own_key, sums,
              begin > task.key_begin);
        }
      }
    }
  }

  // Writes a head's rows: the sums over the keys before the candidates and, of a candidate, its own value.
  void finish(const Task& task, int64_t head, const real_t* sums) {
    const Sequence& s = batch_.sequences[task.sequence];
    const auto scale = static_cast<real_t>(batch_.alpha / batch_.scaling_seqlen);
    const int64_t d = batch_.head_dim;
    for (int64_t i = 0; i < task.num_rows(); ++i) {
      const int64_t row = task.row_begin + i, token = s.first_row + row;
      scalar_t* out = batch_.out + (token * batch_.num_heads + head) * d;
      if (row < s.num_new - s.num_candidates && tiles_.write_row(sums, i, scale, batch_.stream, out)) continue;
      tiles_.read_row(sums, i, row_);
      for (int64_t c = 0; c < d; ++c) {
        row_[c] *= scale;
      }
      if (row >= s.num_new - s.num_candidates) add_own_value(token, head);
      narrow(row_, d, out);
    }
  }

  // A candidate sees itself, too: adds SiLU(q k') v of one token. What the next token needs is fetched meanwhile.
  void add_own_value(int64_t token, int64_t head) {
    const int64_t d = batch_.head_dim;
    real_t *left = own_, *right = own_ + d;  // q and k, then v in the place of q
    const auto bring = [&](const Rows<scalar_t>& rows, real_t* wide) {
      const scalar_t* row = rows.at(token, head);
      for (int64_t c = 0; c < d; c += 64 / sizeof(scalar_t)) __builtin_prefetch(row + rows.token_stride + c);
      widen(row, d, wide);
    };
    bring(batch_.q, left);
    bring(batch_.k, right);
    constexpr int64_t LANES = 16;  // sums side by side, as one after another they would wait for each other
    real_t sums[LANES] = {}, score = 0;
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) {
      for (int64_t i = 0; i < LANES; ++i) sums[i] += left[c + i] * right[c + i];
    }
    for (; c < d; ++c) score += left[c] * right[c];
    for (const real_t sum : sums) score += sum;
    score *= static_cast<real_t>(batch_.alpha);
    const real_t weight = score / (1 + std::exp(-score)) / static_cast<real_t>(batch_.scaling_seqlen);
    bring(batch_.v, left);
    for (c = 0; c < d; ++c) row_[c] += weight * left[c];
  }

  const Batch<scalar_t>& batch_;
  const PackedKeys<tiles_t>& packed_;
  tiles_t tiles_;
  real_t *partial_sums_, *sums_, *row_, *own_;  // row_: one row of results; own_: two rows, widened
  KeyRow<scalar_t> *key_rows_, *next_rows_;
  scalar_t* chunk_ = nullptr;  // that this task packs for itself
};

// Runs f(worker, i) for every i below count, the next free thread taking the next i.
template <typename tiles_t, typename make_t, typename run_t>
void on_threads(int64_t count, int64_t num_threads, const make_t& make, const run_t& run) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min(count, num_threads), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      auto worker = make();
      [[maybe_unused]] const typename tiles_t::session_type session;
      for (int64_t i = next++; i < count; i = next++) {
        run(worker, i);
      }
    }
  });
}

template <typename tiles_t>
void attention(const Batch<typename tiles_t::scalar_type>& batch) {
  const int64_t max_heads = std::min(tiles_t::MAX_HEADS, batch.num_heads);
  Plan plan = make_plan(batch.sequences, batch.num_heads, at::get_num_threads(), max_heads);
  const int64_t sums_per_row = Worker<tiles_t>::sums_per_row(batch);
  // Waking threads costs more than the smallest batches do.
  const int64_t num_threads = plan.cost * static_cast<double>(sums_per_row) < 2e5 ? 1 : at::get_num_threads();
  using real_t = typename tiles_t::sum_type;
  const Array<real_t> partial_sums = allocate<real_t>(plan.num_partial_rows * sums_per_row);
  PackedKeys<tiles_t> packed(batch);
  auto make = [&] { return Worker<tiles_t>(batch, packed, max_heads, partial_sums.get()); };
  for (int64_t first = 0, last; first < packed.num_heads(); first = last) {
    last = packed.pack(first);
    std::vector<const Task*> tasks;  // of rows so many that each is of one head where keys are held
    for (const Task& task : plan.tasks) {
      const int64_t head = packed.index(task.sequence, task.head_begin);
      if (first <= head && head < last) tasks.push_back(&task);
    }
    on_threads<tiles_t>(static_cast<int64_t>(tasks.size()), num_threads, make, [&](auto& worker, int64_t i) {
      worker.run(*tasks[i]);
    });
  }
  if (!plan.num_partial_rows) return;
  std::vector<std::pair<const Task*, int64_t>> shared;  // and a head of it
  for (const Task& task : plan.tasks) {
    for (int64_t head = task.head_begin; task.num_parts > 1 && task.part == 0 && head < task.head_end; ++head) {
      shared.emplace_back(&task, head);
    }
  }
  on_threads<tiles_t>(static_cast<int64_t>(shared.size()), num_threads, make, [&](auto& worker, int64_t i) {
    worker.combine(*shared[i].first, shared[i].second);
  });
}

}  // namespace hstu
