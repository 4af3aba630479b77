// Gradients of HSTU attention of a batch: of q, k and v from those of the output. Scores are computed again.
//
// With x_ij = q_i . k_j and the output's gradient g: v_j's is the sum of alpha / L * x_ij * sigmoid(alpha x_ij) * g_i
// over the rows i that see key j; with e_ij = alpha / L * (g_i . v_j) * (the slope of SiLU at alpha x_ij) q_i's is the
// sum of e_ij k_j, k_j's that of e_ij q_i. A task takes some keys of a head with all rows that see them, so five
// products are enough; sums of queries' gradients over the tasks of a head are taken in a fixed order.
#pragma once

#include "attention.h"

namespace hstu {

template <typename scalar_t>
struct MutableRows {
  scalar_t* data;
  int64_t token_stride, head_stride;

  scalar_t* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

template <typename scalar_t>
struct GradientBatch {
  Rows<scalar_t> q, k, v, grad_out;
  MutableRows<scalar_t> grad_q, grad_k, grad_v;
  std::vector<Sequence> sequences;
  int64_t num_heads, head_dim;
  double alpha, scaling_seqlen;
};

// Keys [key_begin, key_end) of a head of a sequence, with the rows from key_begin on.
struct GradientTask {
  int64_t sequence, head, key_begin, key_end;
  int64_t part, num_parts;  // of the head's keys
  int64_t sums_offset;      // of this part in the workspace, in rows
  double cost;
};

struct GradientPlan {
  std::vector<GradientTask> tasks;  // the most expensive first
  int64_t num_partial_rows = 0, most_rows = 0;
  double cost = 0;
};

// Divides a head's keys so that each part meets as many rows; no part has fewer than LEAST_KEYS.
inline GradientPlan make_gradient_plan(
    const std::vector<Sequence>& sequences, int64_t num_heads, int64_t num_threads) {
  GradientPlan plan;
  auto cost_of = [](const Sequence& s) {  // scores, and per row as much as a few more
    const auto rows = static_cast<double>(s.num_new), keys = static_cast<double>(s.num_keys());
    return rows * (keys + 32) - 0.5 * keys * keys;
  };
  for (const Sequence& s : sequences) plan.cost += cost_of(s) * static_cast<double>(num_heads);
  const double most = plan.cost / static_cast<double>(2 * num_threads);
  for (int64_t b = 0; b < static_cast<int64_t>(sequences.size()); ++b) {
    const Sequence& s = sequences[b];
    if (s.num_new == 0) continue;
    const auto rows = static_cast<double>(s.num_new), keys = static_cast<double>(s.num_keys());
    const auto wanted = num_threads == 1 ? 1 : static_cast<int64_t>(cost_of(s) / most + 0.99);
    const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, s.num_keys() / LEAST_KEYS));
    plan.most_rows = std::max(plan.most_rows, s.num_new);
    for (int64_t head = 0; head < num_heads; ++head) {
      int64_t begin = 0;
      for (int64_t part = 0; part < parts; ++part) {
        // The keys [0, x) meet rows * x - x^2 / 2 of all scores.
        const double share = static_cast<double>(part + 1) / static_cast<double>(parts);
        const double scores = share * (rows * keys - keys * keys / 2);
        const double x = rows - std::sqrt(std::max(rows * rows - 2 * scores, 0.0));
        const int64_t end = part + 1 == parts
                                ? s.num_keys()
                                : std::clamp(round_up(static_cast<int64_t>(x), ROW_STEP), begin, s.num_keys());
        GradientTask task{b, head, begin, end, part, parts, 0, cost_of(s) / static_cast<double>(parts)};
        if (parts > 1) {
          task.sums_offset = plan.num_partial_rows;
          plan.num_partial_rows += round_up(s.num_new - begin, ROW_STEP);
        }
        plan.tasks.push_back(task);
        begin = end;
      }
    }
  }
  std::stable_sort(plan.tasks.begin(), plan.tasks.end(), [](const auto& a, const auto& b) { return a.cost > b.cost; });
  return plan;
}

template <typename tiles_t>
class GradientWorker {
  using scalar_t = typename tiles_t::scalar_type;
  using real_t = typename tiles_t::sum_type;

 public:
  // partial_sums: where tasks that share a head's queries leave theirs.
  GradientWorker(const GradientBatch<scalar_t>& batch, const GradientPlan& plan, real_t* partial_sums)
      : batch_(batch), tiles_(batch.head_dim, batch.alpha), partial_sums_(partial_sums) {
    Carver sizes;
    carve(sizes, plan.most_rows);
    Carver carver(scratch(sizes.used()));
    carve(carver, plan.most_rows);
  }

  void run(const GradientTask& task) {
    const Sequence& s = batch_.sequences[task.sequence];
    const int64_t rows = s.num_new - task.key_begin, first = s.first_row + task.key_begin;
    real_t* sums = task.num_parts > 1 ? partial_sums_ + task.sums_offset * tiles_.width() : sums_;
    std::fill(sums, sums + round_up(rows, ROW_STEP) * tiles_.width(), real_t(0));
    const int64_t keys = task.key_end - task.key_begin;
    for (int64_t key = 0; key < keys; key += tiles_t::CHUNK_KEYS) {
      const int64_t count = std::min(tiles_t::CHUNK_KEYS, keys - key);
      tiles_.load_keys(row_of(batch_.k, first + key, task.head), row_of(batch_.v, first + key, task.head), count);
      for (int64_t row = key / tiles_t::BLOCK_ROWS * tiles_t::BLOCK_ROWS; row < rows; row += tiles_t::BLOCK_ROWS) {
        tiles_.load_rows(
            row_of(batch_.q, first + row, task.head), row_of(batch_.grad_out, first + row, task.head),
            std::min(tiles_t::BLOCK_ROWS, rows - row));
        tiles_.add(key - row, sums + row * tiles_.width());
      }
      for (int64_t j = 0; j < count; j += ROW_STEP) {
        const int64_t token = first + key + j, some = std::min(ROW_STEP, count - j);
        tiles_.read_keys(j / ROW_STEP, rows_);
        for (int64_t i = 0; i < some; ++i) write(rows_ + i * tiles_.width(), batch_.grad_k.at(token + i, task.head));
        tiles_.read_values(j / ROW_STEP, rows_);
        for (int64_t i = 0; i < some; ++i) write(rows_ + i * tiles_.width(), batch_.grad_v.at(token + i, task.head));
      }
    }
    if (task.num_parts == 1) finish(s, task.head, sums);
  }

  // Adds the parts of a head's queries up, always in the same order, and writes them.
  void combine(const std::vector<const GradientTask*>& parts) {
    const Sequence& s = batch_.sequences[parts[0]->sequence];
    for (const GradientTask* part : parts) {  // the first one has all rows
      const int64_t count = round_up(s.num_new - part->key_begin, ROW_STEP) * tiles_.width();
      const real_t* from = partial_sums_ + part->sums_offset * tiles_.width();
      real_t* to = sums_ + part->key_begin * tiles_.width();
      for (int64_t i = 0; i < count; ++i) to[i] = part->part == 0 ? from[i] : to[i] + from[i];
    }
    finish(s, parts[0]->head, sums_);
  }

 private:
  void carve(Carver& carver, int64_t rows) {
    tiles_.carve(carver);
    carver.take(sums_, round_up(rows, ROW_STEP) * tiles_.width());
    carver.take(rows_, ROW_STEP * tiles_.width());
  }

  static auto row_of(const Rows<scalar_t>& x, int64_t first, int64_t head) {
    return [&x, first, head](int64_t i) { return x.at(first + i, head); };
  }

  // A row of sums, times what all of them lack.
  void write(real_t* sums, scalar_t* row) const {
    const auto scale = static_cast<real_t>(batch_.alpha / batch_.scaling_seqlen);
    for (int64_t c = 0; c < batch_.head_dim; ++c) sums[c] *= scale;
    narrow(sums, batch_.head_dim, row);
  }

  // Writes the gradients of a head's queries, and of the keys and values that their own queries alone see.
  void finish(const Sequence& s, int64_t head, const real_t* sums) {
    for (int64_t row = 0; row < s.num_new; row += ROW_STEP) {
      tiles_.read_queries(sums, row / ROW_STEP, rows_);
      for (int64_t i = 0; i < std::min(ROW_STEP, s.num_new - row); ++i) {
        real_t* one = rows_ + i * tiles_.width();
        if (row + i >= s.num_keys()) add_own(s.first_row + row + i, head, one);
        write(one, batch_.grad_q.at(s.first_row + row + i, head));
      }
    }
  }

  // What a candidate and itself are to each other; sums: of its query.
  void add_own(int64_t token, int64_t head, real_t* sums) const {
    const scalar_t *q = batch_.q.at(token, head), *k = batch_.k.at(token, head), *v = batch_.v.at(token, head);
    const scalar_t* g = batch_.grad_out.at(token, head);
    scalar_t *grad_k = batch_.grad_k.at(token, head), *grad_v = batch_.grad_v.at(token, head);
    real_t score = 0, grad_weight = 0;
    for (int64_t c = 0; c < batch_.head_dim; ++c) {
      score += static_cast<real_t>(q[c]) * static_cast<real_t>(k[c]);
      grad_weight += static_cast<real_t>(g[c]) * static_cast<real_t>(v[c]);
    }
    const auto alpha = static_cast<real_t>(batch_.alpha);
    const auto scale = static_cast<real_t>(batch_.alpha / batch_.scaling_seqlen);
    const real_t gate = 1 / (1 + std::exp(-alpha * score)), weight = score * gate;
    const real_t grad_score = grad_weight * (gate + alpha * weight * (1 - gate));
    for (int64_t c = 0; c < batch_.head_dim; ++c) {
      sums[c] += grad_score * static_cast<real_t>(k[c]);
      grad_k[c] = static_cast<scalar_t>(scale * grad_score * static_cast<real_t>(q[c]));
      grad_v[c] = static_cast<scalar_t>(scale * weight * static_cast<real_t>(g[c]));
    }
  }

  const GradientBatch<scalar_t>& batch_;
  tiles_t tiles_;
  real_t *partial_sums_, *sums_, *rows_;
};

template <typename tiles_t>
void attention_gradients(const GradientBatch<typename tiles_t::scalar_type>& batch) {
  using real_t = typename tiles_t::sum_type;
  const GradientPlan plan = make_gradient_plan(batch.sequences, batch.num_heads, at::get_num_threads());
  const int64_t width = tiles_t(batch.head_dim, batch.alpha).width();
  // Waking threads costs more than the smallest batches do.
  const int64_t num_threads = plan.cost * static_cast<double>(width) < 1e5 ? 1 : at::get_num_threads();
  const Array<real_t> partial_sums = allocate<real_t>(plan.num_partial_rows * width);
  auto make = [&] { return GradientWorker<tiles_t>(batch, plan, partial_sums.get()); };
  on_threads<tiles_t>(static_cast<int64_t>(plan.tasks.size()), num_threads, make, [&](auto& worker, int64_t i) {
    worker.run(plan.tasks[i]);
  });
  if (!plan.num_partial_rows) return;
  std::vector<std::vector<const GradientTask*>> shared(batch.sequences.size() * batch.num_heads);
  for (const GradientTask& task : plan.tasks) {
    if (task.num_parts == 1) continue;
    auto& parts = shared[task.sequence * batch.num_heads + task.head];
    parts.resize(task.num_parts);
    parts[task.part] = &task;
  }
  std::erase_if(shared, [](const auto& parts) { return parts.empty(); });
  on_threads<tiles_t>(static_cast<int64_t>(shared.size()), num_threads, make, [&](auto& worker, int64_t i) {
    worker.combine(shared[i]);
  });
}

}  // namespace hstu
