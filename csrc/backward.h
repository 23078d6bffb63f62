// What a backward call reads besides the problem, and what it writes.
#pragma once

#include "problem.h"

namespace fastattn {

// out, its residual (or null), lse and their gradients as the forward gave and received them; gradients of
// the inputs in the problem's dtype (unit last stride), each null when it is not wanted. grad_bias is zero on
// entry, contiguous in fp32 (fp64 for fp64), of size 1 wherever the bias has stride 0, else of full size.
struct BackwardArgs {
  Tensor4<const uint8_t> out, residual, grad_out;  // [B, Hq, Lq, Dv]
  const void* lse = nullptr;                       // [B, Hq, Lq] contiguous
  const void* grad_lse = nullptr;                  // like lse, or null for zero
  Tensor4<uint8_t> grad_query, grad_key, grad_value;
  void* grad_bias = nullptr;
};

}  // namespace fastattn
