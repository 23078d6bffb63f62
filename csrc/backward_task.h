// One item of the backward: the gradients that chunks of keys of one key head take part in.
//
// For each stretch of queries all keys pass by, for each block of keys the stretch's blocks of queries. With
// scores transposed (rows are keys, lanes are queries), five products per tile of block_keys x block_queries,
// all by the one micro-kernel, none of which needs a transpose:
//
//   S^T  = K Q^T        rows of K         x panels of Q^T      then P = exp2(S - lse)
//   dP^T = V dO^T       rows of V         x panels of dO^T     then dS = P (dP - delta)
//   dV  += P^T dO       rows of P^T       x rows of dO
//   dK  += dS^T Q       rows of dS^T      x rows of Q
//   dQ  += dS K         columns of dS^T   x rows of K
//
// (Dao et al., FlashAttention, NeurIPS 2022, gives the recomputation; delta = rowsum(dO O) - dlse.)
#pragma once

#include "backward_apart.h"
#include "backward_products.h"
#include "backward_shift.h"
#include "backward_workspace.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class V, class T>
class BackwardTask {
  using S = typename V::scalar;
  using E = typename V::element;
  using Plan = BackwardPlan<V>;
  static constexpr long depth = V::depth, width = panel_width<V>;
  static constexpr bool pairs = depth == 2;
  static constexpr bool in_place = sizeof(T) == sizeof(E) && !pairs;
  static constexpr long block_keys = Plan::block_keys, block_queries = Plan::block_queries;
  static constexpr long stretch_queries = Plan::stretch_queries;
  static constexpr long panels = block_queries / width;

 public:
  BackwardTask(const Plan& plan, const MaskMap<width>& masks, const LargeShifts<V, T>& shifts, S* partial,
               void* scratch)
      : plan_(plan),
        problem_(plan.problem),
        args_(plan.args),
        masks_(masks),
        shifts_(shifts),
        partial_(partial),
        work_(plan, masks, scratch) {}

  // `share` is the one of the call's items that this is: it may be interrupted between stretches.
  void run(long item, const Item& share) {
    share_ = &share;
    chunks_ = plan_.chunks_of(item);
    const long heads = item / plan_.items_per_head();
    const long batch = heads / plan_.head_items * plan_.batches_per_item;
    const long head = heads % plan_.head_items * plan_.heads_per_item;
    for (batch_ = batch; batch_ < min(problem_.batch, batch + plan_.batches_per_item); batch_++)
      for (kv_head_ = head; kv_head_ < min(problem_.kv_heads, head + plan_.heads_per_item); kv_head_++)
        key_head();
  }

 private:
  template <class U>
  static U* element(const Tensor4<uint8_t>& t, long b, long h, long row) {
    return t.template as<U>().at(b, h, row);
  }
  template <class U>
  static const U* element(const Tensor4<const uint8_t>& t, long b, long h, long row) {
    return t.template as<const U>().at(b, h, row);
  }

  void key_head() {
    const Band band(problem_, batch_);
    const Range all = plan_.keys_of(chunks_);
    keys_ = {all.begin, max(all.begin, min(all.end, static_cast<long>(problem_.key_length(batch_))))};
    prepare_keys();
    const S key_factor = static_cast<S>(plan_.scale_after),
            value_factor = static_cast<S>(1 / (1 - problem_.dropout_p));
    grad_key_ = cleared_sums(args_.grad_key, kv_head_, keys_, plan_.dim_padded, problem_.head_dim, key_factor,
                             work_.grad_key);
    grad_value_ = cleared_sums(args_.grad_value, kv_head_, keys_, plan_.value_dim_padded, problem_.value_dim,
                               value_factor, work_.grad_value);

    const long group = problem_.group();
    for (head_ = kv_head_ * group; head_ < (kv_head_ + 1) * group; head_++) query_head(band);

    write_sums(args_.grad_key, kv_head_, all, keys_, plan_.dim_padded, problem_.head_dim, key_factor,
               grad_key_);
    write_sums(args_.grad_value, kv_head_, all, keys_, plan_.value_dim_padded, problem_.value_dim,
               value_factor, grad_value_);
  }

  // Zeros to sum rows of a gradient in: the gradient itself where it is laid out like the scratch and the
  // sums need no factor.
  S* cleared_sums(const Tensor4<uint8_t>& out, long head, Range rows, long padded, long columns, S factor,
                  S* scratch) {
    if (!out.data) return nullptr;
    S* sums = scratch;
    if constexpr (in_place) {
      T* target = element<T>(out, batch_, head, rows.begin);
      if (factor == 1 && columns == padded && out.stride[2] == padded && is_aligned(target, 0)) sums = target;
    }
    memset(sums, 0, sizeof(S) * rows.size() * padded);
    return sums;
  }

  // Writes the summed rows, and zero in the others of `all`.
  void write_sums(const Tensor4<uint8_t>& out, long head, Range all, Range rows, long padded, long columns,
                  S factor, const S* sums) {
    if (!out.data) return;
    T* target = element<T>(out, batch_, head, rows.begin);
    const long stride = out.stride[2];
    if (static_cast<const void*>(sums) != target)
      write_rows<V>(sums, padded, rows.size(), columns, factor, target, stride);
    zero_rows(element<T>(out, batch_, head, all.begin), stride, rows.begin - all.begin, columns);
    zero_rows(element<T>(out, batch_, head, rows.end), stride, all.end - rows.end, columns);
  }

  // Whether rows begin on whole vectors: one across two cache lines is read twice.
  static bool is_aligned(const T* rows, long stride) {
    return (reinterpret_cast<uintptr_t>(rows) | stride * sizeof(T)) % (V::lanes * sizeof(T)) == 0;
  }

  void prepare_keys() {
    const T* key = element<T>(problem_.key, batch_, kv_head_, keys_.begin);
    const T* value = element<T>(problem_.value, batch_, kv_head_, keys_.begin);
    const long key_stride = problem_.key.stride[2], value_stride = problem_.value.stride[2];
    const long dim = problem_.head_dim, value_dim = problem_.value_dim, rows = keys_.size();
    if constexpr (pairs) {
#ifdef FASTATTN_BF16_DOT
      interleave_row_pairs(key, key_stride, rows, dim, work_.key_rows, plan_.dim_padded);
      key_columns_ = pairs_of(key, key_stride, rows, dim, work_.key_columns);
      value_columns_ = pairs_of(value, value_stride, rows, value_dim, work_.value_columns);
      key_rows_ = {work_.key_rows, plan_.dim_padded};
#endif
    } else {
      key_rows_ = rows_of(key, key_stride, rows, dim, work_.key_rows, plan_.dim_padded);
      key_columns_ = key_rows_;
      if constexpr (in_place) {
        value_columns_ = {value, value_stride};
      } else {
        copy_widened<V>(value, value_stride, rows, value_dim, work_.value_columns, plan_.value_dim_padded);
        value_columns_ = {work_.value_columns, plan_.value_dim_padded};
      }
    }
    guards_keys_ = is_restricted() && !all_finite<F>(key, key_stride, rows, dim);
  }

  // Whether some query may not attend to some key of the item.
  bool is_restricted() const {
    return problem_.mask.data || problem_.bias.data || problem_.causal != Causal::none ||
           problem_.window_left >= 0 || problem_.window_right >= 0;
  }

#ifdef FASTATTN_BF16_DOT
  // Rows of whole pairs.
  static Rows<E> pairs_of(const T* source, long stride, long rows, long columns, E* copy) {
    const long row_pairs = ceil_div(columns, 2);
    if (columns % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(source) % sizeof(E) == 0)
      return {reinterpret_cast<const E*>(source), stride / 2};
    pair_columns(source, stride, rows, columns, copy, row_pairs);
    return {copy, row_pairs};
  }
#endif

  // Scalar rows of whole vectors.
  Rows<E> rows_of(const T* source, long stride, long rows, long columns, E* copy, long padded) {
    if constexpr (in_place) {
      const bool aligned =
          (reinterpret_cast<uintptr_t>(source) | stride * sizeof(T)) % (V::lanes * sizeof(T)) == 0;
      if (columns == padded && aligned) return {source, stride};
    }
    copy_widened<V>(source, stride, rows, columns, copy, padded);
    return {copy, padded};
  }

  void query_head(const Band& band) {
    const Range span = query_span(band, keys_, problem_.queries, block_queries);
    for (long q = span.begin; q < span.end && !share_->is_interrupted(); q += stretch_queries) {
      const Range queries{q, min(span.end, q + stretch_queries)};
      if (queries.end < span.end)
        fetch_later(band, queries, head_, {queries.end, min(span.end, queries.end + stretch_queries)});
      else
        fetch_later(band, queries, head_ + 1, {span.begin, min(span.end, span.begin + stretch_queries)});
      stretch(band, queries);
    }
    if (plan_.items_per_head() > 1 || !args_.grad_query.data) return;
    const long stride = args_.grad_query.stride[2];
    zero_rows(element<T>(args_.grad_query, batch_, head_, 0), stride, span.begin, problem_.head_dim);
    zero_rows(element<T>(args_.grad_query, batch_, head_, span.end), stride, problem_.queries - span.end,
              problem_.head_dim);
  }

  // Beside the products of `queries`, the rows of the stretch after them.
  void fetch_later(const Band& band, Range queries, long head, Range next) {
    next_ = Upcoming();
    if (head == problem_.query_heads) return;
    const auto add = [&](const auto& tensor, long columns) {
      next_.add(element<T>(tensor, batch_, head, next.begin), tensor.stride[2] * static_cast<long>(sizeof(T)),
                next.size(), columns * static_cast<long>(sizeof(T)), false);
    };
    add(problem_.query, problem_.head_dim);
    add(args_.grad_out, problem_.value_dim);
    add(args_.out, problem_.value_dim);
    if (args_.residual.data) add(args_.residual, problem_.value_dim);
    const long keys = intersect(keys_, band.row((queries.begin + queries.end) / 2)).size();
    next_.share_among(keys / V::tile_rows * ceil_div(queries.size(), width));
  }

  // dO . O of a query's rows, with O as it was before it was narrowed, if that is known.
  S out_product(long query, const T* out, const T* grad_out) const {
    if constexpr (sizeof(T) == 2)
      if (args_.residual.data) {
        const T* residual = element<T>(args_.residual, batch_, head_, query);
        return dot_unrounded<F>(out, residual, grad_out, problem_.value_dim);
      }
    return dot<F>(out, grad_out, problem_.value_dim);
  }

  void stretch(const Band& band, Range queries) {
    const long dim = plan_.dim_padded;
    const S factor = static_cast<S>(plan_.scale_after);
    const bool is_partial = plan_.items_per_head() > 1;
    if (!is_partial) {
      grad_query_ =
          cleared_sums(args_.grad_query, head_, queries, dim, problem_.head_dim, factor, work_.grad_query);
    } else if (args_.grad_query.data) {
      const long part = (chunks_.begin * problem_.batch + batch_) * problem_.query_heads + head_;
      grad_query_ = partial_ + part * plan_.head_query_size() + queries.begin * dim;
      memset(grad_query_, 0, sizeof(S) * queries.size() * dim);
    }
    prepare_queries(queries);

    S* const sums = grad_query_;  // the first chunk's, then with those of the others added
    const long size = queries.size() * dim;
    for (long c = chunks_.begin; c < chunks_.end; c++) {
      const Range keys = intersect(keys_, plan_.chunk(c));
      if (intersect(query_span(band, keys, problem_.queries, block_queries), queries).empty()) continue;
      const bool is_added = sums && c > chunks_.begin;
      if (is_added) {
        grad_query_ = work_.chunk_grad_query;
        memset(grad_query_, 0, sizeof(S) * size);
      }
      tiles(band, keys, queries);
      if (is_added) add_to<V>(sums, grad_query_, size);
    }
    grad_query_ = sums;

    if (!is_partial)
      write_sums(args_.grad_query, head_, queries, queries, dim, problem_.head_dim, factor, grad_query_);
  }

  void tiles(const Band& band, Range all, Range queries) {
    for (long k = all.begin; k < all.end; k += block_keys) {
      const Range keys{k, min(all.end, k + block_keys)};
      const Range met = intersect(band.queries_of(keys), queries);
      for (long q = met.begin / block_queries * block_queries; q < met.end; q += block_queries)
        tile(band, keys, {q, min(problem_.queries, q + block_queries)});
    }
  }

  void prepare_queries(Range queries) {
    const T* query = element<T>(problem_.query, batch_, head_, 0);
    const T* out = element<T>(args_.out, batch_, head_, 0);
    const T* grad_out = element<T>(args_.grad_out, batch_, head_, 0);
    const long query_stride = problem_.query.stride[2], out_stride = args_.out.stride[2],
               grad_out_stride = args_.grad_out.stride[2];
    const long dim = problem_.head_dim, value_dim = problem_.value_dim;
    const long first = queries.begin, rows = queries.size();
    const S scale_in_scores = static_cast<S>(plan_.scale_in_scores);
    for (long q = first; q < queries.end; q += width) {
      const long count = min(width, queries.end - q);
      pack_panel<V>(query + q * query_stride, query_stride, count, dim, S(1),
                    work_.query_panels + (q - first) * ceil_div(dim, depth));
      pack_panel<V>(grad_out + q * grad_out_stride, grad_out_stride, count, value_dim, scale_in_scores,
                    work_.grad_out_panels + (q - first) * ceil_div(value_dim, depth));
    }
    const T* query_first = query + first * query_stride;
    const T* grad_out_first = grad_out + first * grad_out_stride;
    if constexpr (pairs) {
#ifdef FASTATTN_BF16_DOT
      interleave_row_pairs(query_first, query_stride, rows, dim, work_.query_rows, plan_.dim_padded);
      interleave_row_pairs(grad_out_first, grad_out_stride, rows, value_dim, work_.grad_out_rows,
                           plan_.value_dim_padded);
      query_rows_ = {work_.query_rows, plan_.dim_padded};
      grad_out_rows_ = {work_.grad_out_rows, plan_.value_dim_padded};
#endif
    } else {
      query_rows_ = rows_of(query_first, query_stride, rows, dim, work_.query_rows, plan_.dim_padded);
      grad_out_rows_ = rows_of(grad_out_first, grad_out_stride, rows, value_dim, work_.grad_out_rows,
                               plan_.value_dim_padded);
    }
    first_query_ = first;

    const long offset = (batch_ * problem_.query_heads + head_) * problem_.queries;
    const S* lse = static_cast<const S*>(args_.lse) + offset;
    const S* grad_lse = args_.grad_lse ? static_cast<const S*>(args_.grad_lse) + offset : nullptr;
    apart_.clear();
    for (long q = first; q < queries.end; q++) {
      const Shift<S> shift = shifts_.of(offset + q);
      work_.reference[q - first] = shift.reference;
      work_.shift[q - first] = shift.rest;
      const S product = out_product(q, out + q * out_stride, grad_out + q * grad_out_stride);
      const S delta = scale_in_scores * (product - (grad_lse ? grad_lse[q] : 0));
      work_.delta[q - first] = delta;
      // What is not finite in dO shows in delta, in Q in the lse, which a query without keys has infinite
      // too.
      if (is_restricted() && !(delta - delta == 0 && lse[q] - lse[q] == 0) &&
          !(all_finite<F>(query + q * query_stride, 0, 1, dim) &&
            all_finite<F>(grad_out + q * grad_out_stride, 0, 1, value_dim)))
        apart_.add(q);
    }
    if (!apart_.empty()) {
      if constexpr (!pairs) {
        copy_widened<V>(query_first, query_stride, rows, dim, work_.query_rows, plan_.dim_padded);
        copy_widened<V>(grad_out_first, grad_out_stride, rows, value_dim, work_.grad_out_rows,
                        plan_.value_dim_padded);
        query_rows_ = {work_.query_rows, plan_.dim_padded};
        grad_out_rows_ = {work_.grad_out_rows, plan_.value_dim_padded};
      }
      apart_.template clear_rows<V>(first, work_.query_rows, plan_.dim_padded);
      apart_.template clear_rows<V>(first, work_.grad_out_rows, plan_.value_dim_padded);
    }
    for (long i = rows; i < round_up(rows, block_queries); i++) {
      work_.shift[i] = static_cast<S>(-1e30);  // weight 0
      work_.reference[i] = work_.delta[i] = 0;
    }
  }

  void tile(const Band& band, Range keys, Range queries) {
    Range rows[panels], used{block_keys, 0};  // relative to the block's first key
    for (long p = 0; p < panels; p++) {
      rows[p] =
          panel(band, keys, {queries.begin + p * width, min(queries.end, queries.begin + (p + 1) * width)});
      if (rows[p].empty()) continue;
      used = {min(used.begin, rows[p].begin), max(used.end, rows[p].end)};
    }
    if (used.empty()) return;
    for (long p = 0; p < panels; p++) {
      if (queries.begin + p * width >= queries.end) break;
      if (rows[p].empty()) rows[p] = {used.begin, used.begin};
      clear_rows(p, {used.begin, rows[p].begin});
      clear_rows(p, {rows[p].end, used.end});
    }

    const Range used_keys{keys.begin + used.begin, keys.begin + used.end};
    const Range seen = band.seen_by_all(queries);
    const bool whole = seen.begin <= used_keys.begin && used_keys.end <= seen.end;
    if (args_.grad_value.data)
      accumulate_keys(band, whole, queries, used_keys, weights(used.begin), grad_out_rows_,
                      plan_.value_dim_padded, grad_value_);
    if (args_.grad_key.data)
      accumulate_keys(band, whole, queries, used_keys, gradients(used.begin), query_rows_, plan_.dim_padded,
                      grad_key_);
    accumulate_apart(queries, keys, used);
    if (!args_.grad_query.data) return;
    const long step = guards_keys_ ? width : block_queries;
    for (long q = queries.begin; q < queries.end; q += step)
      accumulate_queries(band, whole, {q, min(queries.end, q + step)}, used_keys, used);
  }

  // dV += P^T dO or dK += dS^T Q: a holds the block's rows from the first used key on. Where the band cuts
  // the block, a group of keys meets only the queries that see it.
  void accumulate_keys(const Band& band, bool whole, Range queries, Range keys, const E* a, Rows<E> b,
                       long columns, S* sums) {
    constexpr long a_stride = block_queries / depth;
    const long group = whole ? keys.size() : V::tile_rows;
    for (long k = keys.begin; k < keys.end; k += group, a += group * a_stride) {
      const Range rows{k, min(keys.end, k + group)};
      Range met = whole ? queries : intersect(queries, band.queries_of(rows));
      if (met.empty()) continue;
      met.begin -= (met.begin - queries.begin) % depth;  // whole pairs
      const long skipped = (met.begin - queries.begin) / depth;
      accumulate(columns, rows.size(), DepthContiguous<E>{a + skipped, a_stride},
                 b.row((met.begin - first_query_) / depth), b.stride, met.size(),
                 sums + (k - keys_.begin) * columns);
    }
  }

  // The same from the queries apart, for the keys that have a weight.
  void accumulate_apart(Range queries, Range keys, Range used) {
    const long first = keys.begin - keys_.begin;
    apart_.visit(queries, [&](long q) {
      const auto add = [&](const auto* coefficients, const T* row, long columns, long padded, S* sums) {
        for (long k = used.begin; k < used.end; k++)
          add_multiple<F>(number(coefficients[k * block_queries + q - queries.begin]), row, columns,
                          sums + (first + k) * padded);
      };
      const T* grad_out = element<T>(args_.grad_out, batch_, head_, q);
      const T* query = element<T>(problem_.query, batch_, head_, q);
      if (grad_value_)
        add(weight_elements(), grad_out, problem_.value_dim, plan_.value_dim_padded, grad_value_);
      if (grad_key_) add(gradient_elements(), query, problem_.head_dim, plan_.dim_padded, grad_key_);
    });
  }

  // dQ += dS K, for some or all queries of a block.
  void accumulate_queries(const Band& band, bool whole, Range queries, Range keys, Range used) {
    const long first = keys.begin - keys_.begin, dim = plan_.dim_padded;
    const long column = queries.begin % block_queries;
    const Rows<E> block = guards_keys_ ? finite_key_rows(first, used, column, queries.size())
                                       : Rows<E>{key_rows_.row(first / depth), key_rows_.stride};
    const E* a = gradient_columns(used.begin) + column;
    const long group = whole ? queries.size() : V::tile_rows;
    for (long q = queries.begin; q < queries.end; q += group) {
      const Range rows{q, min(queries.end, q + group)};
      Range met = whole ? keys : intersect(keys, band.seen_by_any(rows));
      if (met.empty()) continue;
      met.begin -= (met.begin - keys.begin) % depth;
      const long skipped = (met.begin - keys.begin) / depth;
      accumulate(dim, rows.size(),
                 RowsContiguous<E>{a + skipped * block_queries + q - queries.begin, block_queries},
                 block.row(skipped), block.stride, met.size(), grad_query_ + (q - first_query_) * dim);
    }
  }

  // C[rows][columns] += A B, summed over `count` values.
  template <class A>
  void accumulate(long columns, long rows, A a, const E* b, long b_stride, long count, S* c) {
    long vectors = columns / V::lanes;
    for (long pieces = ceil_div(vectors, V::tile_vectors); pieces > 0; pieces--) {
      const long now = ceil_div(vectors, pieces);
      gemm_columns<V, Accumulate>(static_cast<int>(now), rows, a, b, b_stride, ceil_div(count, depth), c,
                                  columns);
      b += now * V::lanes;
      c += now * V::lanes;
      vectors -= now;
    }
  }

  // Weights and score gradients of one panel of queries, in up to three segments of keys: those that all
  // its queries see lie between those that some do. Returns the keys it has touched, from the block's first.
  Range panel(const Band& band, Range block, Range queries) {
    if (queries.empty()) return {0, 0};
    Range keys = intersect(block, band.seen_by_any(queries));
    const MaskCells cells = masks_.cells({batch_, head_, queries, keys}, work_.cells);
    if (problem_.mask.data) keys = cells.trimmed(keys);
    if (keys.empty()) return {0, 0};
    keys.begin -= (keys.begin - block.begin) % depth;  // whole pairs
    Range touched{block_keys, 0};
    const auto visit = [&](Range part) {
      if (part.empty() || !segment(band, cells, block, {batch_, head_, queries, part})) return;
      touched = {min(touched.begin, part.begin - block.begin), max(touched.end, part.end - block.begin)};
    };
    Range full = intersect(keys, band.seen_by_all(queries));
    full.begin += (full.begin - block.begin) % depth;
    if (full.end < keys.end) full.end -= (full.end - block.begin) % depth;
    if (problem_.mask.data || full.empty()) {
      visit(keys);
    } else {
      visit({keys.begin, full.begin});
      visit(full);
      visit({full.end, keys.end});
      // Empty segments inside a touched range do not occur without a mask.
    }
    return touched;
  }

  // Returns false, and touches nothing, where no query of the tile may attend to any key of it.
  bool segment(const Band& band, const MaskCells& cells, Range block, const Tile& where) {
    const TileKind kind = classify<width>(problem_, band, cells, where, work_.allowed);
    if (kind == TileKind::empty) return false;
    const Range queries = where.queries, keys = where.keys;
    const long first = keys.begin - block.begin, count = keys.size(), key = keys.begin - keys_.begin;
    const long column = pairs ? 0 : queries.begin % block_queries;
    const long dim = ceil_div(problem_.head_dim, depth), value_dim = ceil_div(problem_.value_dim, depth);
    const Block<S> scores{work_.scores + first * work_.scores_stride + column, work_.scores_stride};
    const Block<S> products{work_.products + first * work_.scores_stride + column, work_.scores_stride};
    const DepthContiguous<E> key_columns{key_columns_.row(key), key_columns_.stride};
    const DepthContiguous<E> value_columns{value_columns_.row(key), value_columns_.stride};
    const long query = queries.begin - first_query_;
    const E* query_panel = work_.query_panels + query * dim;
    const E* grad_out_panel = work_.grad_out_panels + query * value_dim;
    const S *reference = work_.reference + query, *shift = work_.shift + query, *delta = work_.delta + query;
    const bool has_bias = problem_.bias.data, has_dropout = problem_.dropout_p > 0;

    if (kind == TileKind::full && !has_bias) {
      const auto product = [&](auto referenced) {
        constexpr bool has_references = decltype(referenced)::value;
        if constexpr (depth == 1)
          if (plan_.as_decoded)
            return few_weights_product<V, has_references>(queries.size(), count, key_columns, query_panel,
                                                          dim, reference, shift, plan_.product_factor,
                                                          scores);
        const long swept = swept_keys(queries, count, dim);
        if (swept)
          sweep_panel<V>(
              swept, key_columns, query_panel, dim,
              WeightsWork<V, has_references>{reference, shift, plan_.product_factor, scores, next_});
        if (swept == count) return;
        for_each_piece<V>(queries.size(), [&](auto vectors, long q) {
          weights_product<V, decltype(vectors)::value, has_references>(
              count - swept, key_columns.rows_from(swept), query_panel + q, dim, reference + q, shift + q,
              plan_.product_factor, {scores.row(swept) + q, scores.stride});
        });
      };
      if (shifts_.any())
        product(std::true_type());
      else
        product(std::false_type());
    } else {
      const uint8_t* allowed = kind == TileKind::mixed ? work_.allowed : nullptr;
      if (has_bias) read_bias(where);
      score_product(band, where, key_columns, query_panel, dim, scores);
      if (has_bias && allowed)
        weights_of<V, true, true>(scores, count, reference, shift, plan_, work_.bias, allowed);
      else if (has_bias)
        weights_of<V, true, false>(scores, count, reference, shift, plan_, work_.bias, nullptr);
      else
        weights_of<V, false, true>(scores, count, reference, shift, plan_, nullptr, allowed);
    }
    if (has_dropout) mark_dropped<V>(problem_, where, scores);

    const bool guarded = kind != TileKind::full || has_bias;
    const bool plain = !guarded && !has_dropout && plan_.wants_scores;
    const long swept = plain ? swept_keys(queries, count, value_dim) : 0;
    if (swept) {
      if constexpr (pairs) {
#ifdef FASTATTN_BF16_DOT
        sweep_panel<V>(swept, value_columns, grad_out_panel, value_dim,
                       GradientsWork<V, GradientPairs>{delta, scores, gradient_pairs(where, first)});
#endif
      } else {
        sweep_panel<V>(swept, value_columns, grad_out_panel, value_dim,
                       GradientsWork<V, Block<S>>{delta, scores, products});
      }
    }
    if (swept < count) {
      const Tile rest{where.batch, where.head, queries, {keys.begin + swept, keys.end}};
      const Block<S> rest_scores{scores.row(swept), scores.stride},
          rest_products{products.row(swept), products.stride};
      const DepthContiguous<E> rest_columns = value_columns.rows_from(swept);
      if (!pairs && plain) {
        for_each_piece<V>(queries.size(), [&](auto vectors, long q) {
          gradients_product<V, decltype(vectors)::value>(
              count - swept, rest_columns, grad_out_panel + q, value_dim, delta + q,
              {rest_scores.data + q, scores.stride}, {rest_products.data + q, products.stride});
        });
      } else {
        if (plan_.wants_scores)
          seen_product(band, rest, rest_columns, grad_out_panel, value_dim, rest_products);
        if (has_dropout)
          gradients_of<true, true>(rest_scores, rest_products, rest, first + swept);
        else if (guarded)
          gradients_of<false, true>(rest_scores, rest_products, rest, first + swept);
        else
          gradients_of<false, false>(rest_scores, rest_products, rest, first + swept);
      }
    }
    if (args_.grad_bias && problem_.bias.stride[3] != 0) {
      S* out = static_cast<S*>(args_.grad_bias) + batch_ * plan_.grad_bias_stride[0] +
               head_ * plan_.grad_bias_stride[1] + queries.begin * plan_.grad_bias_stride[2] +
               keys.begin * plan_.grad_bias_stride[3];
      add_transposed<V>(products, queries.size(), count, out, plan_.grad_bias_stride[2],
                        plan_.grad_bias_stride[3]);
    }
    return true;
  }

  // Of `count` keys, those whose weights and gradients are computed beside products.
  static long swept_keys(Range queries, long count, long dim) {
    const bool full = queries.size() > width - V::lanes;
    return full && Sweep<V>::fits(count, dim) ? Sweep<V>::whole_tiles(count) : 0;
  }

  void score_product(const Band& band, const Tile& where, DepthContiguous<E> a, const E* panel, long count,
                     Block<S> out) {
    if constexpr (depth == 1)
      if (plan_.as_decoded)
        return few_queries_scores<V>(where.queries.size(), where.keys.size(), a, panel, width, count,
                                     out.data, out.stride);
    seen_product(band, where, a, panel, count, out);
  }

  // C[keys][panel] = A B for a tile that the band may cut: groups of keys skip the vectors of queries that
  // do not see them, and leave there what was there.
  void seen_product(const Band& band, const Tile& where, DepthContiguous<E> a, const E* panel, long count,
                    Block<S> out) {
    const Range seen = band.seen_by_all(where.queries);
    const bool whole = seen.begin <= where.keys.begin && where.keys.end <= seen.end;
    const long group = whole ? where.keys.size() : V::tile_rows;
    for (long k = 0; k < where.keys.size(); k += group) {
      const long rows = min(group, where.keys.size() - k), key = where.keys.begin + k;
      const Range met = whole ? where.queries : intersect(where.queries, band.queries_of({key, key + rows}));
      if (met.empty()) continue;
      const long begin = (met.begin - where.queries.begin) / V::lanes;
      const long end = ceil_div(met.end - where.queries.begin, V::lanes);
      gemm_columns<V, Store>(static_cast<int>(end - begin), rows, a.rows_from(k), panel + begin * V::lanes,
                             width, count, out.row(k) + begin * V::lanes, out.stride);
    }
  }

  void read_bias(const Tile& where) {
    if (problem_.bias_dtype == problem_.dtype)
      load_bias<F, T>(problem_, where, work_.bias);
    else
      load_bias<F, float>(problem_, where, work_.bias);
    // Past the last query nothing is seen, or a key that is not finite would have weights there.
    for (long q = where.queries.size(); q < width; q++)
      for (long k = 0; k < where.keys.size(); k++) work_.bias[k * width + q] = -Limits<S>::infinity;
  }

  template <bool has_dropout, bool guarded>
  void gradients_of(Block<S> weights, Block<S> products, const Tile& where, [[maybe_unused]] long first) {
    const S* delta = work_.delta + (where.queries.begin - first_query_);
    const S keep_scale = static_cast<S>(1 / (1 - problem_.dropout_p));
    const long count = where.keys.size();
    if constexpr (pairs) {
#ifdef FASTATTN_BF16_DOT
      score_gradients_pairs<V, has_dropout, guarded>(weights, products, count, delta, keep_scale,
                                                     args_.grad_bias != nullptr,
                                                     gradient_pairs(where, first));
#endif
    } else {
      score_gradients<V, has_dropout, guarded>(weights, products, count, delta, keep_scale);
    }
  }

#ifdef FASTATTN_BF16_DOT
  // Where pairs go from the block's key `first` on.
  GradientPairs gradient_pairs(const Tile& where, long first) const {
    const long column = where.queries.begin % block_queries, at = first * block_queries + column;
    return {{work_.weights_pairs + at, block_queries},
            {work_.gradients_pairs + at, block_queries},
            {work_.gradients_key_pairs + first / 2 * block_queries + column, block_queries}};
  }
#endif

  // Rows of the block that a panel has not touched, but another has.
  void clear_rows(long p, Range rows) {
    for (long k = rows.begin; k < rows.end; k++) {
      const long at = k * block_queries + p * width;
      if constexpr (pairs) {
        memset(work_.weights_pairs + at, 0, sizeof(bf16) * width);
        memset(work_.gradients_pairs + at, 0, sizeof(bf16) * width);
        if (k % 2 == 0)
          memset(work_.gradients_key_pairs + k / 2 * block_queries + p * width, 0, sizeof(uint32_t) * width);
      } else {
        memset(work_.scores + at, 0, sizeof(S) * width);
        memset(work_.products + at, 0, sizeof(S) * width);
      }
    }
  }

  // P^T and dS^T of a block, [keys][block_queries].
  const auto* weight_elements() const {
    if constexpr (pairs)
      return work_.weights_pairs;
    else
      return work_.scores;
  }
  const auto* gradient_elements() const {
    if constexpr (pairs)
      return work_.gradients_pairs;
    else
      return work_.products;
  }
  const E* weights(long row) const {
    return reinterpret_cast<const E*>(weight_elements() + row * block_queries);
  }
  const E* gradients(long row) const {
    return reinterpret_cast<const E*>(gradient_elements() + row * block_queries);
  }
  const E* gradient_columns(long row) const {
    if constexpr (pairs)
      return work_.gradients_key_pairs + row / 2 * block_queries;
    else
      return work_.products + row * block_queries;
  }

  // The block's keys, zero in place of those that none of the queries from `column` on attends to.
  Rows<E> finite_key_rows(long key, Range used, long column, long queries) {
    const long dim = plan_.dim_padded, rows = used.size();
    for (long k = 0; k < rows; k++) {
      bool dead = true;
      for (long q = 0; q < ceil_div(queries, depth); q++)
        dead &= is_zero(gradients(used.begin + k)[column / depth + q]);
      E* out = work_.block_key_rows + k / depth * dim;
      const E* source = key_rows_.row((key + k) / depth);
      for (long c = 0; c < dim; c++) {
        if constexpr (pairs) {
          const uint32_t half = k % 2 ? 0xffff0000u : 0xffffu;
          out[c] = (k % 2 ? out[c] : 0) | (dead ? 0 : source[c] & half);
        } else {
          out[c] = dead ? 0 : source[c];
        }
      }
    }
    return {work_.block_key_rows, dim};
  }
  static S number(bf16 x) { return widen(x); }
  static S number(S x) { return x; }
  static bool is_zero(float x) { return x == 0; }
  static bool is_zero(double x) { return x == 0; }
  static bool is_zero(uint32_t pair) { return (pair & 0x7fff7fffu) == 0; }

  // The vector type that reads T.
  using F = std::conditional_t<sizeof(S) == 8, F64, F32>;

  const Plan& plan_;
  const Problem& problem_;
  const BackwardArgs& args_;
  const MaskMap<width>& masks_;
  const LargeShifts<V, T>& shifts_;
  S* const partial_;
  BackwardWorkspace<V> work_;
  const Item* share_ = nullptr;

  Range chunks_{0, 0};
  long batch_ = 0, kv_head_ = 0, head_ = 0;
  Range keys_{0, 0};
  Rows<E> key_columns_{}, value_columns_{};  // A of the scores and of dP
  Rows<E> key_rows_{}, query_rows_{}, grad_out_rows_{};
  long first_query_ = 0;  // of the stretch
  QueriesApart<stretch_queries> apart_;
  Upcoming next_;
  bool guards_keys_ = false;
  S *grad_query_ = nullptr, *grad_key_ = nullptr, *grad_value_ = nullptr;  // sums, from the first row on
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
