// Keys and values that several tasks meet, packed once for all of them.
#pragma once

#include <memory>
#include <vector>

#include "plan.h"
#include "scratch.h"
#include "threads.h"

namespace hstu {

// Holds those of some sequences at a time, so that a large batch needs no more memory than a long sequence. Tiles that
// do not pack keys have all sequences at once, and nothing is held.
template <typename tiles_t>
class PackedKeys {
  using scalar_t = typename tiles_t::scalar_type;

 public:
  explicit PackedKeys(const Batch<scalar_t>& batch)
      : batch_(batch), tiles_(batch.head_dim, batch.alpha), places_(batch.sequences.size(), NONE) {}

  // Packs the keys of the next sequences, from `first` on; returns the end of those whose tasks can run now.
  int64_t pack(int64_t first) {
    const auto num_sequences = static_cast<int64_t>(batch_.sequences.size());
    if constexpr (!tiles_t::PACKS) {
      return num_sequences;
    } else {
      std::fill(places_.begin(), places_.end(), NONE);
      int64_t last = first, num_chunks = 0;
      const int64_t most = std::max<int64_t>(1, MOST_BYTES / (chunk_size() * sizeof(scalar_t)));
      for (; last < num_sequences; ++last) {
        const int64_t wanted = are_shared(last) ? batch_.num_heads * chunks_of(last) : 0;
        if (num_chunks && num_chunks + wanted > most) break;
        if (wanted) places_[last] = num_chunks;
        num_chunks += wanted;
      }
      if (num_chunks > capacity_) {
        memory_.reset();  // first, or both were there at a time
        capacity_ = 0;
        const size_t bytes = num_chunks * chunk_size() * sizeof(scalar_t);
        memory_.reset(static_cast<scalar_t*>(::operator new[](bytes, ALIGNED)));
        advise_huge_pages(memory_.get(), bytes);
        capacity_ = num_chunks;
      }
      std::vector<Job> jobs;
      for (int64_t b = first; b < last; ++b) {
        for (int64_t chunk = 0; places_[b] != NONE && chunk < chunks_of(b); ++chunk) {
          // One head after the other: their keys lie side by side.
          for (int64_t head = 0; head < batch_.num_heads; ++head) jobs.push_back({b, chunk, head});
        }
      }
      parallel_for(static_cast<int64_t>(jobs.size()), 1, [&](int64_t begin, int64_t end) {
        std::vector<KeyRow<scalar_t>> rows(tiles_t::CHUNK_KEYS);
        for (; begin < end; ++begin) pack_chunk(jobs[begin], rows.data());
      });
      return last;
    }
  }

  // Whether a sequence's keys are here; else those of its tasks that have many rows pack them for themselves.
  bool has(int64_t sequence) const { return places_[sequence] != NONE; }

  // The chunk of a head that begins with a key.
  const scalar_t* chunk(int64_t sequence, int64_t head, int64_t key) const {
    return place(sequence, head, key / tiles_t::CHUNK_KEYS);
  }

 private:
  static constexpr int64_t NONE = -1, MOST_BYTES = 64 << 20;
  static constexpr std::align_val_t ALIGNED{64};

  struct Free {
    void operator()(scalar_t* memory) const { ::operator delete[](memory, ALIGNED); }
  };

  struct Job {
    int64_t sequence, chunk, head;
  };

  void pack_chunk(const Job& job, KeyRow<scalar_t>* rows) {
    const Sequence& s = batch_.sequences[job.sequence];
    const int64_t begin = job.chunk * tiles_t::CHUNK_KEYS, end = std::min(begin + tiles_t::CHUNK_KEYS, s.num_keys());
    batch_.find_rows(s, job.head, begin, end, rows);
    tiles_.many().pack(rows, end - begin, place(job.sequence, job.head, job.chunk));
  }

  // Whether the rows of a head are several tasks; all but perhaps the last have many rows.
  bool are_shared(int64_t sequence) const { return batch_.sequences[sequence].num_new > QUERY_ROWS; }

  int64_t chunks_of(int64_t sequence) const {
    return (batch_.sequences[sequence].num_keys() + tiles_t::CHUNK_KEYS - 1) / tiles_t::CHUNK_KEYS;
  }

  scalar_t* place(int64_t sequence, int64_t head, int64_t chunk) const {
    return memory_.get() + (places_[sequence] + head * chunks_of(sequence) + chunk) * chunk_size();
  }

  int64_t chunk_size() const { return tiles_.many().chunk_size(); }

  const Batch<scalar_t>& batch_;
  tiles_t tiles_;
  std::vector<int64_t> places_;  // of each sequence's first chunk; NONE of one that is not held
  std::unique_ptr<scalar_t[], Free> memory_;
  int64_t capacity_ = 0;  // in chunks
};

}  // namespace hstu
