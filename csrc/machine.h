// What the system knows and can be told: the cache that block sizes depend on, and the pages of large
// results.
#pragma once

#include <cstddef>

namespace fastattn {

// Bytes of a core's level 1 data cache; 32 KiB where the system does not tell.
size_t level1_cache_bytes();

// Asks for huge pages under memory that is about to be written for the first time, where it is large: with
// small ones, page faults take longer than writing it. A hint; nothing depends on it.
void prefer_huge_pages(const void* data, size_t bytes);

}  // namespace fastattn
