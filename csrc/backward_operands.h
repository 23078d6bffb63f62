// The backward's passes over rows of operands and gradients: all that costs O(L D).
#pragma once

#include "pack.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// Loads count (at most lanes) elements at p, zero past them.
template <class V, class T>
INLINE typename V::vector load_some(const T* p, long count) {
  return count >= V::lanes ? V::load(p) : V::load(p, count);
}
template <class V, class T>
INLINE void store_some(T* p, typename V::vector v, long count) {
  if (count >= V::lanes)
    V::store(p, v);
  else
    V::store(p, v, count);
}

template <class V, class T>
INLINE typename V::scalar first_of(const T* p) {
  typename V::scalar values[V::lanes];
  V::store(values, V::load(p, 1));
  return values[0];
}

template <class V, class T>
INLINE typename V::scalar dot(const T* a, const T* b, long count) {
  typename V::vector sum = V::zero();
  for (long c = 0; c < count; c += V::lanes)
    sum = V::fma(load_some<V>(a + c, count - c), load_some<V>(b + c, count - c), sum);
  return V::sum(sum);
}

// The same of rows before they were narrowed.
template <class V, class T>
INLINE typename V::scalar dot_unrounded(const T* a, const T* residual, const T* b, long count) {
  typename V::vector sum = V::zero();
  long c = 0;
  for (; c + V::lanes <= count; c += V::lanes)
    sum = V::fma(load_unrounded<V>(a + c, residual + c), V::load(b + c), sum);
  if (c < count)
    sum = V::fma(load_unrounded<V>(a + c, residual + c, count - c), V::load(b + c, count - c), sum);
  return V::sum(sum);
}

template <class V, class T>
bool all_finite(const T* source, long stride, long rows, long columns) {
  typename V::vector zeros = V::zero();  // 0 * x is NaN for a NaN or infinite x
  for (long r = 0; r < rows; r++)
    for (long c = 0; c < columns; c += V::lanes)
      zeros = V::fma(load_some<V>(source + r * stride + c, columns - c), V::zero(), zeros);
  return V::sum(zeros) == 0;
}

// factor * sum, narrowed: scalar [rows][columns_padded] -> T [rows][columns].
template <class V, class T>
void write_rows(const typename V::scalar* sum, long columns_padded, long rows, long columns,
                typename V::scalar factor, T* out, long stride) {
  for (long r = 0; r < rows; r++)
    for (long c = 0; c < columns; c += V::lanes)
      store_some<V>(out + r * stride + c, V::mul(V::load(sum + r * columns_padded + c), V::set1(factor)),
                    columns - c);
}

// sum[count] += part, in whole vectors.
template <class V>
void add_to(typename V::scalar* sum, const typename V::scalar* part, long count) {
  for (long i = 0; i < count; i += V::lanes) V::store(sum + i, V::add(V::load(sum + i), V::load(part + i)));
}

template <class T>
void zero_rows(T* out, long stride, long rows, long columns) {
  for (long r = 0; r < rows; r++) memset(static_cast<void*>(out + r * stride), 0, sizeof(T) * columns);
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
