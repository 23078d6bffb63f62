// Which keys a block of queries sees by its position alone: causality, window and key lengths.
#pragma once

#include "problem.h"
#include "simd_common.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// Half-open.
struct Range {
  long begin, end;
  INLINE long size() const { return end - begin; }
  INLINE bool empty() const { return end <= begin; }
};

INLINE Range intersect(Range a, Range b) { return {max(a.begin, b.begin), min(a.end, b.end)}; }

// Causality, window and key length of one batch entry: query i sees keys [first(i), last(i)), and both
// ends never decrease with i.
class Band {
 public:
  Band(const Problem& problem, long batch) : queries_(problem.queries), keys_(problem.key_length(batch)) {
    if (problem.causal == Causal::lower_right) shift_ = keys_ - problem.queries;
    before_ = problem.window_left < 0 ? unlimited : problem.window_left;
    after_ = problem.window_right < 0 ? unlimited : problem.window_right;
    if (problem.causal != Causal::none) after_ = 0;
  }

  INLINE Range row(long i) const {
    const long position = i + shift_;
    const long end = max(0L, min(keys_, position + after_ + 1));
    return {min(max(0L, position - before_), end), end};
  }
  // Keys that some query of [begin, end) sees; a superset where the rows' ranges leave gaps.
  INLINE Range seen_by_any(Range queries) const {
    const long end = row(queries.end - 1).end;
    return {min(row(queries.begin).begin, end), end};
  }
  // Keys that every query of [begin, end) sees; empty() when there are none.
  INLINE Range seen_by_all(Range queries) const {
    return {row(queries.end - 1).begin, row(queries.begin).end};
  }
  // Queries that see some key of [begin, end); a superset likewise.
  INLINE Range queries_of(Range keys) const {
    if (keys.begin >= keys_) return {0, 0};
    const long begin = min(queries_, max(0L, keys.begin - after_ - shift_));
    return {begin, max(begin, min(queries_, keys.end + before_ - shift_))};
  }

 private:
  static constexpr long unlimited = 1L << 60;
  long queries_, keys_, shift_ = 0, before_, after_;
};

enum class TileKind { empty, full, mixed };

// A block of the score matrix: some queries of one head against some keys.
struct Tile {
  long batch, head;  // query head
  Range queries, keys;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
