#define FASTATTN_ISA_NAMESPACE avx512
#include "../simd_avx512.h"
// After the vector types.
#include "parts_table.h"
