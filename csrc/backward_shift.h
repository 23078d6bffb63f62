// What is taken from the scores of a query to recompute its weights: lse, as a sum of two numbers.
//
// P = exp2(s - lse) inherits the rounding of lse as a relative error of |lse| epsilon / 2. Where |lse| is
// large that is more than naive attention's error, whose weights add up to one by construction; beside a
// finite bias that stands for -inf nothing is left of the sum of weights. There the scores are computed once
// more, by the very product that the weights will come of, and lse becomes the largest score, which is
// subtracted exactly, and the logarithm of the sum of the weights beside it: in the backward one product more
// than its five, for the panels of queries that need it.
#pragma once

#include "backward_operands.h"
#include "few_queries.h"
#include "mask_map.h"
#include "parallel.h"
#include "scratch.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class S>
struct Shift {
  S reference;  // subtracted from scores, or from products where there is no bias
  S rest;       // then added in log2 units
};

// Of an lse that is not large; a row without keys has lse -inf and only masked weights.
template <class S>
INLINE Shift<S> shift_of(S lse) {
  return {0, lse == -Limits<S>::infinity ? 0 : static_cast<S>(-lse * log2_e)};
}

// The shifts of the queries whose lse is large: where rounding it, and scores of its size, costs the results
// more than their own sums do. That is some 16 units of fp32 or fp64, a sixteenth of a unit of fp16 and less
// of bf16's.
template <class V, class T>
class LargeShifts {
  using S = typename V::scalar;
  using E = typename V::element;
  using F = std::conditional_t<sizeof(S) == 8, F64, F32>;  // reads T
  static constexpr long depth = V::depth, width = V::tile_vectors * V::lanes, block_keys = 96;

 public:
  // `has_16_bit_results`: all that comes of the weights is rounded to 16 bits.
  LargeShifts(const Problem& problem, const ForwardScores<V>& scores, const MaskMap<width>& masks,
              const void* lse, bool has_16_bit_results)
      : problem_(problem),
        scores_(scores),
        masks_(masks),
        lse_(static_cast<const S*>(lse)),
        limit_(has_16_bit_results ? 1024 : 16),
        count_(problem.batch * problem.query_heads * problem.queries),
        wanted_(any_large({0, count_})),
        memory_(wanted_ ? sizeof(Shift<S>) * count_ : 0) {}

  bool any() const { return wanted_; }
  bool is_large(S lse) const { return (lse > limit_ || lse < -limit_) && lse - lse == 0; }
  // The shift of a query of [B][Hq][Lq].
  Shift<S> of(long query) const { return is_large(lse_[query]) ? data()[query] : shift_of(lse_[query]); }

  void compute(int threads) const {
    if (!wanted_) return;
    const long blocks = ceil_div(problem_.queries, width), heads = problem_.query_heads;
    parallel_for(problem_.batch * heads * blocks, threads, Workspace(*this, nullptr).bytes,
                 [&](int64_t item, void* scratch) {
                   const long first = item % blocks * width;
                   panel(item / blocks / heads, item / blocks % heads,
                         {first, min<long>(first + width, problem_.queries)}, Workspace(*this, scratch));
                 });
  }

 private:
  // [B][Hq][Lq], of the queries whose lse is large and nothing for the others.
  Shift<S>* data() const { return static_cast<Shift<S>*>(memory_.data()); }

  struct Workspace {
    Workspace(const LargeShifts& shifts, void* base) {
      const Problem& p = shifts.problem_;
      ScratchLayout layout(base);
      const long elements = ceil_div(p.head_dim, depth);
      query = layout.template take<E>(width * elements);
      key = layout.template take<E>(reads_in_place<V, T> ? 0 : block_keys * elements);
      products = layout.template take<S>(block_keys * width);
      bias = layout.template take<S>(p.bias.data ? block_keys * width : 0);
      allowed = layout.template take<uint8_t>(block_keys * width);
      cells = layout.template take<uint8_t>(shifts.masks_.scratch(block_keys));
      bytes = layout.used();
    }
    E *query, *key;
    S *products, *bias;
    uint8_t *allowed, *cells;
    size_t bytes;
  };

  bool any_large(Range rows) const {
    bool any = false;
    for (long i = rows.begin; i < rows.end; i++) any |= is_large(lse_[i]);
    return any;
  }

  void panel(long b, long h, Range queries, const Workspace& work) const {
    const long offset = (b * problem_.query_heads + h) * problem_.queries;
    if (!any_large({offset + queries.begin, offset + queries.end})) return;

    const Tensor4<const T> query = problem_.query.template as<const T>();
    pack_panel<V>(query.at(b, h, queries.begin), query.stride[2], queries.size(), problem_.head_dim, S(1),
                  work.query);
    alignas(64) S largest[width], sum[width];
    for (long q = 0; q < width; q++) largest[q] = -Limits<S>::infinity, sum[q] = 0;
    const Band band(problem_, b);
    const Range keys = band.seen_by_any(queries);
    for (long k = keys.begin; k < keys.end; k += block_keys)
      add_block(band, {b, h, queries, {k, min(keys.end, k + block_keys)}}, work, largest, sum);
    for (long q = queries.begin; q < queries.end; q++) {
      const long lane = q - queries.begin;
      if (is_large(lse_[offset + q]))
        data()[offset + q] = {problem_.bias.data ? largest[lane] : largest[lane] * scores_.units.multiplier,
                              -static_cast<S>(__builtin_log2(sum[lane]))};
    }
  }

  void add_block(const Band& band, const Tile& tile, const Workspace& work, S* largest, S* sum) const {
    const MaskCells cells = masks_.cells(tile, work.cells);
    const TileKind kind = classify<width>(problem_, band, cells, tile, work.allowed);
    if (kind == TileKind::empty) return;
    const bool masked = kind == TileKind::mixed, biased = problem_.bias.data;
    if (biased && problem_.bias_dtype == problem_.dtype)
      load_bias<F, T>(problem_, tile, work.bias);
    else if (biased)
      load_bias<F, float>(problem_, tile, work.bias);
    const long rows = tile.keys.size(), elements = ceil_div(problem_.head_dim, depth);
    const int columns = static_cast<int>(ceil_div(tile.queries.size(), V::lanes));
    const Tensor4<const T> key = problem_.key.template as<const T>();
    const T* first = key.at(tile.batch, tile.head / problem_.group(), tile.keys.begin);
    const auto read = rows_as_read<V>(first, key.stride[2], rows, problem_.head_dim, work.key);
    scores_.multiply(columns, rows, read, work.query, elements, work.products);

    const auto multiplier = V::set1(scores_.units.multiplier), factor = V::set1(scores_.units.factor);
    const auto none = V::set1(-Limits<S>::infinity);
    for (long q = 0; q < columns * V::lanes; q += V::lanes) {
      // Rounded as the tiles round it; -inf where the query may not attend.
      const auto score = [&](long k) {
        auto x = V::load(work.products + k * width + q);
        if (biased) {
          const auto bias = V::load(work.bias + k * width + q);
          x = V::max(V::set1(lowest_score<S>), V::fma(x, multiplier, bias));
          x = V::select(V::not_less_equal(bias, none), x, none);
        } else {
          x = V::mul(x, multiplier);
        }
        return masked ? V::select(V::nonzero(work.allowed + k * width + q), x, none) : x;
      };
      const auto old = V::load(largest + q);
      auto now = old;
      for (long k = 0; k < rows; k++) now = V::max(now, score(k));
      const auto reference = V::select(V::greater(V::set1(Limits<S>::lowest), now), V::zero(), now);
      auto total = V::mul(V::load(sum + q), V::exp2(V::mul(V::sub(old, reference), factor)));
      for (long k = 0; k < rows; k++)
        total = V::add(total, V::template exp2<5>(V::mul(V::sub(score(k), reference), factor)));
      V::store(largest + q, now);
      V::store(sum + q, total);
    }
  }

  const Problem& problem_;
  const ForwardScores<V>& scores_;
  const MaskMap<width>& masks_;
  const S* const lse_;
  const S limit_;
  const long count_;
  const bool wanted_;
  const AlignedBuffer memory_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
