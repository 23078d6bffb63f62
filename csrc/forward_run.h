// The forward pass: the entry point of one instruction set.
#pragma once

#include "decode.h"
#include "forward.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// Few queries are bound by reading keys and values, many by multiply-adds.
template <class T>
void forward_of(const Problem& problem, const ForwardOutput& output, int threads) {
  if (Decode<T>::suits(problem))
    Decode<T>(problem, output).run(threads);
  else
    Forward<T>(problem, output).run(threads);
}

inline void forward(const Problem& problem, const ForwardOutput& output, int threads) {
  switch (problem.dtype) {
    case DType::f32:
      return forward_of<float>(problem, output, threads);
    case DType::bf16:
      return forward_of<bf16>(problem, output, threads);
    case DType::f16:
      return forward_of<fp16>(problem, output, threads);
    case DType::f64:
      return forward_of<double>(problem, output, threads);
  }
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
