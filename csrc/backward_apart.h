// The queries whose rows of Q or dO are not finite. The products that sum over queries, dV and dK, multiply
// all of them by a key's weights, and 0 * NaN is NaN: keys that may not be seen by such a query would take
// part in it. So it is 0 in those products, and what it gives to the keys that it has a weight for is added
// apart.
#pragma once

#include "backward_operands.h"
#include "mask.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <long most>
class QueriesApart {
 public:
  bool empty() const { return count_ == 0; }
  void clear() { count_ = 0; }
  void add(long query) { queries_[count_++] = query; }

  template <class Function>
  void visit(Range queries, Function function) const {
    for (long i = 0; i < count_; i++)
      if (queries.begin <= queries_[i] && queries_[i] < queries.end) function(queries_[i]);
  }

  // Sets their rows to 0 in [queries][columns], or in pairs of queries [queries / 2][columns], that begin
  // with query `first`.
  template <class V>
  void clear_rows(long first, typename V::element* rows, long columns) const {
    for (long i = 0; i < count_; i++) {
      typename V::element* row = rows + (queries_[i] - first) / V::depth * columns;
      if constexpr (V::depth == 1) {
        memset(row, 0, sizeof(*row) * columns);
      } else {
        const uint32_t kept = (queries_[i] - first) % 2 ? 0x0000ffffu : 0xffff0000u;
        for (long c = 0; c < columns; c++) row[c] &= kept;
      }
    }
  }

 private:
  long count_ = 0, queries_[most];
};

// sum[columns] += factor * row, in whole vectors; nothing where the factor is 0.
template <class V, class T>
void add_multiple(typename V::scalar factor, const T* row, long columns, typename V::scalar* sum) {
  if (factor == 0) return;
  for (long c = 0; c < columns; c += V::lanes)
    V::store(sum + c, V::fma(V::set1(factor), load_some<V>(row + c, columns - c), V::load(sum + c)));
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
