#define FASTATTN_ISA_NAMESPACE avx2
#include "../simd_avx2.h"
// After the vector types.
#include "parts_table.h"
