// The forward pass for many queries: softmax(scale Q K^T + bias) V without the score matrix.
//
// Scores are computed transposed: keys are rows, queries lie across the vector lanes. A panel is `width`
// queries (V::tile_vectors vectors); a work item is a few panels of one head, which share each block of keys
// while it is in the cache. Per panel and block of keys:
//
//   S^T [keys, width] = K [keys, D] Q^T [D, width]      K is read in place, Q^T is packed once
//   P^T = exp2(log2(e) (scale S^T + bias) - reference)  in place; sum of P over keys
//   O^T [Dv, width] += V^T [Dv, keys] P^T [keys, width] V is read in place
//
// The online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022) is lazy: `reference` is
// the row maximum of the first block that a query sees, and is renewed only where the sum of a block shows
// that some score lies far above it. Most blocks need no maximum at all.
#pragma once

#include "gemm.h"
#include "machine.h"
#include "mask.h"
#include "pack.h"
#include "parallel.h"
#include "prefetch.h"
#include "scratch.h"
#include "softmax.h"
#include "weigh.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// How a dtype is computed: the micro-kernel's vector type, and the degree of exp2 that its precision needs: 3
// would do for 16-bit weights, but not for the fp32 lse of their sum.
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
  static constexpr int degree = 4;
};
template <>
struct Arithmetic<bf16> {
#ifdef FASTATTN_BF16_DOT
  using V = BF16Pair;
#else
  using V = F32;
#endif
  static constexpr int degree = 4;
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
  static constexpr int depth = V::depth;
  static constexpr int columns = V::tile_vectors, width = V::lanes * columns;
  // P^T of a block takes 32 KiB, from which the second product reads it again and again.
  static constexpr long wide_cache = 48 * 1024, weight_bytes = 32 * 1024;
  static constexpr long most_block_keys =
      min(256L, weight_bytes / (width * static_cast<long>(sizeof(E)) / depth));
  // Beside a smaller level 1 cache it streams from level 2, and longer blocks save loads and stores of O^T.
  // Then keys and values of a block take at most a quarter of level 2.
  static constexpr long long_block_keys = 256, least_block_keys = 64, block_bytes = 256 * 1024;
  static constexpr long item_queries = 256 * depth;
  static constexpr long least_full_keys = 16;
  static constexpr bool in_place = reads_in_place<V, T>;  // K and V need no conversion
  // A sum of weights above this says that the reference is too low: nothing has overflowed yet.
  static constexpr S overflow_sum = static_cast<S>(4294967296.0);
  static constexpr S vanishing_sum = static_cast<S>(0x1p-60);
  static constexpr S smallest = std::numeric_limits<S>::min();

 public:
  Forward(const Problem& problem, const ForwardOutput& output)
      : problem_(problem),
        output_(output),
        query_(problem.query.as<const T>()),
        key_(problem.key.as<const T>()),
        value_(problem.value.as<const T>()),
        wide_cache_(level1_cache_bytes() >= wide_cache),
        key_depth_(ceil_div(problem.head_dim, depth)),
        value_stride_((ceil_div(problem.value_dim * sizeof(E), 64) | 1) * (64 / sizeof(E))),
        block_keys_(choose_block()),
        panels_per_item_(choose_panels()),
        blocks_(ceil_div(problem.queries, panels_per_item_ * width)),
        masks_(problem),
        keeps_rest_(depth == 2 && output.residual.data && problem.bias.data &&
                    problem.bias_dtype != problem.dtype),
        copy_values_(!wide_cache_ && panels_per_item_ * width >= 128 &&
                     problem.value.stride[2] * sizeof(T) % 256 == 0) {}

  void run(int threads) const {
    masks_.scan(threads);
    parallel_for(problem_.batch * problem_.query_heads * blocks_, threads,
                 Workspace(*this, ScratchLayout()).bytes,
                 [this](const Item& item, void* scratch) { run_item(item, scratch); });
  }

 private:
  struct Panel {
    Range queries;
    int columns;     // vectors with a query in them
    Range any, all;  // keys that some, that every query sees, of `any` the mask's part too
    MaskCells cells;
    bool begun, ready;  // some query, every query has a reference
    bool has_out;       // `out` has been written
    E* query;           // [key_depth][width]
    S* out;             // [Dv][width]
    S* reference;       // [width]
    S* sum;            // [depth][width]: of the weights, and of pairs also as the product reads them, rounded
    uint8_t* scanned;  // what `cells` are found in, if not in the call's map
  };

  struct Workspace {
    Workspace(const Forward& f, ScratchLayout layout) {
      const long block_keys = f.block_keys_;
      const Problem& p = f.problem_;
      for (int i = 0; i < f.panels_per_item_; i++) {
        panel[i].query = layout.take<E>(f.key_depth_ * width);
        panel[i].out = layout.take<S>(p.value_dim * width);
        panel[i].reference = layout.take<S>(width);
        panel[i].sum = layout.take<S>(depth * width);
        if (p.mask.data) panel[i].scanned = layout.take<uint8_t>(f.masks_.scratch(p.keys));
      }
      products = layout.take<S>((block_keys + depth) * width);
      if (f.keeps_rest_) rest = layout.take<E>((block_keys / depth + 1) * width);
      if (p.bias.data) bias = layout.take<S>(block_keys * width);
      if (p.mask.data || p.bias.data) seen = layout.take<uint8_t>(block_keys * width + 64);
      if (p.dropout_p > 0) kept = layout.take<typename V::mask>(block_keys * columns);
      if (!in_place) key = layout.take<E>(block_keys * f.key_depth_);
      value = layout.take<E>(ceil_div(block_keys, depth) * f.value_stride_);
      if (p.mask.data || p.bias.data || depth == 2)
        clean_value = layout.take<E>((block_keys / depth + 1) * p.value_dim);
      bytes = layout.used();
    }
    Panel panel[item_queries / width];
    S* products;
    E* rest = nullptr;  // of the weights, what rounding them for the product took
    S* bias = nullptr;
    uint8_t* seen = nullptr;
    typename V::mask* kept = nullptr;
    E *key = nullptr, *value = nullptr, *clean_value = nullptr;
    Ahead ahead;
    size_t bytes;
  };

  long choose_block() const {
    const long row = max(1L, problem_.head_dim + problem_.value_dim) * static_cast<long>(sizeof(S));
    const long most = wide_cache_ ? most_block_keys : long_block_keys;
    return max(least_block_keys, min(most, block_bytes / row / 2 * 2));
  }

  // From the shape alone, so that results do not depend on the threads: as many panels as share a block of
  // keys, unless that leaves too few items to go round.
  int choose_panels() const {
    long panels = item_queries / width;
    const long heads = problem_.batch * problem_.query_heads;
    while (panels * width > 64 && heads * ceil_div(problem_.queries, panels * width) < 32) panels /= 2;
    return static_cast<int>(min(panels, max(1L, ceil_div(problem_.queries, width))));
  }

  void run_item(const Item& item, void* scratch) const {
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
      const long tiles = swept_tiles(work, panels, keys, steps);
      work.ahead.item = after_item(item.next, b, h, first);
      work.ahead.item.share_among(tiles ? tiles : panels * steps);
      for (long begin = keys.begin; begin < keys.end; begin += step) {
        if (begin > keys.begin && item.is_interrupted()) return;
        const Range range = seen_by_some(work, panels, {begin, min(begin + step, keys.end)});
        if (range.empty()) continue;
        const KeyBlock<V> key_block = prepare_keys(b, h / problem_.group(), range, work);
        work.ahead.block = values_of(b, h, {range.end, min(range.end + step, keys.end)});
        work.ahead.block.share_among(tiles ? swept_tiles(work, panels, range, 1) : panels);
        for (int i = 0; i < panels; i++) {
          if (tiles == 0) work.ahead.fetch_some();
          visit(work, work.panel[i], band, b, h, range, key_block);
        }
      }
    }
    for (int i = 0; i < panels; i++) finish_panel(work.panel[i], b, h);
  }

  // The keys of these that some query of the panel sees, without gaps.
  Range seen_by(const Panel& panel, Range keys) const {
    const Range seen = intersect(panel.any, keys);
    return problem_.mask.data ? panel.cells.trimmed(seen) : seen;
  }
  // The keys of a block without those at both ends that the mask hides from all panels, in whole pairs.
  Range seen_by_some(const Workspace& work, int panels, Range keys) const {
    if (!problem_.mask.data) return keys;
    Range some{keys.end, keys.begin};
    for (int i = 0; i < panels; i++) {
      const Range seen = seen_by(work.panel[i], keys);
      if (!seen.empty()) some = {min(some.begin, seen.begin), max(some.end, seen.end)};
    }
    some.begin -= (some.begin - keys.begin) % depth;
    return some;
  }

  // Tiles of scores beside whose products there are weights to compute: in each block all but the first.
  long swept_tiles(const Workspace& work, int panels, Range keys, long blocks) const {
    long tiles = 0;
    if (V::rows_beside_products > 0 && problem_.dropout_p == 0)
      for (int i = 0; i < panels; i++)
        tiles += max(0L, intersect(work.panel[i].all, keys).size() / V::tile_rows - blocks);
    return tiles;
  }

  template <class U>
  static void add_rows(Upcoming& to, const Tensor4<U>& tensor, long b, long h, Range rows, long columns,
                       bool written = false) {
    if (!rows.empty())
      to.add(tensor.at(b, h, rows.begin), tensor.stride[2] * static_cast<long>(sizeof(T)), rows.size(),
             columns * static_cast<long>(sizeof(T)), written);
  }

  // Keys are fetched by the sweep itself.
  Upcoming values_of(long b, long h, Range keys) const {
    Upcoming result;
    add_rows(result, value_, b, h / problem_.group(), keys, problem_.value_dim);
    return result;
  }

  // What this item writes at its end, and what the next one begins with.
  Upcoming after_item(long next, long b, long h, long first) const {
    Upcoming result;
    const long rows = panels_per_item_ * width;
    const auto queries = [&](long begin) { return Range{begin, min(begin + rows, problem_.queries)}; };
    add_rows(result, output_.out.template as<T>(), b, h, queries(first), problem_.value_dim, true);
    if (output_.residual.data)
      add_rows(result, output_.residual.template as<T>(), b, h, queries(first), problem_.value_dim, true);
    const long head_index = next / blocks_;
    if (head_index < problem_.batch * problem_.query_heads) {
      const long nb = head_index / problem_.query_heads, nh = head_index % problem_.query_heads;
      const Range keys{0, min(block_keys_, problem_.key_length(nb))};
      add_rows(result, query_, nb, nh, queries((blocks_ - 1 - next % blocks_) * rows), problem_.head_dim);
      if (nb != b || nh / problem_.group() != h / problem_.group()) {
        add_rows(result, key_, nb, nh / problem_.group(), keys, problem_.head_dim);
        add_rows(result, value_, nb, nh / problem_.group(), keys, problem_.value_dim);
      }
    }
    return result;
  }

  void start_panel(Panel& panel, const Band& band, long b, long h, long first) const {
    panel.queries = {first, min(first + width, problem_.queries)};
    panel.columns = static_cast<int>(ceil_div(panel.queries.size(), V::lanes));
    panel.any = band.seen_by_any(panel.queries);
    panel.all = band.seen_by_all(panel.queries);
    panel.begun = panel.ready = panel.has_out = false;
    if (problem_.mask.data) {
      panel.cells = masks_.cells({b, h, panel.queries, panel.any}, panel.scanned);
      panel.any = panel.cells.trimmed(panel.any);
    }
    memset(panel.sum, 0, depth * width * sizeof(S));
    if (panel.any.empty()) {
      memset(panel.reference, 0, width * sizeof(S));
      return;
    }
    const T* query = query_.at(b, h, first);
    if constexpr (depth == 1)
      pack_transposed<V>(query, query_.stride[2], panel.queries.size(), problem_.head_dim, S(1), panel.query);
#ifdef FASTATTN_BF16_DOT
    else
      pack_pairs_transposed(query, query_.stride[2], panel.queries.size(), problem_.head_dim, panel.query);
#endif
    for (int j = 0; j < columns; j++) {
      // Lanes past the last query have a reference from the start: nothing waits for them.
      const auto real = V::first_lanes(panel.queries.size() - j * V::lanes);
      V::store(panel.reference + j * V::lanes, V::select(real, V::set1(-Limits<S>::infinity), V::zero()));
    }
  }

  KeyBlock<V> prepare_keys(long b, long kv_head, Range keys, Workspace& work) const {
    const T *key = key_.at(b, kv_head, keys.begin), *value = value_.at(b, kv_head, keys.begin);
    const auto read = rows_as_read<V>(key, key_.stride[2], keys.size(), problem_.head_dim, work.key);
    if constexpr (in_place)
      if (!copy_values_) return {read.data, read.stride, value, value_.stride[2]};
#ifdef FASTATTN_BF16_DOT
    if constexpr (depth == 2)
      interleave_row_pairs(value, value_.stride[2], keys.size(), problem_.value_dim, work.value,
                           value_stride_);
    else
#endif
      copy_widened<V>(value, value_.stride[2], keys.size(), problem_.value_dim, work.value, value_stride_);
    return {read.data, read.stride, work.value, value_stride_};
  }

  // One panel against what it sees of one block of keys, from a whole pair of keys on.
  void visit(Workspace& work, Panel& panel, const Band& band, long b, long h, Range keys,
             const KeyBlock<V>& block) const {
    const Range seen = seen_by(panel, keys);
    if (seen.empty()) return;
    const auto attend_to = [&](Range part) {
      if (part.empty()) return;
      const long skipped = part.begin - keys.begin;
      const bool whole = panel.all.begin <= part.begin && part.end <= panel.all.end;
      attend(work, panel, {b, h, panel.queries, part}, band, whole,
             {block.key + skipped * block.key_stride, block.key_stride,
              block.value + skipped / depth * block.value_stride, block.value_stride});
    };
    const auto pairs_before = [&](long key) { return keys.begin + (key - keys.begin) / depth * depth; };
    const long begin = pairs_before(seen.begin);
    Range full = intersect(seen, panel.all);
    full.begin = pairs_before(full.begin + depth - 1);
    if (problem_.mask.data || problem_.bias.data ||
        full.size() < (begin < full.begin ? least_full_keys : 1)) {
      attend_to({begin, seen.end});
    } else {
      // From a key that all queries see on, weights are computed beside the products.
      attend_to({begin, full.begin});
      attend_to({full.begin, seen.end});
    }
  }

  // Adds the keys of a tile to the panel.
  void attend(Workspace& work, Panel& panel, const Tile& tile, const Band& band, bool whole,
              KeyBlock<V> keys) const {
    const long rows = tile.keys.size();
    bool by_bytes = false;
    if (problem_.mask.data) {
      const TileKind kind = classify<width>(problem_, band, panel.cells, tile, work.seen);
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
    if (by_bytes || rows % depth) keys = without_dead_values(keys, rows, by_bytes, work);
    if (problem_.dropout_p > 0) draw_dropout<V>(problem_, tile, panel.columns, work.kept);

    Reach reach[columns];
    long depth_end[columns];  // how many (pairs of) keys each vector reaches; never decreases
    for (int j = 0; j < panel.columns; j++) {
      reach[j] = whole      ? Reach{0, 0, rows, rows}
                 : by_bytes ? Reach{0, rows, rows, rows}
                            : band_reach(band, tile, j);
      depth_end[j] = max(ceil_div(reach[j].end, depth), j ? depth_end[j - 1] : 0L);
    }
    const ScoreRules<V> rules{ScoreUnits<S>(problem_.scale, work.bias),
                              work.bias,
                              by_bytes ? work.seen : nullptr,
                              &band,
                              tile.queries,
                              tile.keys};
    const bool plain = whole && rules.leaves_products();
    const auto score_all = [&] {
      score(panel, keys, rows, depth_end, work.products);
      if (plain) return;
      for (int j = 0; j < panel.columns; j++)
        prepare_scores(rules, j, reach[j], min(rows, depth_end[j] * depth), work.products);
    };
    const Weighing weighing{work.products, rules.units.factor, rows, depth_end, work.kept, work.rest};
    alignas(64) S sum[depth * width];
    // A band's edge on the right alone: the first query sees the first keys, each next one a key more.
    const bool stairs = !whole && !by_bytes && !rules.bias && panel.all.begin <= tile.keys.begin &&
                        tile.keys.begin < panel.all.end;
    const bool sweeps = (whole || by_bytes || stairs) && (rules.bias || rules.leaves_products()) &&
                        problem_.dropout_p == 0 && !keeps_rest_;
    if (!sweeps || !sweep(work, panel, keys, rows, rules, stairs ? reach : nullptr, sum)) {
      if (problem_.mask.data || rules.bias || stairs) forget_unseen(panel);
      score_all();
      if (!panel.ready || !weigh(panel, weighing, sum)) {
        if (panel.ready) score_all();
        renew_reference(panel, weighing);
        weigh(panel, weighing, sum);
      }
    }
    for (int i = 0; i < depth; i++)
      for (int j = 0; j < panel.columns; j++) {
        S* total = panel.sum + i * width + j * V::lanes;
        V::store(total, V::add(V::load(total), V::load(sum + i * width + j * V::lanes)));
      }
    const auto sum_values = [&](const E* weights, auto finish) {
      gemm_columns<V, decltype(finish)>(panel.columns, problem_.value_dim,
                                        RowsContiguous<E>{keys.value, keys.value_stride}, weights, width,
                                        depth_end, panel.out, width);
    };
    const E* const weights = reinterpret_cast<const E*>(work.products);
    if (panel.has_out)
      sum_values(weights, AccumulateStairs());
    else
      sum_values(weights, StoreStairs());
    if (keeps_rest_) sum_values(work.rest, AccumulateStairs());
    panel.has_out = true;
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

  // Calls run(std::integral_constant<int, degree>()), of the exponentials. Beside 16-bit inputs the gradient
  // of a float32 bias is the more precise one, and starts from the lse.
  template <class F>
  INLINE auto with_degree(F run) const {
    if constexpr (sizeof(T) == 2)
      if (problem_.bias.data && problem_.bias_dtype != problem_.dtype)
        return run(std::integral_constant<int, Arithmetic<float>::degree>());
    return run(std::integral_constant<int, Arithmetic<T>::degree>());
  }

  // P^T and its sums in one sweep; false, with P^T of no use, if that needs more care: too few keys, or
  // scores far from the reference or not finite.
  bool sweep(Workspace& work, Panel& panel, const KeyBlock<V>& keys, long rows, const ScoreRules<V>& rules,
             const Reach* stairs, S* sum) const {
    if constexpr (V::rows_beside_products > 0) {
      if (panel.columns < columns || (panel.begun && !panel.ready)) return false;
      if (panel.ready) {
        alignas(64) S whole[width];
        for (int j = 0; j < width; j += V::lanes)
          V::store(whole + j, nearest_integer<V>(V::load(panel.reference + j)));
        move_reference(panel, whole);
      }
      const auto run = [&](auto degree, auto has_extras) {
        WeightSweep<V, decltype(degree)::value, decltype(has_extras)::value> sweep(
            reinterpret_cast<E*>(work.products), rules.units.factor, sum,
            {rules.bias, rules.seen, rules.units.multiplier}, work.ahead);
        const DepthContiguous<E> key{keys.key, keys.key_stride};
        if constexpr (!decltype(has_extras)::value)
          if (stairs) {
            typename Sweep<V>::Stairs steps{stairs[0].full_end, {}};
            for (int j = 0; j < columns; j++) steps.end[j] = stairs[j].end;
            return sweep.run(steps, key, panel.query, key_depth_, panel.reference, panel.ready);
          }
        return sweep.run(rows, key, panel.query, key_depth_, panel.reference, panel.ready);
      };
      const bool extras = rules.bias || rules.seen;
      const bool done = extras ? with_degree([&](auto degree) { return run(degree, std::true_type()); })
                               : run(std::integral_constant<int, Arithmetic<T>::degree>(), std::false_type());
      if (!done) return false;
      panel.begun = panel.ready = true;
      // A reference that was taken from keys out of sight, of this block or one before, can also be too high.
      const bool chosen_blindly = extras || stairs || problem_.mask.data;
      return !sums_overflow(sum, columns) && !(chosen_blindly && sums_vanish(panel, sum));
    }
    return false;
  }
  // Not for a query with weights of a fair size from blocks before.
  bool sums_vanish(const Panel& panel, const S* sum) const {
    bool low = false;
    for (int j = 0; j < width; j += V::lanes) {
      const auto s = V::load(sum + j), total = V::add(V::load(panel.sum + j), s);
      low = low || V::any(V::both(V::greater(s, V::zero()), V::greater(V::set1(vanishing_sum), total)));
    }
    return low;
  }
  // Queries that have no weight yet take their reference anew.
  void forget_unseen(Panel& panel) const {
    for (int j = 0; j < panel.columns; j++) {
      const auto real = V::first_lanes(panel.queries.size() - j * V::lanes);
      const auto unseen = V::both(real, V::greater(V::set1(smallest), V::load(panel.sum + j * V::lanes)));
      S* reference = panel.reference + j * V::lanes;
      V::store(reference, V::select(unseen, V::set1(-Limits<S>::infinity), V::load(reference)));
      panel.ready = panel.ready && !V::any(unseen);
    }
  }
  bool sums_overflow(const S* sum, int count) const {
    bool high = false;
    for (int j = 0; j < count; j++)
      high = high || V::any(V::not_less_equal(V::load(sum + j * V::lanes), V::set1(overflow_sum)));
    return high;
  }

  // A block of prepared products, to be turned into weights.
  struct Weighing {
    S* products;
    S factor;
    long keys;
    const long* depth_end;
    const typename V::mask* kept;
    E* rest;
    INLINE S* column(int j) const { return products + j * V::lanes; }
    INLINE long rows(int j) const { return min(keys, depth_end[j] * depth); }
  };

  // P^T and its sums; false, with P^T of no use, if some sum says that the reference is too low.
  bool weigh(const Panel& panel, const Weighing& block, S* sum) const {
    for (int j = 0; j < panel.columns; j++) {
      const auto reference = V::load(panel.reference + j * V::lanes);
      // A query that has seen nothing yet keeps -inf; its weights are 0 against any finite reference.
      const auto unset = V::greater(V::set1(Limits<S>::lowest), reference);
      vector total[depth] = {};
      with_degree([&](auto degree) {
        exponentiate<V, decltype(degree)::value>(
            block.column(j), block.rows(j), block.factor, V::select(unset, V::zero(), reference),
            block.kept ? block.kept + j : nullptr, total, block.rest ? block.rest + j * V::lanes : nullptr);
      });
      for (int i = 0; i < depth; i++) V::store(sum + i * width + j * V::lanes, total[i]);
    }
    return !sums_overflow(sum, panel.columns);
  }

  // Raises the references to the block's maxima.
  void renew_reference(Panel& panel, const Weighing& block) const {
    bool ready = true;
    alignas(64) S renewed[width];
    for (int j = 0; j < panel.columns; j++) {
      const auto now = V::max(V::load(panel.reference + j * V::lanes),
                              largest_score<V>(block.column(j), block.factor, block.rows(j)));
      V::store(renewed + j * V::lanes, now);
      ready = ready && !V::any(V::greater(V::set1(Limits<S>::lowest), now));
    }
    move_reference(panel, renewed);
    panel.begun = true;
    panel.ready = ready;
  }

  // Takes what was summed so far to other references.
  void move_reference(Panel& panel, const S* to) const {
    for (int j = 0; j < panel.columns; j++) {
      S* reference = panel.reference + j * V::lanes;
      const auto old = V::load(reference), now = V::load(to + j * V::lanes);
      V::store(reference, now);
      if (!V::any(V::greater(now, old)) && !V::any(V::greater(old, now))) continue;
      const auto unset = V::greater(V::set1(Limits<S>::lowest), now);
      const auto had = V::greater(V::set1(Limits<S>::lowest), old);
      const auto factor =
          V::select(had, V::zero(), V::template exp2<5>(V::sub(old, V::select(unset, V::zero(), now))));
      S* sum = panel.sum + j * V::lanes;
      if (!V::any(V::greater(V::load(sum), V::zero()))) continue;
      for (int i = 0; i < depth; i++) V::store(sum + i * width, V::mul(V::load(sum + i * width), factor));
      for (long d = 0; d < problem_.value_dim; d++) {
        S* out = panel.out + d * width + j * V::lanes;
        V::store(out, V::mul(V::load(out), factor));
      }
    }
  }

  // 0 * NaN is NaN: values that are not finite, of keys that no query of the tile may attend to, are
  // replaced by 0 in a copy. The second key of a last pair may lie past the tile.
  KeyBlock<V> without_dead_values(KeyBlock<V> keys, long rows, bool by_bytes, Workspace& work) const {
    bool copied = false;
    const long groups = ceil_div(rows, depth);
    for (long r = by_bytes ? 0 : rows; r < groups * depth; r++) {
      if (r < rows && !is_dead<width>(work.seen + r * width)) continue;
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
    if (!panel.has_out) memset(panel.out, 0, problem_.value_dim * width * sizeof(S));
    alignas(64) S inverse[width];
    alignas(64) S lse[width];
    const auto kept = V::set1(static_cast<S>(1 - problem_.dropout_p));
    for (int j = 0; j < panel.columns; j++) {
      const auto sum = V::load(panel.sum + j * V::lanes), reference = V::load(panel.reference + j * V::lanes);
      // A query without keys: no weight was ever added.
      const auto none = V::greater(V::set1(smallest), sum);
      // Weights that sum to one as they were multiplied: rounding them all alike changes nothing.
      const auto multiplied = V::load(panel.sum + (depth - 1) * width + j * V::lanes);
      const auto log = V::mul(V::add(reference, log2_of<V>(sum)), V::set1(static_cast<S>(ln_2)));
      V::store(inverse + j * V::lanes,
               V::select(none, V::zero(), V::div(V::set1(1), V::mul(multiplied, kept))));
      // A bias too large for log2 units gives the lowest lse. NaN stays, also where no score was a number and
      // there is no reference.
      const auto known = V::select(V::not_less_equal(reference, V::set1(lowest_reference<S>)), log,
                                   V::add(V::set1(Limits<S>::lowest), V::sub(sum, sum)));
      V::store(lse + j * V::lanes, V::select(none, V::set1(-Limits<S>::infinity), known));
    }
    memcpy(static_cast<S*>(output_.lse) + (b * problem_.query_heads + h) * problem_.queries +
               panel.queries.begin,
           lse, panel.queries.size() * sizeof(S));
    const Tensor4<T> out = output_.out.as<T>(), residual = output_.residual.as<T>();
    const long first = panel.queries.begin;
    unpack_transposed<V>(panel.out, inverse, panel.queries.size(), problem_.value_dim, out.at(b, h, first),
                         out.stride[2], residual.data ? residual.at(b, h, first) : nullptr,
                         residual.stride[2]);
  }

  const Problem& problem_;
  const ForwardOutput& output_;
  const Tensor4<const T> query_, key_, value_;
  const bool wide_cache_;
  const long key_depth_;
  // Rows of V in scratch memory: an odd number of cache lines apart. The second product walks down a column
  // of V; rows 2^n lines apart would put a column into few sets of the L1 cache.
  const long value_stride_;
  const long block_keys_;
  const int panels_per_item_;
  const long blocks_;
  const MaskMap<width> masks_;
  // The gradient of a float32 bias starts from out, which weights rounded to 16 bits would be too coarse for.
  const bool keeps_rest_;
  const bool copy_values_;  // into scratch memory even though they could be read in place
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
