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

template <size_t alignment>
struct FreeAligned {
  void operator()(void* memory) const { ::operator delete[](memory, std::align_val_t(alignment)); }
};

// An array that begins with a cache line; its elements have no values yet.
template <typename value_t>
using Array = std::unique_ptr<value_t[], FreeAligned<64>>;

template <typename value_t>
Array<value_t> allocate(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(value_t);
  return Array<value_t>(static_cast<value_t*>(::operator new[](bytes, std::align_val_t(64))));
}

inline char* scratch(size_t bytes) {
  static thread_local std::unique_ptr<char, FreeAligned<HUGE_PAGE>> memory;
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
