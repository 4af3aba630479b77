// Loops on all threads of the one OpenMP library that torch has loaded, whichever compiler builds this.
//
// What a compiler makes of `#pragma omp parallel` calls the library of that compiler. clang's would be a second one in
// the process, with threads of its own, which torch.set_num_threads does not reach. GOMP_parallel is what g++ makes of
// the pragma, and every OpenMP library that torch comes with answers to it: no compiler's own is linked.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

extern "C" {
// Runs run(data) on every thread of a team of as many as omp_set_num_threads said, where num_threads is 0.
void GOMP_parallel(void (*run)(void*), void* data, unsigned num_threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
}

namespace hstu {

// Calls run(begin, end) for equal parts of [0, count), each on a thread of its own: one for each thread of the team, but no
// more than count / grain, rounded up. What one of them throws is thrown here.
template <typename run_t>
void parallel_for(int64_t count, int64_t grain, const run_t& run) {
  if (count <= 0) return;
  at::internal::lazy_init_num_threads();
  if (count <= std::max<int64_t>(grain, 1) || at::in_parallel_region() || at::get_num_threads() == 1) {
    run(int64_t(0), count);
    return;
  }
  struct Shared {
    const run_t& run;
    int64_t count, most_parts;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error = nullptr;

    void run_part() {
      const int64_t parts = std::min<int64_t>(omp_get_num_threads(), most_parts);
      const int64_t length = (count + parts - 1) / parts, begin = omp_get_thread_num() * length;
      if (begin >= count) return;
      try {
        run(begin, std::min(begin + length, count));
      } catch (...) {  // nothing may leave a thread of a team
        if (!failed.test_and_set()) error = std::current_exception();
      }
    }
  };
  const int64_t least = std::max<int64_t>(grain, 1);
  Shared shared{run, count, (count + least - 1) / least};
  GOMP_parallel([](void* data) { static_cast<Shared*>(data)->run_part(); }, &shared, 0, 0);
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace hstu
