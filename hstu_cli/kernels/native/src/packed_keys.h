// Keys and values that several tasks meet, packed once for all of them.
#pragma once

#include <memory>
#include <vector>

#include "plan.h"
#include "scratch.h"
#include "threads.h"

namespace hstu {

// Holds the keys of some heads of some sequences at a time: few enough that the last-level cache may still have them
// when tasks meet them, enough for every thread to have tasks. Tiles that do not pack keys have all at once, and nothing
// is held.
template <typename tiles_t>
class PackedKeys {
  using scalar_t = typename tiles_t::scalar_type;

 public:
  explicit PackedKeys(const Batch<scalar_t>& batch)
      : batch_(batch), tiles_(batch.head_dim, batch.alpha), places_(batch.sequences.size() * batch.num_heads, NONE) {}

  // How many heads all sequences have, which are packed in this order: those of a sequence, then those of the next.
  int64_t num_heads() const { return static_cast<int64_t>(places_.size()); }

  // Packs the keys of the next heads, from `first` on; returns the end of those whose tasks can run now.
  int64_t pack(int64_t first) {
    if constexpr (!tiles_t::PACKS) {
      return num_heads();
    } else {
      const int64_t last = end_of_portion(first);
      std::fill(places_.begin(), places_.end(), NONE);
      int64_t held = 0;
      for (int64_t head = first; head < last; ++head) {
        if (!is_shared(head)) continue;
        places_[head] = held;
        held += chunks_of(head);
      }
      reserve(held);
      const std::vector<Job> jobs = jobs_of(first, last, held);
      parallel_for(static_cast<int64_t>(jobs.size()), 1, [&](int64_t begin, int64_t end) {
        std::vector<KeyRow<scalar_t>> rows(tiles_t::CHUNK_KEYS);
        for (; begin < end; ++begin) pack_chunk(jobs[begin], rows.data());
      });
      return last;
    }
  }

  // Whether the keys of a head are here; else those of its tasks that have many rows pack them for themselves.
  bool has(int64_t sequence, int64_t head) const { return places_[index(sequence, head)] != NONE; }

  // The chunk of a head that begins with a key.
  const scalar_t* chunk(int64_t sequence, int64_t head, int64_t key) const {
    return place(index(sequence, head), key / tiles_t::CHUNK_KEYS);
  }

  // A head of a sequence among all.
  int64_t index(int64_t sequence, int64_t head) const { return sequence * batch_.num_heads + head; }

 private:
  static constexpr int64_t NONE = -1, BYTES_PER_THREAD = 12 << 20, MOST_BYTES = 64 << 20;

  struct Job {
    int64_t head_begin, head_end, chunk;  // of one sequence
  };

  const Sequence& sequence_of(int64_t head) const { return batch_.sequences[head / batch_.num_heads]; }

  // Whether the rows of a head are several tasks; all but perhaps the last have many rows.
  bool is_shared(int64_t head) const { return sequence_of(head).num_new > QUERY_ROWS; }

  int64_t chunks_of(int64_t head) const {
    return (sequence_of(head).num_keys() + tiles_t::CHUNK_KEYS - 1) / tiles_t::CHUNK_KEYS;
  }

  // Heads of a sequence lie side by side and are best read together: a portion ends with a whole sequence, if one fits.
  int64_t end_of_portion(int64_t first) const {
    const int64_t bytes = std::min(BYTES_PER_THREAD * at::get_num_threads(), MOST_BYTES);
    const auto most = bytes / static_cast<int64_t>(chunk_size() * sizeof(scalar_t));
    int64_t last = first;
    for (int64_t chunks = 0; last < num_heads(); ++last) {
      const int64_t wanted = is_shared(last) ? chunks_of(last) : 0;
      if (chunks && chunks + wanted > most) break;
      chunks += wanted;
    }
    const int64_t whole = last - last % batch_.num_heads;
    return whole > first ? whole : last;
  }

  // Chunks of all heads that are held of a sequence; of fewer heads where so few chunks would leave threads idle.
  std::vector<Job> jobs_of(int64_t first, int64_t last, int64_t held) const {
    std::vector<Job> jobs;
    for (int64_t begin = first, end; begin < last; begin = end) {
      end = std::min(last, round_up(begin + 1, batch_.num_heads));
      if (!is_shared(begin) || chunks_of(begin) == 0) continue;
      const int64_t heads = end - begin, wanted = 2 * at::get_num_threads() * heads;
      const int64_t parts = std::clamp<int64_t>((wanted + held - 1) / held, 1, heads);
      for (int64_t chunk = 0; chunk < chunks_of(begin); ++chunk) {
        for (int64_t part = 0; part < parts; ++part) {
          jobs.push_back({begin + heads * part / parts, begin + heads * (part + 1) / parts, chunk});
        }
      }
    }
    return jobs;
  }

  void pack_chunk(const Job& job, KeyRow<scalar_t>* rows) {
    const Sequence& s = sequence_of(job.head_begin);
    const int64_t begin = job.chunk * tiles_t::CHUNK_KEYS, end = std::min(begin + tiles_t::CHUNK_KEYS, s.num_keys());
    batch_.find_rows(s, job.head_begin % batch_.num_heads, begin, end, rows);
    tiles_.many().pack(
        rows, end - begin, job.head_end - job.head_begin, place(job.head_begin, job.chunk),
        chunks_of(job.head_begin) * chunk_size());
  }

  void reserve(int64_t num_chunks) {
    if (num_chunks <= capacity_) return;
    memory_.reset();  // first, or both were there at a time
    capacity_ = 0;
    memory_ = allocate<scalar_t>(num_chunks * chunk_size());
    advise_huge_pages(memory_.get(), num_chunks * chunk_size() * sizeof(scalar_t));
    capacity_ = num_chunks;
  }

  scalar_t* place(int64_t head, int64_t chunk) const { return memory_.get() + (places_[head] + chunk) * chunk_size(); }

  int64_t chunk_size() const { return tiles_.many().chunk_size(); }

  const Batch<scalar_t>& batch_;
  tiles_t tiles_;
  std::vector<int64_t> places_;  // of each head's first chunk; NONE of one that is not held
  Array<scalar_t> memory_;
  int64_t capacity_ = 0;  // in chunks
};

}  // namespace hstu
