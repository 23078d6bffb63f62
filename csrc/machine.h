// What the kernels' block sizes depend on.
#pragma once

#include <cstddef>

namespace fastattn {

// Bytes of a core's level 1 data cache; 32 KiB where the system does not tell.
size_t level1_cache_bytes();

}  // namespace fastattn
