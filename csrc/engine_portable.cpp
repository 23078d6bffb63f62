#define FASTATTN_ISA_NAMESPACE portable
#include "simd_portable.h"
// After the vector types.
#include "engine_table.h"
