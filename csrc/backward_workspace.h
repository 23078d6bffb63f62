// The arrays of one backward item.
#pragma once

#include "backward_plan.h"
#include "scratch.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class V>
struct BackwardWorkspace {
  using S = typename V::scalar;
  using E = typename V::element;
  static constexpr long depth = V::depth, width = panel_width<V>;
  static constexpr long block_keys = BackwardPlan<V>::block_keys,
                        block_queries = BackwardPlan<V>::block_queries;
  static constexpr bool pairs = depth == 2;
  // Pairs leave the scores' scratch as bf16; fp32 and fp64 scores are used where they were computed.
  static constexpr long scores_stride = pairs ? width : block_queries;

  // Of one stretch of queries.
  E *query_panels, *grad_out_panels;  // [panel][ceil(D / depth)][width]
  E *query_rows, *grad_out_rows;      // [ceil(stretch / depth)][padded]
  E *key_rows, *key_columns;          // [ceil(keys / depth)][padded], [keys][ceil(D / depth)]
  E* value_columns;                   // [keys][ceil(Dv / depth)]
  E* block_key_rows;                  // key_rows of one block, without those that are not finite
  S *reference, *shift, *delta;       // [stretch]: the Shift by its parts, rowsum(dO O) - dlse
  S *grad_query, *grad_key, *grad_value;
  S* chunk_grad_query;                    // a chunk's share of grad_query
  S *scores, *products, *bias;            // [block_keys][scores_stride], bias [block_keys][width]
  uint8_t *allowed, *cells;               // [block_keys][width]; of a mask that is not shared
  bf16 *weights_pairs, *gradients_pairs;  // [block_keys][block_queries]
  uint32_t* gradients_key_pairs;          // [block_keys / 2][block_queries]

  BackwardWorkspace(const BackwardPlan<V>& plan, const MaskMap<width>& masks, void* base) : layout_(base) {
    const Problem& p = plan.problem;
    const long queries = plan.stretch_padded, keys = plan.chunk_keys * plan.chunks_per_item;
    const long dim = plan.dim_padded, value_dim = plan.value_dim_padded;
    scores = layout_.template take<S>(block_keys * scores_stride);
    products = layout_.template take<S>(block_keys * scores_stride);
    if constexpr (pairs) {
      weights_pairs = layout_.template take<bf16>(block_keys * block_queries);
      gradients_pairs = layout_.template take<bf16>(block_keys * block_queries);
      gradients_key_pairs = layout_.template take<uint32_t>(block_keys / 2 * block_queries);
    }
    if (p.bias.data) bias = layout_.template take<S>(block_keys * width);
    allowed = layout_.template take<uint8_t>(block_keys * width);
    cells = layout_.template take<uint8_t>(masks.scratch(block_keys));
    grad_key = layout_.template take<S>(keys * dim);
    grad_value = layout_.template take<S>(keys * value_dim);
    key_rows = layout_.template take<E>(ceil_div(keys, depth) * dim);
    if (pairs) key_columns = layout_.template take<E>(keys * ceil_div(p.head_dim, depth));
    value_columns = layout_.template take<E>(keys * value_dim);
    block_key_rows = layout_.template take<E>(block_keys * dim);
    query_panels = layout_.template take<E>(queries * ceil_div(p.head_dim, depth));
    grad_out_panels = layout_.template take<E>(queries * ceil_div(p.value_dim, depth));
    query_rows = layout_.template take<E>(ceil_div(queries, depth) * dim);
    grad_out_rows = layout_.template take<E>(ceil_div(queries, depth) * value_dim);
    reference = layout_.template take<S>(queries);
    shift = layout_.template take<S>(queries);
    delta = layout_.template take<S>(queries);
    if (plan.items_per_head() == 1) grad_query = layout_.template take<S>(queries * dim);
    if (plan.chunks_per_item > 1) chunk_grad_query = layout_.template take<S>(queries * dim);
  }
  static size_t bytes(const BackwardPlan<V>& plan, const MaskMap<width>& masks) {
    return BackwardWorkspace(plan, masks, nullptr).layout_.used();
  }

 private:
  ScratchLayout layout_;
};

// Elements in rows: of the caller's tensor where it can be read in place, else of a copy.
template <class E>
struct Rows {
  const E* data;
  long stride;
  INLINE const E* row(long i) const { return data + i * stride; }
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
