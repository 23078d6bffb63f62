// Gradients of attention: the entry point of one instruction set.
#pragma once

#include "backward_task.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// dQ = the sum of the chunks' partial sums, in the order of the chunks.
template <class V, class T>
void sum_partial_queries(const BackwardPlan<V>& plan, typename V::scalar* partial, int threads) {
  using S = typename V::scalar;
  constexpr long block = BackwardPlan<V>::block_queries;
  const Problem& problem = plan.problem;
  const Tensor4<T> out = plan.args.grad_query.template as<T>();
  const long blocks = ceil_div(problem.queries, block), dim = plan.dim_padded;
  const long heads = problem.batch * problem.query_heads;
  parallel_for(heads * blocks, threads, block * dim * sizeof(S), [&](int64_t item, void* scratch) {
    S* sum = static_cast<S*>(scratch);
    const long head = item / blocks, b = head / problem.query_heads;
    const Range queries{item % blocks * block, min<long>(problem.queries, (item % blocks + 1) * block)};
    const long count = queries.size() * dim;
    memset(sum, 0, sizeof(S) * count);
    const Band band(problem, b);
    for (long c = 0; c < plan.chunks; c++) {
      const Range all = plan.chunk(c), keys{all.begin, min<long>(all.end, problem.key_length(b))};
      if (intersect(queries, query_span(band, keys, problem.queries, block)).empty()) continue;
      const S* part = partial + (c * heads + head) * plan.head_query_size() + queries.begin * dim;
      add_to<V>(sum, part, count);
    }
    write_rows<V>(sum, dim, queries.size(), problem.head_dim, static_cast<S>(plan.scale_after),
                  out.at(b, head % problem.query_heads, queries.begin), out.stride[2]);
  });
}

// A bias that broadcasts over keys shifts whole rows of scores, which moves no weight but moves lse by as
// much: the sum of dS over the keys is dlse.
template <class V>
void add_row_bias_gradient(const BackwardPlan<V>& plan) {
  using S = typename V::scalar;
  const Problem& problem = plan.problem;
  const S* lse = static_cast<const S*>(plan.args.lse);
  const S* grad_lse = static_cast<const S*>(plan.args.grad_lse);
  for (long b = 0; b < problem.batch; b++)
    for (long h = 0; h < problem.query_heads; h++)
      for (long i = 0; i < problem.queries; i++, lse++, grad_lse++)
        if (*lse != -Limits<S>::infinity)
          static_cast<S*>(plan.args.grad_bias)[b * plan.grad_bias_stride[0] + h * plan.grad_bias_stride[1] +
                                               i * plan.grad_bias_stride[2]] += *grad_lse;
}

template <class V, class T>
void backward_of(const Problem& problem, const BackwardArgs& args, int threads) {
  using S = typename V::scalar;
  const BackwardPlan<V> plan(problem, args, threads);
  const long items = plan.items();
  const AlignedBuffer partial(sizeof(S) * plan.partial_size()), order(2 * sizeof(int64_t) * items);
  int64_t* const sorted = static_cast<int64_t*>(order.data());
  int64_t* const work = sorted + items;
  for (long item = 0; item < items; item++) work[item] = plan.work(item);
  order_heaviest_first(work, items, sorted);
  S* const sums = static_cast<S*>(partial.data());
  const bool has_float_results = args.grad_bias && problem.bias_dtype != problem.dtype;
  const MaskMap<panel_width<V>> masks(problem);
  masks.scan(threads);
  const LargeShifts<V, T> shifts(problem, plan, masks, args.lse, sizeof(T) == 2 && !has_float_results);
  shifts.compute(threads);
  parallel_for(items, threads, BackwardWorkspace<V>::bytes(plan, masks),
               [&](const Item& item, void* scratch) {
                 BackwardTask<V, T>(plan, masks, shifts, sums, scratch).run(sorted[item], item);
               });
  if (plan.partial_size()) sum_partial_queries<V, T>(plan, sums, threads);
  if (args.grad_bias && args.grad_lse && problem.bias.stride[3] == 0) add_row_bias_gradient(plan);
}

inline void backward(const Problem& problem, const BackwardArgs& args, int threads) {
  switch (problem.dtype) {
    case DType::f32:
      return backward_of<F32, float>(problem, args, threads);
    case DType::f64:
      return backward_of<F64, double>(problem, args, threads);
    case DType::f16:
      return backward_of<F32, fp16>(problem, args, threads);
    case DType::bf16:
#ifdef FASTATTN_BF16_DOT
      return backward_of<BF16Pair, bf16>(problem, args, threads);
#else
      return backward_of<F32, bf16>(problem, args, threads);
#endif
  }
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
