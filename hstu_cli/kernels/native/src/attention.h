// HSTU attention of a batch: plans tasks, runs each on tiles of one thread, adds up the tasks that share rows.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <memory>
#include <numeric>
#include <vector>

#include "silu.h"
#include "tiles.h"

namespace hstu {

constexpr int64_t QUERY_ROWS = 512;  // the most rows of a task
constexpr int64_t CHUNK_KEYS = 256;  // keys whose values are multiplied at once
constexpr int64_t SCORE_KEYS = 128;  // keys whose scores are computed at once
constexpr int64_t LEAST_KEYS = 256;  // no task gets fewer keys by sharing its rows

// Rows of a tensor [tokens, heads, head_dim] of which only the last dimension is contiguous.
template <typename scalar_t>
struct Rows {
  const scalar_t* data;
  int64_t token_stride, head_stride;

  const scalar_t* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

// Pages [num_pages, 2, page_size, heads, head_dim] of one layer; null where nothing is cached.
template <typename scalar_t>
struct Pages {
  const scalar_t* data = nullptr;
  int64_t page_stride = 0, kind_stride = 0, slot_stride = 0, head_stride = 0, page_size = 1;
};

// One sequence: its new tokens are rows first_row to first_row + num_new, the last num_candidates are candidates.
struct Sequence {
  int64_t first_row, num_new, num_candidates, num_cached;
  const int64_t* page_ids;

  // Keys that come before the candidates; the candidates see all of them.
  int64_t num_keys() const { return num_cached + num_new - num_candidates; }
};

template <typename scalar_t>
struct Batch {
  Rows<scalar_t> q, k, v;
  Pages<scalar_t> pages;
  scalar_t* out;  // [tokens, heads, head_dim] contiguous
  std::vector<Sequence> sequences;
  int64_t num_heads, head_dim;
  double alpha, scaling_seqlen;
};

// Rows [row_begin, row_end) of a sequence and head meet keys [key_begin, key_end).
struct Task {
  int64_t sequence, head, row_begin, row_end, key_begin, key_end;
  int64_t part, num_parts;  // of the keys that these rows see
  int64_t sums_offset;      // of this part in the workspace, in rows
  double cost;
};

struct Plan {
  std::vector<Task> tasks;  // the most expensive first
  int64_t num_partial_rows = 0;
  double cost = 0;
};

inline double cost_of(const Sequence& s, int64_t row_begin, int64_t row_end, int64_t key_begin, int64_t key_end) {
  const int64_t diagonal = std::clamp(s.num_cached + row_begin, key_begin, key_end);
  const double rows = static_cast<double>(row_end - row_begin);
  return rows * (static_cast<double>(diagonal - key_begin) + 0.5 * static_cast<double>(key_end - diagonal)) + rows;
}

inline Plan make_plan(const std::vector<Sequence>& sequences, int64_t num_heads, int64_t num_threads) {
  Plan plan;
  for (int64_t b = 0; b < static_cast<int64_t>(sequences.size()); ++b) {
    const Sequence& s = sequences[b];
    const int64_t blocks = (s.num_new + QUERY_ROWS - 1) / QUERY_ROWS;
    const int64_t block_rows = blocks ? round_up((s.num_new + blocks - 1) / blocks, ROW_STEP) : 0;
    for (int64_t begin = 0; begin < s.num_new; begin += block_rows) {
      const int64_t end = std::min(begin + block_rows, s.num_new);
      const int64_t key_end = std::min(s.num_keys(), s.num_cached + end);
      const double cost = cost_of(s, begin, end, 0, key_end);
      for (int64_t head = 0; head < num_heads; ++head) {
        plan.tasks.push_back({b, head, begin, end, 0, key_end, 0, 1, 0, cost});
        plan.cost += cost;
      }
    }
  }
  if (num_threads > 1) {  // rows that are more than a fair share of the work go to several tasks, by keys
    const double most = plan.cost / static_cast<double>(2 * num_threads);
    std::vector<Task> split;
    for (const Task& task : plan.tasks) {
      const int64_t wanted = static_cast<int64_t>(task.cost / most + 0.999);
      const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, task.key_end / LEAST_KEYS));
      const int64_t keys = round_up((task.key_end + parts - 1) / parts, KEY_STEP);
      for (int64_t part = 0; part < parts; ++part) {
        Task one = task;
        one.part = part;
        one.num_parts = parts;
        one.key_begin = std::min(part * keys, task.key_end);
        one.key_end = std::min(one.key_begin + keys, task.key_end);
        one.cost = cost_of(sequences[task.sequence], one.row_begin, one.row_end, one.key_begin, one.key_end);
        if (parts > 1) {
          one.sums_offset = plan.num_partial_rows;
          plan.num_partial_rows += one.row_end - one.row_begin;
        }
        split.push_back(one);
      }
    }
    plan.tasks = std::move(split);
  }
  std::stable_sort(plan.tasks.begin(), plan.tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return plan;
}

// Memory of a thread that stays for the next call: fresh pages would cost more than small calls do.
inline char* scratch(size_t bytes) {
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
  };
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset(static_cast<char*>(::operator new[](bytes, std::align_val_t(64))));
    size = bytes;
  }
  return memory.get();
}

template <typename scalar_t, typename tile_t>
class Worker {
  using real_t = sum_t<tile_t>;

 public:
  using tile_type = tile_t;

  // Rows get a vector more than they hold: at powers of two they would meet in the same cache sets.
  Worker(const Batch<scalar_t>& batch, real_t* partial_sums)
      : batch_(batch),
        partial_sums_(partial_sums),
        width_(round_up(batch.head_dim, KEY_STEP)),
        ld_keys_(width_ + KEY_STEP),
        ld_sums_(width_ + ROW_STEP) {
    const int64_t sizes[] = {
        int64_t(sizeof(tile_t)) * QUERY_ROWS * width_,     int64_t(sizeof(tile_t)) * QUERY_ROWS * width_,
        int64_t(sizeof(tile_t)) * SCORE_KEYS * ld_keys_,
        int64_t(sizeof(tile_t)) * CHUNK_KEYS * round_up(width_, PANEL<tile_t>),
        int64_t(sizeof(real_t)) * SCORE_KEYS * LD_SCORES, int64_t(sizeof(tile_t)) * QUERY_ROWS * LD_WEIGHTS,
        int64_t(sizeof(real_t)) * QUERY_ROWS * ld_sums_,   int64_t(sizeof(real_t)) * 2 * width_,
        int64_t(sizeof(tile_t)) * 2 * width_};
    int64_t total = 0;
    for (const int64_t size : sizes) total += round_up(size, 64);
    char* memory = scratch(total);
    auto take = [&, next = 0]() mutable {
      char* start = memory;
      memory += round_up(sizes[next++], 64);
      return start;
    };
    queries_ = reinterpret_cast<tile_t*>(take());
    queries_transposed_ = reinterpret_cast<tile_t*>(take());
    keys_ = reinterpret_cast<tile_t*>(take());
    values_ = reinterpret_cast<tile_t*>(take());
    scores_ = reinterpret_cast<real_t*>(take());
    weights_ = reinterpret_cast<tile_t*>(take());
    sums_ = reinterpret_cast<real_t*>(take());
    row_ = reinterpret_cast<real_t*>(take());
    spare_ = reinterpret_cast<tile_t*>(take());
  }

  void run(const Task& task) {
    const Sequence& s = batch_.sequences[task.sequence];
    const int64_t rows = task.row_end - task.row_begin, padded_rows = round_up(rows, ROW_STEP);
    const int64_t first_key_hidden = s.num_cached + task.row_begin;  // of the first row: the one behind its own
    std::fill(sums_, sums_ + padded_rows * ld_sums_, real_t(0));
    if (task.key_begin < task.key_end) {
      for (int64_t i = 0; i < padded_rows; ++i) {
        const bool exists = i < rows;
        const int64_t token = s.first_row + task.row_begin + (exists ? i : 0);
        load_row(batch_.q.at(token, task.head), exists ? batch_.head_dim : 0, queries_ + i * width_, width_);
      }
      transpose_queries(queries_, width_, queries_transposed_, padded_rows);
    }
    // Chunks end where the diagonal begins, and on it they are small: less is computed in vain.
    auto chunk_end = [&](int64_t begin) {
      const int64_t longest = begin < first_key_hidden ? std::min(CHUNK_KEYS, first_key_hidden - begin) : SCORE_KEYS;
      return std::min(begin + longest, task.key_end);
    };
    for (int64_t begin = task.key_begin; begin < task.key_end; begin = chunk_end(begin)) {
      attend(s, task, begin, chunk_end(begin), padded_rows);
    }
    if (task.num_parts == 1) {
      for (int64_t i = 0; i < rows; ++i) {
        finish(s, task.head, task.row_begin + i, sums_ + i * ld_sums_);
      }
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        const real_t* sums = sums_ + i * ld_sums_;
        std::copy(sums, sums + width_, partial_sums_ + (task.sums_offset + i) * width_);
      }
    }
  }

  // Adds the parts up, always in the same order, and writes the rows. first: the sums of part 0.
  void combine(const Task& first, const std::vector<const real_t*>& parts) {
    for (int64_t i = 0; i < first.row_end - first.row_begin; ++i) {
      std::fill(sums_, sums_ + width_, real_t(0));
      for (const real_t* part : parts) {
        for (int64_t c = 0; c < width_; ++c) {
          sums_[c] += part[i * width_ + c];
        }
      }
      finish(batch_.sequences[first.sequence], first.head, first.row_begin + i, sums_);
    }
  }

 private:
  static constexpr int64_t LD_WEIGHTS = CHUNK_KEYS + KEY_STEP, LD_SCORES = QUERY_ROWS + ROW_STEP;

  // sums += SiLU(q k') v over keys [begin, end).
  void attend(const Sequence& s, const Task& task, int64_t begin, int64_t end, int64_t padded_rows) {
    const scalar_t *key_rows[CHUNK_KEYS], *value_rows[CHUNK_KEYS];
    find_rows(s, task.head, begin, end, key_rows, value_rows);
    const int64_t count = end - begin, padded = round_up(count, KEY_STEP);
    const int64_t diagonal = begin - s.num_cached - task.row_begin;  // the row that key `begin` belongs to
    const int64_t from = std::max<int64_t>(0, diagonal) / ROW_STEP * ROW_STEP;  // rows before see none of the chunk
    const int64_t rows = padded_rows - from;
    for (int64_t j = 0; j < padded; j += SCORE_KEYS) {
      const int64_t keys = std::min(SCORE_KEYS, padded - j), valid = std::min(keys, count - j);
      load_rows(key_rows + j, valid, batch_.head_dim, keys_, ld_keys_, width_);
      std::fill(keys_ + valid * ld_keys_, keys_ + keys * ld_keys_, tile_t(0));
      multiply_panels(
          keys, from, padded_rows, width_, keys_, ld_keys_, queries_transposed_, width_, scores_, LD_SCORES, false);
      silu_tile(
          scores_ + from, LD_SCORES, rows, keys, batch_.alpha, diagonal + j - from, valid,
          weights_ + from * LD_WEIGHTS + j, LD_WEIGHTS);
    }
    load_values(value_rows, count, padded, batch_.head_dim, values_, CHUNK_KEYS, width_, spare_);
    multiply_panels(
        rows, 0, width_, padded, weights_ + from * LD_WEIGHTS, LD_WEIGHTS, values_, CHUNK_KEYS, sums_ + from * ld_sums_,
        ld_sums_, true);
  }

  void find_rows(
      const Sequence& s, int64_t head, int64_t begin, int64_t end, const scalar_t** keys,
      const scalar_t** values) const {
    const auto& p = batch_.pages;
    for (int64_t j = begin; j < end; ++j) {
      const scalar_t *&key = keys[j - begin], *&value = values[j - begin];
      if (j < s.num_cached) {
        key = p.data + s.page_ids[j / p.page_size] * p.page_stride + j % p.page_size * p.slot_stride +
            head * p.head_stride;
        value = key + p.kind_stride;
      } else {
        const int64_t token = s.first_row + j - s.num_cached;
        key = batch_.k.at(token, head);
        value = batch_.v.at(token, head);
      }
    }
  }

  // Writes a row: its sums over the keys before the candidates and, of a candidate, its own value.
  void finish(const Sequence& s, int64_t head, int64_t row, const real_t* sums) {
    const int64_t d = batch_.head_dim, token = s.first_row + row;
    real_t* own = nullptr;
    if (row >= s.num_new - s.num_candidates) {
      const scalar_t *q = batch_.q.at(token, head), *k = batch_.k.at(token, head), *v = batch_.v.at(token, head);
      own = row_ + width_;
      real_t score = 0;
      for (int64_t c = 0; c < d; ++c) {
        score += static_cast<real_t>(q[c]) * static_cast<real_t>(k[c]);
      }
      score *= static_cast<real_t>(batch_.alpha);
      const real_t weight = score / (1 + std::exp(-score)) / static_cast<real_t>(batch_.scaling_seqlen);
      for (int64_t c = 0; c < d; ++c) {
        own[c] = weight * static_cast<real_t>(v[c]);
      }
    }
    scalar_t* out = batch_.out + (token * batch_.num_heads + head) * d;
    store_row<tile_t>(sums, own, static_cast<real_t>(batch_.alpha / batch_.scaling_seqlen), d, width_, row_, out);
  }

  const Batch<scalar_t>& batch_;
  real_t* partial_sums_;
  int64_t width_, ld_keys_, ld_sums_;
  tile_t *queries_, *queries_transposed_, *keys_, *values_, *weights_, *spare_;
  real_t *scores_, *sums_, *row_;
};

// Runs f(worker, i) for every i below count, the next free thread taking the next i.
template <typename worker_t, typename make_t, typename run_t>
void on_threads(int64_t count, int64_t num_threads, const make_t& make, const run_t& run) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(count, num_threads), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      worker_t worker = make();
      for (int64_t i = next++; i < count; i = next++) {
        run(worker, i);
      }
      release_tiles<typename worker_t::tile_type>();
    }
  });
}

template <typename scalar_t, typename tile_t>
void attention(const Batch<scalar_t>& batch) {
  using real_t = sum_t<tile_t>;
  using worker_t = Worker<scalar_t, tile_t>;
  const int64_t width = round_up(batch.head_dim, KEY_STEP);
  Plan plan = make_plan(batch.sequences, batch.num_heads, at::get_num_threads());
  // Waking threads costs more than the smallest batches do.
  const int64_t num_threads = plan.cost * static_cast<double>(width) < 2e5 ? 1 : at::get_num_threads();
  std::unique_ptr<real_t[]> partial_sums(new real_t[plan.num_partial_rows * width]);
  auto make = [&] { return worker_t(batch, partial_sums.get()); };
  on_threads<worker_t>(static_cast<int64_t>(plan.tasks.size()), num_threads, make, [&](worker_t& worker, int64_t i) {
    worker.run(plan.tasks[i]);
  });
  if (!plan.num_partial_rows) return;
  std::vector<const Task*> firsts;
  for (const Task& task : plan.tasks) {
    if (task.num_parts > 1 && task.part == 0) firsts.push_back(&task);
  }
  on_threads<worker_t>(static_cast<int64_t>(firsts.size()), num_threads, make, [&](worker_t& worker, int64_t i) {
    const Task& first = *firsts[i];
    std::vector<const real_t*> parts;
    for (int64_t part = 0; part < first.num_parts; ++part) {
      parts.push_back(
          partial_sums.get() + (first.sums_offset + part * (first.row_end - first.row_begin)) * width);
    }
    worker.combine(first, parts);
  });
}

}  // namespace hstu
