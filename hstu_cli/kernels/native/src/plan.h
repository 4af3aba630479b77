// What a call of HSTU attention is made of: its tensors, its sequences, and the tasks that threads take.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace hstu {

constexpr int64_t QUERY_ROWS = 512;  // the most rows of a task, over all its heads
constexpr int64_t LEAST_KEYS = 256;  // no task gets fewer keys by sharing its rows
constexpr int64_t STREAMED = 1 << 20;  // so many results go past the caches: memory need not be read before it is written
constexpr int64_t ROW_STEP = 32;     // rows come in multiples of this: whole tiles

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

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

// A key and its value, of the first head of a task; the other heads' follow at the strides.
template <typename scalar_t>
struct KeyRow {
  const scalar_t *key, *value;
  int64_t key_head_stride, value_head_stride;
};

// Keys that some heads of a sequence meet together, and those that come after them.
template <typename scalar_t>
struct Keys {
  const KeyRow<scalar_t>* rows;
  int64_t count;
  const KeyRow<scalar_t>* next_rows;
  int64_t next_count, num_heads;
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
  bool stream;  // whether results go past the caches, see STREAMED

  // Where keys [begin, end) of a sequence are, for heads from `head` on.
  void find_rows(const Sequence& s, int64_t head, int64_t begin, int64_t end, KeyRow<scalar_t>* row) const {
    int64_t j = begin;
    while (j < std::min(end, s.num_cached)) {  // page by page
      const int64_t slot = j % pages.page_size, last = std::min({j - slot + pages.page_size, end, s.num_cached});
      const scalar_t* key = pages.data + s.page_ids[j / pages.page_size] * pages.page_stride +
                            slot * pages.slot_stride + head * pages.head_stride;
      for (; j < last; ++j, key += pages.slot_stride) {
        *row++ = {key, key + pages.kind_stride, pages.head_stride, pages.head_stride};
      }
    }
    for (; j < end; ++j) {
      const int64_t token = s.first_row + j - s.num_cached;
      *row++ = {k.at(token, head), v.at(token, head), k.head_stride, v.head_stride};
    }
  }
};

// Rows [row_begin, row_end) of some heads of a sequence meet keys [key_begin, key_end).
struct Task {
  int64_t sequence, head_begin, head_end, row_begin, row_end, key_begin, key_end;
  int64_t part, num_parts;  // of the keys that these rows see
  int64_t sums_offset;      // of this part in the workspace, in rows
  double cost;

  int64_t num_heads() const { return head_end - head_begin; }
  int64_t num_rows() const { return row_end - row_begin; }
  int64_t padded_rows() const { return round_up(num_rows(), ROW_STEP); }
};

struct Plan {
  std::vector<Task> tasks;  // the most expensive first
  int64_t num_partial_rows = 0;
  double cost = 0;
};

// Scores to compute, and per row as much as one more.
inline double cost_of(const Sequence& s, const Task& t) {
  const int64_t diagonal = std::clamp(s.num_cached + t.row_begin, t.key_begin, t.key_end);
  const double seen = static_cast<double>(diagonal - t.key_begin) + 0.5 * static_cast<double>(t.key_end - diagonal);
  return static_cast<double>(t.num_rows() * t.num_heads()) * (seen + 1);
}

// Divides a task that costs more than `most`, by its keys and, where these are few, by its heads.
inline void share(const Sequence& s, const Task& whole, double most, Plan& plan) {
  const auto wanted = static_cast<int64_t>(whole.cost / most + 0.999);
  const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, whole.key_end / LEAST_KEYS));
  const int64_t keys = round_up((whole.key_end + parts - 1) / parts, ROW_STEP);
  const int64_t groups = std::clamp<int64_t>((wanted + parts - 1) / parts, 1, whole.num_heads());
  const int64_t heads = (whole.num_heads() + groups - 1) / groups;
  for (int64_t head = whole.head_begin; head < whole.head_end; head += heads) {
    for (int64_t part = 0; part < parts; ++part) {
      Task one = whole;
      one.head_begin = head;
      one.head_end = std::min(head + heads, whole.head_end);
      one.part = part;
      one.num_parts = parts;
      one.key_begin = std::min(part * keys, whole.key_end);
      one.key_end = std::min(one.key_begin + keys, whole.key_end);
      one.cost = cost_of(s, one);
      if (parts > 1) {
        one.sums_offset = plan.num_partial_rows;
        plan.num_partial_rows += one.padded_rows() * one.num_heads();
      }
      plan.tasks.push_back(one);
    }
  }
}

// max_heads: how many heads a task may have. Few rows that meet many keys take them all: keys and values then come from
// memory in the order in which they lie there.
inline Plan make_plan(
    const std::vector<Sequence>& sequences, int64_t num_heads, int64_t num_threads, int64_t max_heads) {
  std::vector<Task> wholes;
  double cost = 0;
  for (int64_t b = 0; b < static_cast<int64_t>(sequences.size()); ++b) {
    const Sequence& s = sequences[b];
    const int64_t blocks = (s.num_new + QUERY_ROWS - 1) / QUERY_ROWS;
    const int64_t block_rows = blocks ? round_up((s.num_new + blocks - 1) / blocks, ROW_STEP) : 0;
    const int64_t fitting = blocks ? std::clamp<int64_t>(QUERY_ROWS / block_rows, 1, max_heads) : 1;
    const int64_t groups = (num_heads + fitting - 1) / fitting, heads = (num_heads + groups - 1) / groups;
    for (int64_t begin = 0; begin < s.num_new; begin += block_rows) {
      for (int64_t head = 0; head < num_heads; head += heads) {
        const int64_t end = std::min(begin + block_rows, s.num_new);
        const int64_t key_end = std::min(s.num_keys(), s.num_cached + end);
        Task task{b, head, std::min(head + heads, num_heads), begin, end, 0, key_end, 0, 1, 0, 0};
        task.cost = cost_of(s, task);
        cost += task.cost;
        wholes.push_back(task);
      }
    }
  }
  Plan plan;
  plan.cost = cost;
  if (num_threads > 1) {
    // One task is shared evenly; of several none may take longer than half of what a thread has to do.
    const double most = cost / static_cast<double>(wholes.size() == 1 ? num_threads : 2 * num_threads);
    for (const Task& task : wholes) {
      share(sequences[task.sequence], task, most, plan);
    }
  } else {
    plan.tasks = std::move(wholes);
  }
  std::stable_sort(plan.tasks.begin(), plan.tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return plan;
}

}  // namespace hstu
