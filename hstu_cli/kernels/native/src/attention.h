// HSTU attention of a batch: runs each task on the tiles of one thread, adds up the tasks that share rows.
#pragma once

#include <atomic>
#include <cmath>
#include <memory>

#include "matrix_attention.h"
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
  Worker(const Batch<scalar_t>& batch, int64_t num_heads, real_t* partial_sums)
      : batch_(batch), tiles_(batch.head_dim, batch.alpha), partial_sums_(partial_sums) {
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
    const int64_t own_key = s.num_cached + task.row_begin;  // of the first row, the last one that it sees
    const int64_t chunk = tiles_.num_chunk_keys(task.num_heads());
    int64_t next = find_rows(s, task, task.key_begin, chunk, key_rows_);
    for (int64_t begin = task.key_begin; begin < task.key_end;) {
      const int64_t end = begin + next;
      next = find_rows(s, task, end, chunk, next_rows_);
      const Keys<scalar_t> keys{key_rows_, end - begin, next_rows_, next, task.num_heads()};
      tiles_.attend(keys, rows, begin - own_key, sums, begin > task.key_begin);
      std::swap(key_rows_, next_rows_);
      begin = end;
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
    carver.take(key_rows_, tiles_t::MOST_KEYS);
    carver.take(next_rows_, tiles_t::MOST_KEYS);
  }

  // The rows of at most `most` of a task's keys, from `begin` on; returns how many.
  int64_t find_rows(const Sequence& s, const Task& task, int64_t begin, int64_t most, KeyRow<scalar_t>* row) const {
    const auto& p = batch_.pages;
    const int64_t head = task.head_begin, end = std::min(begin + most, task.key_end);
    int64_t j = begin;
    while (j < std::min(end, s.num_cached)) {  // page by page
      const int64_t slot = j % p.page_size, last = std::min({j - slot + p.page_size, end, s.num_cached});
      const scalar_t* key =
          p.data + s.page_ids[j / p.page_size] * p.page_stride + slot * p.slot_stride + head * p.head_stride;
      for (; j < last; ++j, key += p.slot_stride) {
        *row++ = {key, key + p.kind_stride, p.head_stride, p.head_stride};
      }
    }
    for (; j < end; ++j) {
      const int64_t token = s.first_row + j - s.num_cached;
      *row++ = {batch_.k.at(token, head), batch_.v.at(token, head), batch_.k.head_stride, batch_.v.head_stride};
    }
    return std::max<int64_t>(end - begin, 0);
  }

  // Writes a head's rows: the sums over the keys before the candidates and, of a candidate, its own value.
  void finish(const Task& task, int64_t head, const real_t* sums) {
    const Sequence& s = batch_.sequences[task.sequence];
    const auto scale = static_cast<real_t>(batch_.alpha / batch_.scaling_seqlen);
    const int64_t d = batch_.head_dim;
    for (int64_t i = 0; i < task.num_rows(); ++i) {
      const int64_t row = task.row_begin + i, token = s.first_row + row;
      scalar_t* out = batch_.out + (token * batch_.num_heads + head) * d;
      if (row < s.num_new - s.num_candidates && tiles_.write_row(sums, i, scale, out)) continue;
      tiles_.read_row(sums, i, row_);
      for (int64_t c = 0; c < d; ++c) {
        row_[c] *= scale;
      }
      if (row >= s.num_new - s.num_candidates) add_own_value(token, head);
      narrow(row_, d, out);
    }
  }

  void add_own_value(int64_t token, int64_t head) {
    const scalar_t *q = batch_.q.at(token, head), *k = batch_.k.at(token, head), *v = batch_.v.at(token, head);
    real_t score = 0;
    for (int64_t c = 0; c < batch_.head_dim; ++c) {
      score += static_cast<real_t>(q[c]) * static_cast<real_t>(k[c]);
    }
    score *= static_cast<real_t>(batch_.alpha);
    const real_t weight = score / (1 + std::exp(-score)) / static_cast<real_t>(batch_.scaling_seqlen);
    for (int64_t c = 0; c < batch_.head_dim; ++c) {
      row_[c] += weight * static_cast<real_t>(v[c]);
    }
  }

  const Batch<scalar_t>& batch_;
  tiles_t tiles_;
  real_t *partial_sums_, *sums_, *row_;
  KeyRow<scalar_t> *key_rows_, *next_rows_;
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
  std::unique_ptr<real_t[]> partial_sums(new real_t[plan.num_partial_rows * sums_per_row]);
  auto make = [&] { return Worker<tiles_t>(batch, max_heads, partial_sums.get()); };
  on_threads<tiles_t>(static_cast<int64_t>(plan.tasks.size()), num_threads, make, [&](auto& worker, int64_t i) {
    worker.run(plan.tasks[i]);
  });
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
