#include "machine.h"

#include <unistd.h>

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

}  // namespace fastattn
