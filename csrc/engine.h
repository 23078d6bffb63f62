// The entry points of one instruction set. Each engine_<isa>.cpp defines one table.
#pragma once

#include "additive.h"
#include "backward.h"
#include "problem.h"

namespace fastattn {

struct Engine {
  const char* name;
  void (*forward)(const Problem&, const ForwardOutput&, int threads);
  void (*backward)(const Problem&, const BackwardArgs&, int threads);
  void (*weights)(const Problem&, const WeightsOutput&, int threads);
  // Returns the largest magnitude of the input, NaN where a number of it is not finite.
  double (*additive_exponentials)(const AdditiveExponentials&, int threads);
  void (*additive_forward)(const AdditiveProblem&, const AdditiveOutput&, int threads);
  void (*additive_backward)(const AdditiveProblem&, const AdditiveGradients&, int threads);
  // The machine's ceilings: multiply-adds on registers, and reading memory.
  double (*probe_multiply_add)(DType, int threads, int64_t rounds);
  void (*probe_read)(const float* data, int64_t count, int threads);
};

extern const Engine engine_portable, engine_avx2, engine_avx512, engine_avx512_bf16,
    engine_avx512_bf16_emulated;

}  // namespace fastattn
