// The softmax weights themselves, recomputed from the saved lse: P = exp(scale Q K^T + bias - lse), with
// the forward's dropout applied; of a large lse from a sum of their own (backward_shift.h). Averaged over
// heads in one pass that stores no head's own weights.
#pragma once

#include "backward_shift.h"
#include "decode.h"
#include "forward.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// Products are the micro-kernel's of P: those that the lse came of, so that weights add up to one.
template <class T, class P>
class Weights {
  using V = std::conditional_t<sizeof(T) == 8, F64, F32>;
  using S = typename V::scalar;
  using E = typename P::element;
  static constexpr int width = V::lanes * V::tile_vectors;
  static constexpr long block_keys = 256;

 public:
  Weights(const Problem& problem, const WeightsOutput& output)
      : problem_(problem),
        output_(output),
        scores_(problem),
        masks_(problem),
        shifts_(problem, scores_, masks_, output.lse, false),
        panels_(ceil_div(problem.queries, width)),
        key_blocks_(ceil_div(problem.keys, block_keys)) {}

  void run(int threads) const {
    const long heads = output_.average ? 1 : problem_.query_heads;
    masks_.scan(threads);
    shifts_.compute(threads);
    parallel_for(problem_.batch * heads * panels_ * key_blocks_, threads,
                 Workspace(*this, ScratchLayout()).bytes, [this, heads](int64_t item, void* scratch) {
                   const long block = item % key_blocks_, panel = item / key_blocks_ % panels_,
                              head = item / key_blocks_ / panels_ % heads,
                              b = item / key_blocks_ / panels_ / heads;
                   run_item(b, head, panel, block, scratch);
                 });
  }

 private:
  struct Workspace {
    Workspace(const Weights& weights, ScratchLayout arena) {
      const Problem& p = weights.problem_;
      const long elements = ceil_div(p.head_dim, P::depth);
      query = arena.take<E>(elements * width);
      products = arena.take<S>(block_keys * width);
      total = arena.take<S>(block_keys * width);
      bias = arena.take<S>(p.bias.data ? block_keys * width : 0);
      seen = arena.take<uint8_t>(block_keys * width + 64);
      cells = arena.take<uint8_t>(weights.masks_.scratch(block_keys));
      kept = arena.take<typename V::mask>(p.dropout_p > 0 ? block_keys * V::tile_vectors : 0);
      key = arena.take<E>(reads_in_place<P, T> ? 0 : block_keys * elements);
      bytes = arena.used();
    }
    E* query;
    S *products, *total, *bias;
    uint8_t *seen, *cells;
    typename V::mask* kept;
    E* key;
    size_t bytes;
  };

  void run_item(long b, long head, long panel, long block, void* scratch) const {
    const Workspace work(*this, ScratchLayout(scratch));
    const Band band(problem_, b);
    const Range queries{panel * width, min((panel + 1) * width, problem_.queries)};
    const Range keys{block * block_keys, min((block + 1) * block_keys, problem_.keys)};
    memset(work.total, 0, keys.size() * width * sizeof(S));
    const long first = output_.average ? 0 : head, last = output_.average ? problem_.query_heads : head + 1;
    for (long h = first; h < last; h++) add_head({b, h, queries, keys}, band, work);

    alignas(64) S factor[width];
    const S share = static_cast<S>(1 / (1 - problem_.dropout_p) / static_cast<double>(last - first));
    for (S& f : factor) f = share;
    S* rows = static_cast<S*>(output_.weights);
    const long heads = output_.average ? 1 : problem_.query_heads;
    rows += ((b * heads + head) * problem_.queries + queries.begin) * problem_.keys + keys.begin;
    unpack_transposed<V>(work.total, factor, queries.size(), keys.size(), rows, problem_.keys);
  }

  void add_head(const Tile& tile, const Band& band, const Workspace& work) const {
    if (intersect(band.seen_by_any(tile.queries), tile.keys).empty()) return;
    const MaskCells cells = masks_.cells(tile, work.cells);
    const TileKind kind = classify<width>(problem_, band, cells, tile, work.seen);
    if (kind == TileKind::empty) return;
    const long rows = tile.keys.size(), columns = ceil_div(tile.queries.size(), V::lanes);
    const Tensor4<const T> query = problem_.query.as<const T>(), key = problem_.key.as<const T>();
    pack_panel<P>(query.at(tile.batch, tile.head, tile.queries.begin), query.stride[2], tile.queries.size(),
                  problem_.head_dim, S(1), work.query);
    const auto read = rows_as_read<P>(key.at(tile.batch, tile.head / problem_.group(), tile.keys.begin),
                                      key.stride[2], rows, problem_.head_dim, work.key);
    scores_.multiply(static_cast<int>(columns), rows, read, work.query, ceil_div(problem_.head_dim, P::depth),
                     work.products);
    if (problem_.bias.data) {
      if (problem_.bias_dtype == problem_.dtype)
        load_bias<V, T>(problem_, tile, work.bias);
      else
        load_bias<V, float>(problem_, tile, work.bias);
    }
    if (problem_.dropout_p > 0) draw_dropout<V>(problem_, tile, static_cast<int>(columns), work.kept);

    alignas(64) S reference[width] = {}, share[width] = {}, share_of_rounded[width] = {};
    for (long q = 0; q < tile.queries.size(); q++)
      normalise(tile, q, reference[q], share[q], share_of_rounded[q]);
    const ScoreRules<V> rules{scores_.units,
                              problem_.bias.data ? work.bias : nullptr,
                              kind == TileKind::mixed ? work.seen : nullptr,
                              &band,
                              tile.queries,
                              tile.keys};
    const Reach reach = kind == TileKind::mixed ? Reach{0, rows, rows, rows} : Reach{0, 0, rows, rows};
    for (int j = 0; j < columns; j++) {
      prepare_scores(rules, j, reach, rows, work.products);
      keep_unseen_from_nan(work.products + j * V::lanes, rows, reference + j * V::lanes);
      const auto factor = V::select(huge<V>(V::load(reference + j * V::lanes)),
                                    V::load(share_of_rounded + j * V::lanes), V::load(share + j * V::lanes));
      typename V::vector sums[V::depth] = {};  // one, if the lse is right
      exponentiate<V, 5>(work.products + j * V::lanes, rows, rules.units.factor,
                         V::load(reference + j * V::lanes), problem_.dropout_p > 0 ? work.kept + j : nullptr,
                         sums);
      for (long r = 0; r < rows; r++) {
        S* total = work.total + r * width + j * V::lanes;
        V::store(total, V::fma(V::load(work.products + r * width + j * V::lanes), factor, V::load(total)));
      }
    }
  }

  // Where the lse is NaN all weights are, but for those of keys that are not seen: prepared scores of -inf.
  static void keep_unseen_from_nan(S* column, long rows, S* reference) {
    const auto given = V::load(reference), infinity = V::set1(Limits<S>::infinity);
    const auto nan = V::not_less_equal(given, infinity);
    if (!V::any(nan)) return;
    V::store(reference, V::select(nan, V::zero(), given));
    for (long r = 0; r < rows; r++) {
      const auto score = V::load(column + r * width);
      const auto seen = V::not_less_equal(score, V::sub(V::zero(), infinity));
      V::store(column + r * width, V::select(V::both(nan, seen), given, score));
    }
  }

  // The weights of the tile's query q are share * exp2(score - reference), and share_of_rounded times that
  // where scores in log2 units are rounded before the reference, which is rounded alike, is subtracted.
  void normalise(const Tile& tile, long q, S& reference, S& share, S& share_of_rounded) const {
    const long i =
        (tile.batch * problem_.query_heads + tile.head) * problem_.queries + tile.queries.begin + q;
    const S lse = static_cast<const S*>(output_.lse)[i];
    const Shift<S> shift = shifts_.of(i);
    // Against +inf every weight of a query without keys is 0.
    reference = Limits<S>::infinity;
    share = share_of_rounded = 1;
    if (lse == -Limits<S>::infinity) return;
    if (!shifts_.is_large(lse)) {
      reference = -shift.rest;
      return;
    }
    // The reference in log2 units, and what rounding takes from it.
    const double factor = problem_.bias.data ? scores_.units.factor : scores_.product_factor;
    reference = static_cast<S>(factor * shift.reference);
    share = static_cast<S>(
        __builtin_exp2(shift.rest + __builtin_fma(-factor, shift.reference, double(reference))));
    share_of_rounded = static_cast<S>(__builtin_exp2(shift.rest));
  }

  const Problem& problem_;
  const WeightsOutput& output_;
  const ForwardScores<P> scores_;
  const MaskMap<width> masks_;
  const LargeShifts<P, T> shifts_;
  const long panels_, key_blocks_;
};

inline void weights(const Problem& problem, const WeightsOutput& output, int threads) {
  switch (problem.dtype) {
    case DType::f32:
      return Weights<float, F32>(problem, output).run(threads);
    case DType::bf16:
      // Decode multiplies widened values.
      if (Decode<bf16>::suits(problem)) return Weights<bf16, F32>(problem, output).run(threads);
      return Weights<bf16, Arithmetic<bf16>::V>(problem, output).run(threads);
    case DType::f16:
      return Weights<fp16, F32>(problem, output).run(threads);
    case DType::f64:
      return Weights<double, F64>(problem, output).run(threads);
  }
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
