#include "machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace fastattn {

size_t level1_cache_bytes() {
  static const size_t bytes = [] {
    long found = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
    found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    return found > 0 ? static_cast<size_t>(found) : size_t{32} << 10;
  }();
  return bytes;
}

void prefer_huge_pages(const void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 4096;
  constexpr size_t worthwhile = size_t{2} << 20;
  if (bytes < worthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace fastattn
