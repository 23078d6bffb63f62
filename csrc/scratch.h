// Carves a thread's scratch block into arrays. Walked once without memory to learn the size, and once per
// work item with it.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "simd_common.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

class ScratchLayout {
 public:
  explicit ScratchLayout(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  // Arrays start on a cache line, each a few lines further into a page than the one before: arrays of 2^n
  // bytes would otherwise all compete for the same cache sets.
  template <class T>
  T* take(long count) {
    T* array = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    const size_t bytes = count * sizeof(T), taken = (bytes + 63) / 64 * 64 + 5 * 64;
    used_ += taken;
#if defined(__SANITIZE_ADDRESS__)
    if (array) {
      __asan_unpoison_memory_region(array, bytes);
      __asan_poison_memory_region(reinterpret_cast<char*>(array) + bytes, taken - bytes);
    }
#endif
    return array;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
