// The forward pass for many queries: softmax(scale Q K^T + bias) V without the score matrix.
//
// Scores are computed transposed: keys are rows, queries lie across the vector lanes. A panel is `width`
// queries (V::tile_vectors vectors); a work item is a few panels of one head, which share each block of keys
// while it is in the cache. Per panel and block of keys:
//
//   S^T [keys, width] = K [keys, D] Q^T [D, width]      K is read in place, Q^T is packed once
//   P^T = exp2(factor S^T + bias - reference)           in place; sum of P over keys
//   O^T [Dv, width] += V^T [Dv, keys] P^T [keys, width] V is read in place
//
// The online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022) is lazy: `reference` is
// the row maximum of the first block that a query sees, and is renewed only where the sum of a block shows
// that some score lies far above it. Most blocks need no maximum at all.
#pragma once

#include "gemm.h"
#include "mask.h"
#include "pack.h"
#include "parallel.h"
#include "scratch.h"
#include "softmax.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// How a dtype is computed: the micro-kernel's vector type, and the degree of exp2 that its precision needs.
template <class T>
struct Arithmetic;
template <>
struct Arithmetic<float> {
  using V = F32;
  static constexpr int degree = 5;
};
template <>
struct Arithmetic<double> {
  using V = F64;
  static constexpr int degree = 5;
};
template <>
struct Arithmetic<fp16> {
  using V = F32;
  static constexpr int degree = 3;
};
template <>
struct Arithmetic<bf16> {
#ifdef FASTATTN_BF16_DOT
  using V = BF16Pair;
#else
  using V = F32;
#endif
  static constexpr int degree = 3;
};

// A block of keys and values as the micro-kernel reads them.
template <class V>
struct KeyBlock {
  const typename V::element* key;
  long key_stride;
  const typename V::element* value;
  long value_stride;
};

template <class T>
class Forward {
  using V = typename Arithmetic<T>::V;
  using S = typename V::scalar;
  using E = typename V::element;
  using vector = typename V::vector;
  static constexpr int degree = Arithmetic<T>::degree, depth = V::depth;
  static constexpr int columns = V::tile_vectors, width = V::lanes * columns;
  // Long blocks: a tile of O^T is loaded and stored once per block, and P^T streams well from the L2 cache.
  // Keys and values of a block take at most a quarter of it.
  static constexpr long most_block_keys = 256, least_block_keys = 64, block_bytes = 256 * 1024;
  static constexpr long item_queries = 256;
  static constexpr bool in_place = sizeof(T) == sizeof(E);  // K and V need no conversion
  // A sum of weights above this says that the reference is too low: nothing has overflowed yet.
  static constexpr S overflow_sum = static_cast<S>(4294967296.0);

 public:
  Forward(const Problem& problem, const ForwardOutput& output)
      : problem_(problem),
        output_(output),
        query_(problem.query.as<const T>()),
        key_(problem.key.as<const T>()),
        value_(problem.value.as<const T>()),
        key_depth_(ceil_div(problem.head_dim, depth)),
        value_stride_((ceil_div(problem.value_dim * sizeof(E), 64) | 1) * (64 / sizeof(E))),
        block_keys_(choose_block()),
        panels_per_item_(choose_panels()),
        blocks_(ceil_div(problem.queries, panels_per_item_ * width)),
        copy_values_(panels_per_item_ * width >= 128 && problem.value.stride[2] * sizeof(T) % 256 == 0) {}

  void run(int threads) const {
    parallel_for(problem_.batch * problem_.query_heads * blocks_, threads,
                 Workspace(*this, ScratchLayout()).bytes,
                 [this](int64_t item, void* scratch) { run_item(item, scratch); });
  }

 private:
  struct Panel {
    Range queries;
    int columns;         // vectors with a query in them
    Range any, all;      // keys that some, that every query sees
    bool ready;          // every query has a reference
    E* query;            // [key_depth][width]
    S* out;              // [Dv][width]
    S *reference, *sum;  // [width]
  };

  struct Workspace {
    Workspace(const Forward& f, ScratchLayout layout) {
      const long block_keys = f.block_keys_;
      const Problem& p = f.problem_;
      for (int i = 0; i < f.panels_per_item_; i++) {
        panel[i].query = layout.take<E>(f.key_depth_ * width);
        panel[i].out = layout.take<S>(p.value_dim * width);
        panel[i].reference = layout.take<S>(width);
        panel[i].sum = layout.take<S>(width);
      }
      products = layout.take<S>((block_keys + depth) * width);
      if (p.bias.data) bias = layout.take<S>(block_keys * width);
      if (p.mask.data || p.bias.data) seen = layout.take<uint8_t>(block_keys * width + 64);
      if (p.dropout_p > 0) kept = layout.take<typename V::mask>(block_keys * columns);
      if (!in_place || depth == 2) {
        key = layout.take<E>(block_keys * f.key_depth_);
      }
      value = layout.take<E>(ceil_div(block_keys, depth) * f.value_stride_);
      if (p.mask.data || p.bias.data) clean_value = layout.take<E>((block_keys / depth + 1) * p.value_dim);
      bytes = layout.used();
    }
    Panel panel[item_queries / width];
    S* products;
    S* bias = nullptr;
    uint8_t* seen = nullptr;
    typename V::mask* kept = nullptr;
    E *key = nullptr, *value = nullptr, *clean_value = nullptr;
    size_t bytes;
  };

  long choose_block() const {
    const long row = max(1L, problem_.head_dim + problem_.value_dim) * static_cast<long>(sizeof(S));
    return max(least_block_keys, min(most_block_keys, block_bytes / row / 2 * 2));
  }

  // From the shape alone, so that results do not depend on the threads: as many panels as share a block of
  // keys, unless that leaves too few items to go round.
  int choose_panels() const {
    long panels = item_queries / width;
    const long heads = problem_.batch * problem_.query_heads;
    while (panels * width > 64 && heads * ceil_div(problem_.queries, panels * width) < 32) panels /= 2;
    return static_cast<int>(min(panels, max(1L, ceil_div(problem_.queries, width))));
  }

  void run_item(long item, void* scratch) const {
    const long head_index = item / blocks_, b = head_index / problem_.query_heads,
               h = head_index % problem_.query_heads;
    // Later queries see more keys when causal: heaviest first within a head, heads in turn for the cache.
    const long block = blocks_ - 1 - item % blocks_;
    Workspace work(*this, ScratchLayout(scratch));
    const Band band(problem_, b);

    Range keys{problem_.keys, 0};
    int panels = 0;
    const long first = block * panels_per_item_ * width;
    for (; panels < panels_per_item_ && first + panels * width < problem_.queries; panels++) {
      Panel& panel = work.panel[panels];
      start_panel(panel, band, b, h, first + panels * width);
      if (panel.any.empty()) continue;
      keys = {min(keys.begin, panel.any.begin), max(keys.end, panel.any.end)};
    }
    if (!keys.empty()) {
      const long steps = ceil_div(keys.size(), block_keys_);
      const long step = min(block_keys_, round_up(ceil_div(keys.size(), steps), 2));
      for (long begin = keys.begin; begin < keys.end; begin += step) {
        const Range range{begin, min(begin + step, keys.end)};
        const KeyBlock<V> key_block = prepare_keys(b, h / problem_.group(), range, work);
        for (int i = 0; i < panels; i++) visit(work, work.panel[i], band, b, h, range, key_block);
      }
    }
    for (int i = 0; i < panels; i++) finish_panel(work.panel[i], b, h);
  }

  void start_panel(Panel& panel, const Band& band, long b, long h, long first) const {
    panel.queries = {first, min(first + width, problem_.queries)};
    panel.columns = static_cast<int>(ceil_div(panel.queries.size(), V::lanes));
    panel.any = band.seen_by_any(panel.queries);
    panel.all = band.seen_by_all(panel.queries);
    panel.ready = false;
    const T* query = query_.at(b, h, first);
    if constexpr (depth == 1)
      pack_transposed<V>(query, query_.stride[2], panel.queries.size(), problem_.head_dim, S(1), panel.query,
                         width);
#ifdef FASTATTN_BF16_DOT
    else
      pack_pairs_transposed(query, query_.stride[2], panel.queries.size(), problem_.head_dim, panel.query,
                            width);
#endif
    memset(panel.out, 0, problem_.value_dim * width * sizeof(S));
    for (int j = 0; j < columns; j++) {
      // Lanes past the last query have a reference from the start: nothing waits for them.
      const auto real = V::first_lanes(panel.queries.size() - j * V::lanes);
      V::store(panel.reference + j * V::lanes, V::select(real, V::set1(-Limits<S>::infinity), V::zero()));
      V::store(panel.sum + j * V::lanes, V::zero());
    }
  }

  KeyBlock<V> prepare_keys(long b, long kv_head, Range keys, Workspace& work) const {
    const T *key = key_.at(b, kv_head, keys.begin), *value = value_.at(b, kv_head, keys.begin);
    if constexpr (in_place) {
      if (!copy_values_) return {key, key_.stride[2], value, value_.stride[2]};
      copy_widened<V>(value, value_.stride[2], keys.size(), problem_.value_dim, work.value, value_stride_);
      return {key, key_.stride[2], work.value, value_stride_};
    } else if constexpr (depth == 1) {
      copy_widened<V>(key, key_.stride[2], keys.size(), problem_.head_dim, work.key, key_depth_);
      copy_widened<V>(value, value_.stride[2], keys.size(), problem_.value_dim, work.value, value_stride_);
      return {work.key, key_depth_, work.value, value_stride_};
    } else {
#ifdef FASTATTN_BF16_DOT
      interleave_row_pairs(value, value_.stride[2], keys.size(), problem_.value_dim, work.value,
                           value_stride_);
      if (problem_.head_dim % 2 == 0 && key_.stride[2] % 2 == 0)
        return {reinterpret_cast<const E*>(key), key_.stride[2] / 2, work.value, value_stride_};
      // Pairs must not reach into the next row.
      for (long r = 0; r < keys.size(); r++) {
        E* row = work.key + r * key_depth_;
        row[key_depth_ - 1] = 0;
        memcpy(row, key + r * key_.stride[2], problem_.head_dim * sizeof(T));
      }
      return {work.key, key_depth_, work.value, value_stride_};
#endif
    }
  }

  // One panel against what it sees of one block of keys, from a whole pair of keys on.
  void visit(Workspace& work, Panel& panel, const Band& band, long b, long h, Range keys,
             const KeyBlock<V>& block) const {
    const Range seen = intersect(panel.any, keys);
    if (seen.empty()) return;
    const long skipped = (seen.begin - keys.begin) / depth * depth;
    const Range from_pair{keys.begin + skipped, seen.end};
    const bool whole = panel.all.begin <= from_pair.begin && from_pair.end <= panel.all.end;
    attend(work, panel, {b, h, panel.queries, from_pair}, band, whole,
           {block.key + skipped * block.key_stride, block.key_stride,
            block.value + skipped / depth * block.value_stride, block.value_stride});
  }

  // Adds the keys of a tile to the panel.
  void attend(Workspace& work, Panel& panel, const Tile& tile, const Band& band, bool whole,
              KeyBlock<V> keys) const {
    const long rows = tile.keys.size();
    bool by_bytes = false;
    if (problem_.mask.data) {
      const TileKind kind = classify<width>(problem_, band, tile, work.seen);
      if (kind == TileKind::empty) return;
      whole = kind == TileKind::full;
      by_bytes = !whole;
    }
    if (problem_.bias.data) {
      if (problem_.bias_dtype == problem_.dtype)
        load_bias<V, T>(problem_, tile, work.bias);
      else
        load_bias<V, float>(problem_, tile, work.bias);
      if (bias_forbids<V>(work.bias, rows, panel.columns)) {
        if (!by_bytes) bytes_of_band<width>(band, tile, work.seen);
        take_out_forbidden<width>(work.bias, rows, work.seen);
        by_bytes = true;
        whole = false;
      }
    }
    if (by_bytes) keys = without_dead_values(keys, rows, work);
    if (problem_.dropout_p > 0) draw_dropout<V>(problem_, tile, panel.columns, work.kept);

    Reach reach[columns];
    long depth_end[columns];  // how many (pairs of) keys each vector reaches; never decreases
    for (int j = 0; j < panel.columns; j++) {
      reach[j] = whole      ? Reach{0, 0, rows, rows}
                 : by_bytes ? Reach{0, rows, rows, rows}
                            : band_reach(band, tile, j);
      depth_end[j] = max(ceil_div(reach[j].end, depth), j ? depth_end[j - 1] : 0L);
    }
    const ScoreRules<V> rules{static_cast<S>(problem_.scale * log2_e),
                              work.bias,
                              by_bytes ? work.seen : nullptr,
                              &band,
                              tile.queries,
                              tile.keys};
    const bool plain = whole && !rules.scales_products();
    const auto score_all = [&] {
      score(panel, keys, rows, depth_end, work.products);
      if (plain) return;
      for (int j = 0; j < panel.columns; j++)
        prepare_scores(rules, j, reach[j], min(rows, depth_end[j] * depth), work.products);
    };
    const Weighing weighing{work.products, rules.remaining_factor(), rows, depth_end, work.kept};
    score_all();
    alignas(64) S sum[width];
    if (!panel.ready || !weigh(panel, weighing, sum)) {
      if (panel.ready) score_all();
      renew_reference(panel, weighing);
      weigh(panel, weighing, sum);
    }
    for (int j = 0; j < panel.columns; j++) {
      S* total = panel.sum + j * V::lanes;
      V::store(total, V::add(V::load(total), V::load(sum + j * V::lanes)));
    }
    gemm_columns<V, AccumulateStairs>(
        panel.columns, problem_.value_dim, RowsContiguous<E>{keys.value, keys.value_stride},
        reinterpret_cast<const E*>(work.products), width, depth_end, panel.out, width);
  }

  Reach band_reach(const Band& band, const Tile& tile, int j) const {
    const long first = tile.queries.begin + j * V::lanes;
    const Range queries{first, min<long>(first + V::lanes, tile.queries.end)};
    const Range any = intersect(band.seen_by_any(queries), tile.keys);
    Range all = intersect(band.seen_by_all(queries), tile.keys);
    if (any.empty()) return {0, 0, 0, 0};
    if (all.empty()) all = {any.end, any.end};
    const long k = tile.keys.begin;
    return {any.begin - k, all.begin - k, all.end - k, any.end - k};
  }

  // S^T, each key against the vectors that reach it.
  void score(const Panel& panel, const KeyBlock<V>& keys, long rows, const long* depth_end,
             S* products) const {
    long done = 0;
    for (int j = 0; j < panel.columns && done < rows; j++) {
      const long end = min(rows, depth_end[j] * depth);
      if (end == done) continue;
      gemm_columns<V, Store>(panel.columns - j, end - done,
                             DepthContiguous<E>{keys.key + done * keys.key_stride, keys.key_stride},
                             panel.query + j * V::lanes, width, key_depth_,
                             products + done * width + j * V::lanes, width);
      done = end;
    }
  }

  // A block of prepared products, to be turned into weights.
  struct Weighing {
    S* products;
    S factor;
    long keys;
    const long* depth_end;
    const typename V::mask* kept;
    INLINE S* column(int j) const { return products + j * V::lanes; }
    INLINE long rows(int j) const { return min(keys, depth_end[j] * depth); }
  };

  // P^T and its sums; false, with P^T of no use, if some sum says that the reference is too low.
  bool weigh(const Panel& panel, const Weighing& block, S* sum) const {
    auto high = V::zero();
    for (int j = 0; j < panel.columns; j++) {
      const auto reference = V::load(panel.reference + j * V::lanes);
      // A query that has seen nothing yet keeps -inf; its weights are 0 against any finite reference.
      const auto unset = V::greater(V::set1(Limits<S>::lowest), reference);
      const auto total = exponentiate<V, degree>(block.column(j), block.rows(j), block.factor,
                                                 V::select(unset, V::zero(), reference),
                                                 block.kept ? block.kept + j : nullptr);
      V::store(sum + j * V::lanes, total);
      high = V::select(V::not_less_equal(total, V::set1(overflow_sum)), V::set1(1), high);
    }
    return !V::any(V::greater(high, V::zero()));
  }

  // Raises the reference to the block's maximum, and scales what was summed against the old one.
  void renew_reference(Panel& panel, const Weighing& block) const {
    bool moved = false, ready = true;
    alignas(64) S scale[width];
    for (int j = 0; j < panel.columns; j++) {
      S* reference = panel.reference + j * V::lanes;
      const auto old = V::load(reference);
      const auto now = V::max(old, largest_score<V>(block.column(j), block.factor, block.rows(j)));
      const auto unset = V::greater(V::set1(Limits<S>::lowest), now);
      const auto had = V::greater(V::set1(Limits<S>::lowest), old);
      V::store(reference, now);
      ready = ready && !V::any(unset);
      const auto factor = V::template exp2<5>(V::sub(old, V::select(unset, V::zero(), now)));
      V::store(scale + j * V::lanes, V::select(had, V::zero(), factor));
      moved = moved || V::any(V::greater(now, old));
    }
    panel.ready = ready;
    if (!moved) return;
    for (int j = 0; j < panel.columns; j++) {
      const auto factor = V::load(scale + j * V::lanes);
      S* sum = panel.sum + j * V::lanes;
      if (!V::any(V::greater(V::load(sum), V::zero()))) continue;
      V::store(sum, V::mul(V::load(sum), factor));
      for (long d = 0; d < problem_.value_dim; d++) {
        S* out = panel.out + d * width + j * V::lanes;
        V::store(out, V::mul(V::load(out), factor));
      }
    }
  }

  // 0 * NaN is NaN: values that are not finite, of keys that no query of the tile may attend to, are
  // replaced by 0 in a copy.
  KeyBlock<V> without_dead_values(KeyBlock<V> keys, long rows, Workspace& work) const {
    bool copied = false;
    const long groups = ceil_div(rows, depth);
    for (long r = 0; r < rows; r++) {
      if (!is_dead<width>(work.seen + r * width)) continue;
      const E* row = keys.value + r / depth * keys.value_stride;
      if (all_finite(row, r % depth)) continue;
      if (!copied) {
        for (long i = 0; i < groups; i++)
          memcpy(work.clean_value + i * problem_.value_dim, keys.value + i * keys.value_stride,
                 problem_.value_dim * sizeof(E));
        copied = true;
        keys.value = work.clean_value;
        keys.value_stride = problem_.value_dim;
      }
      E* clean = work.clean_value + r / depth * problem_.value_dim;
      for (long d = 0; d < problem_.value_dim; d++) clear_part(clean[d], r % depth);
    }
    return keys;
  }
  INLINE bool all_finite(const E* row, long part) const {
    bool finite = true;
    for (long d = 0; d < problem_.value_dim; d++) {
      if constexpr (depth == 1) {
        finite &= row[d] - row[d] == 0;
      } else {
        finite &= ((row[d] >> (16 * part)) & 0x7f80) != 0x7f80;
      }
    }
    return finite;
  }
  INLINE static void clear_part(E& element, long part) {
    if constexpr (depth == 1)
      element = 0;
    else
      element &= part ? 0x0000ffffu : 0xffff0000u;
  }

  void finish_panel(const Panel& panel, long b, long h) const {
    alignas(64) S inverse[width];
    alignas(64) S lse[width];
    const auto kept = V::set1(static_cast<S>(1 - problem_.dropout_p));
    for (int j = 0; j < panel.columns; j++) {
      const auto sum = V::load(panel.sum + j * V::lanes), reference = V::load(panel.reference + j * V::lanes);
      // A query without keys: no weight was ever added.
      const auto none = V::greater(V::set1(Limits<S>::lowest), reference);
      const auto log = V::mul(V::add(reference, log2_of<V>(sum)), V::set1(static_cast<S>(ln_2)));
      V::store(inverse + j * V::lanes, V::select(none, V::zero(), V::div(V::set1(1), V::mul(sum, kept))));
      V::store(lse + j * V::lanes, V::select(none, V::set1(-Limits<S>::infinity), log));
    }
    memcpy(static_cast<S*>(output_.lse) + (b * problem_.query_heads + h) * problem_.queries +
               panel.queries.begin,
           lse, panel.queries.size() * sizeof(S));
    unpack_transposed<V>(panel.out, width, inverse, panel.queries.size(), problem_.value_dim,
                         output_.out.as<T>().at(b, h, panel.queries.begin), output_.out.stride[2]);
  }

  const Problem& problem_;
  const ForwardOutput& output_;
  const Tensor4<const T> query_, key_, value_;
  const long key_depth_;
  // Rows of V in scratch memory: an odd number of cache lines apart. The second product walks down a column
  // of V; rows 2^n lines apart would put a column into few sets of the L1 cache.
  const long value_stride_;
  const long block_keys_;
  const int panels_per_item_;
  const long blocks_;
  const bool copy_values_;  // into scratch memory even though they could be read in place
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
