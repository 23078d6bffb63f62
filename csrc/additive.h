// Additive attention as the engine sees it. fastattn/additive.py prepares the arrays and finishes the sums.
#pragma once

#include <cstdint>

#include "problem.h"

namespace fastattn {

// score(i, j) = offset + sum_d weight[d] / (1 + query[i, d] * key[j, d]), in log2 units. With query and key
// holding exp(2 q) and exp(2 k), 1 / (1 + their product) is (1 - tanh(q + k)) / 2: a tanh costs a division.
//
// Contiguous fp32 (or fp64) arrays; features and value_dim are multiples of 16.
struct AdditiveProblem {
  DType dtype = DType::f32;
  int64_t batch = 0, queries = 0, keys = 0, features = 0, value_dim = 0;
  const void* query = nullptr;    // [B, Lq, D]
  const void* key = nullptr;      // [B, Lk, D]
  const void* value = nullptr;    // [B, Lk, Dv]
  const void* weight = nullptr;   // [D]
  const uint8_t* mask = nullptr;  // [B, Lk], nonzero = attend; null = all
  double offset = 0;
};

// output = exp(2 input), each row of `features` numbers padded by ones to `padded`, a multiple of 16.
struct AdditiveExponentials {
  DType dtype = DType::f32;
  int64_t rows = 0, features = 0, padded = 0;
  const void* input = nullptr;  // [rows, features]
  void* output = nullptr;       // [rows, padded]
};

// out [B, Lq, Dv], and each row's largest score and sum of 2^(score - largest), [B, Lq]. A row that may
// attend to nothing has out 0, largest -inf, sum 0.
struct AdditiveOutput {
  void *out = nullptr, *largest = nullptr, *sum = nullptr;
};

// Keys are cut into `chunks`, each an item of work for each sequence. With r = 1 / (1 + query key) and dS the
// gradient of the score in natural units:
//   grad_query [chunks, B, Lq, D]   sum_j dS (r^2 - r), over the chunk's keys
//   grad_key   [B, Lk, D]           sum_i dS (r^2 - r)
//   grad_weight [chunks, B, D]      sum_ij dS (r - 1/2)
//   grad_value [B, Lk, Dv]          P^T grad_out
struct AdditiveGradients {
  int64_t chunks = 1;
  const void* lse = nullptr;       // [B, Lq], log2 units
  const void* delta = nullptr;     // [B, Lq], rowsum(grad_out * out)
  const void* grad_out = nullptr;  // [B, Lq, Dv]
  void *grad_query = nullptr, *grad_key = nullptr, *grad_value = nullptr, *grad_weight = nullptr;
};

}  // namespace fastattn
