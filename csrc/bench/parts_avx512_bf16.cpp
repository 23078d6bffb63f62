#define FASTATTN_ISA_NAMESPACE avx512_bf16
#define FASTATTN_BF16_DOT
#include "../simd_avx512.h"
// After the vector types.
#include "parts_table.h"
