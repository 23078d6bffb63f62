#define FASTATTN_ISA_NAMESPACE portable
#include "../simd_portable.h"
// After the vector types.
#include "parts_table.h"
