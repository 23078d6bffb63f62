// Memory for large results. The system hands out pages that it has to zero first, 0.2 ms a MiB in a virtual
// machine: a tenth of a training step's attention. So blocks that results and large scratch leave are kept
// for the next ones.
#pragma once

#include <cstddef>

namespace fastattn {

// A block of at least `bytes`, which begins on a huge page; its contents are undefined. `bytes` becomes its
// size. Null where the system has none.
void* take_result_memory(size_t& bytes);

// Keeps the block, of the size that was taken, for a later result, in the place of the oldest ones if need
// be.
void give_back_result_memory(void* block, size_t bytes);

// Keeps no more than this many bytes from now on, 0 for none.
void limit_kept_result_memory(size_t bytes);

size_t kept_result_memory();

}  // namespace fastattn
