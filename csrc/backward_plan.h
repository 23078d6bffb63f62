// How a backward call is cut into items, so that the result does not depend on who computes what.
//
// An item owns the gradients of some keys of one key head (of all heads or batch entries that share a bias
// whose gradient is wanted). Where heads are few the keys are cut into chunks, from the shape alone, and each
// chunk has a partial sum of dQ, added in the order of the chunks: by the item itself where it has all of
// them, else when all items are done. Only that depends on the number of threads, and no bit of a result
// does.
#pragma once

#include "backward.h"
#include "backward_tile.h"
#include "few_queries.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// The queries that a chunk of keys meets, in whole blocks.
inline Range query_span(const Band& band, Range keys, long queries, long block) {
  const Range seen = keys.empty() ? Range{0, 0} : band.queries_of(keys);
  if (seen.empty()) return {0, 0};
  return {seen.begin / block * block, min(queries, round_up(seen.end, block))};
}

template <class V>
struct BackwardPlan : ForwardScores<V> {
  using S = typename V::scalar;
  static constexpr long width = panel_width<V>;
  // What is read again and again stays in a 32 KB L1 (D = 64): a panel of Q^T or dO^T, rows of Q or dO (16 KB
  // each), the block's keys (24 KB). P, dS and the block's dK and dV (24 KB each, of pairs 48 KB) lie in L2.
  static constexpr long block_queries = max(64L * V::depth, width), block_keys = 96 * V::depth;
  // So do the operands and gradients of a stretch of queries (320 KB), while the keys pass by.
  static constexpr long stretch_queries = 256;
  static constexpr long enough_items = 16, least_chunk = 512;

  const Problem& problem;
  const BackwardArgs& args;
  long batches_per_item, heads_per_item;  // heads of keys
  long batch_items, head_items, chunks, chunk_keys, chunks_per_item;
  long dim_padded, value_dim_padded, stretch_padded;
  bool wants_scores;  // dQ, dK or dbias
  // dQ = scale dS K and dK = scale dS^T Q. dS carries the scale where nobody wants to see it (a bias does),
  // so that the sums need no factor and can be kept in the caller's gradients.
  double scale_in_scores, scale_after;
  long grad_bias_stride[4];

  BackwardPlan(const Problem& p, const BackwardArgs& a, int threads)
      : ForwardScores<V>(p), problem(p), args(a) {
    const bool shares = args.grad_bias != nullptr;
    batches_per_item = shares && p.bias.stride[0] == 0 ? p.batch : 1;
    heads_per_item = shares && p.bias.stride[1] == 0 ? p.kv_heads : 1;
    batch_items = ceil_div(p.batch, max(1L, batches_per_item));
    head_items = ceil_div(p.kv_heads, max(1L, heads_per_item));
    const long items = max(1L, batch_items * head_items);
    chunks = max(1L, min(ceil_div(enough_items, items), p.keys / least_chunk));
    chunk_keys = max(block_keys, round_up(ceil_div(p.keys, chunks), block_keys));
    chunks = max(1L, ceil_div(p.keys, chunk_keys));
    // Whole heads that threads can share evenly, twice each so that unequal ones even out.
    const bool enough_heads = threads <= 1 || (items / 2 >= threads && items % threads == 0);
    chunks_per_item = enough_heads ? chunks : 1;
    dim_padded = round_up(p.head_dim, V::lanes);
    value_dim_padded = round_up(p.value_dim, V::lanes);
    stretch_padded = min(stretch_queries, round_up(p.queries, block_queries));
    wants_scores = a.grad_query.data || a.grad_key.data || a.grad_bias;
    scale_in_scores = V::depth == 2 || a.grad_bias ? 1 : p.scale;
    scale_after = V::depth == 2 || a.grad_bias ? p.scale : 1;
    const long size[4] = {p.batch, p.query_heads, p.queries, p.keys};
    long stride = 1;
    for (int i = 3; i >= 0; i--) {
      grad_bias_stride[i] = p.bias.stride[i] == 0 ? 0 : stride;
      stride *= p.bias.stride[i] == 0 ? 1 : size[i];
    }
  }

  long items_per_head() const { return chunks / chunks_per_item; }
  long items() const { return batch_items * head_items * items_per_head(); }

  Range chunk(long c) const { return {c * chunk_keys, min(problem.keys, (c + 1) * chunk_keys)}; }
  Range chunks_of(long item) const {
    const long first = item % items_per_head() * chunks_per_item;
    return {first, first + chunks_per_item};
  }
  Range keys_of(Range chunks) const { return {chunk(chunks.begin).begin, chunk(chunks.end - 1).end}; }

  // Blocks of the score matrix that item computes, up to a factor common to all.
  int64_t work(long item) const {
    const Range keys = keys_of(chunks_of(item));
    const long first_batch = item / items_per_head() / head_items * batches_per_item;
    int64_t blocks = 0;
    for (long b = first_batch; b < min(problem.batch, first_batch + batches_per_item); b++) {
      const Band band(problem, b);
      for (long k = keys.begin; k < keys.end; k += block_keys)
        blocks += max(0L, band.queries_of({k, min(keys.end, k + block_keys)}).size());
    }
    return blocks;
  }

  // Scalars of one head's dQ, and of all partial sums.
  long head_query_size() const { return problem.queries * dim_padded; }
  long partial_size() const {
    return items_per_head() > 1 && args.grad_query.data
               ? chunks * problem.batch * problem.query_heads * head_query_size()
               : 0;
  }
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
