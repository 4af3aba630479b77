// Memory of a thread that stays for its next call: fresh pages would cost more than small calls do.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace hstu {

constexpr size_t HUGE_PAGE = 2 << 20;

// Asks for huge pages where memory has whole ones: there are fewer addresses to translate, and small pages meet in the
// same sets of the second-level cache.
inline void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, last = (begin + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline char* scratch(size_t bytes) {
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(HUGE_PAGE)); }
  };
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;  // until the memory is there
    const size_t rounded = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    memory.reset(static_cast<char*>(::operator new[](rounded, std::align_val_t(HUGE_PAGE))));
    size = rounded;
    advise_huge_pages(memory.get(), size);
  }
  return memory.get();
}

// Hands out parts of a piece of memory, each at a cache line's start; the first round, without memory, adds sizes up.
class Carver {
 public:
  explicit Carver(char* memory = nullptr) : memory_(memory) {}

  template <typename value_t>
  void take(value_t*& array, int64_t count) {
    array = memory_ ? reinterpret_cast<value_t*>(memory_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(value_t) + 63) / 64 * 64;
  }

  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

}  // namespace hstu
