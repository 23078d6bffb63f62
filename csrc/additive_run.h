// Additive attention: forward and backward in tiles of queries by keys, nothing of size Lq * Lk in memory.
//
// A division costs ten cycles for 16 lanes, a multiply-add half of one. So four fractions share a division:
// w0/e0 + w1/e1 = (w0 e1 + w1 e0) / (e0 e1), twice over. Each e is at most Saturation<S>::limit, where the
// tanh is 1 to the last bit, so that the product of four does not overflow.
#pragma once

#include "additive.h"
#include "gemm.h"
#include "pack.h"
#include "parallel.h"
#include "scratch.h"
#include "softmax.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// 2^f to 2e-9 (Remez, as those of simd_common.h). Degree 5 errs by up to one unit in the last place, in the
// same direction for every query, so that the gradients of keys and values would add it up; beside a tanh for
// each feature the sixth coefficient costs nothing.
template <>
struct FromZero<6> {
  static constexpr float coefficient[] = {2.170225568e-04f, 1.243968770e-03f, 9.678841018e-03f,
                                          5.548334197e-02f, 2.402298363e-01f, 6.931469838e-01f,
                                          1.000000002e+00f};
};
template <>
struct Centred<6> {
  static constexpr float coefficient[] = {1.534581216e-04f, 1.339993118e-03f, 9.618488956e-03f,
                                          5.550328777e-02f, 2.402264689e-01f, 6.931472057e-01f,
                                          1.000000001e+00f};
};

template <class S>
struct Saturation;
template <>
struct Saturation<float> {
  static constexpr float limit = 1073741824.0f;  // 2^30
};
template <>
struct Saturation<double> {
  static constexpr double limit = 144115188075855872.0;  // 2^57
};

template <class V>
class Additive {
  using S = typename V::scalar;
  using vector = typename V::vector;
  static constexpr int vectors = V::tile_vectors;
  static constexpr long block_keys = V::lanes * vectors;
  static constexpr long block_queries = 4 * V::tile_rows;

 public:
  explicit Additive(const AdditiveProblem& problem) : problem_(problem) {}

  void forward(const AdditiveOutput& output, int threads) const {
    const long blocks = ceil_div(problem_.queries, block_queries);
    parallel_for(problem_.batch * blocks, threads, Workspace(problem_, false, ScratchLayout()).bytes,
                 [this, blocks, &output](int64_t item, void* scratch) {
                   const Workspace work(problem_, false, ScratchLayout(scratch));
                   forward_item(item / blocks, item % blocks * block_queries, work, output);
                 });
  }

  void backward(const AdditiveGradients& gradients, int threads) const {
    parallel_for(problem_.batch * gradients.chunks, threads, Workspace(problem_, true, ScratchLayout()).bytes,
                 [this, &gradients](const Item& item, void* scratch) {
                   const Workspace work(problem_, true, ScratchLayout(scratch));
                   backward_item(item, work, gradients);
                 });
  }

 private:
  struct Workspace {
    Workspace(const AdditiveProblem& p, bool backward, ScratchLayout arena) {
      key = arena.take<S>(p.features * block_keys);
      bias = arena.take<S>(block_keys);
      score = arena.take<S>(block_queries * block_keys);
      out = arena.take<S>(backward ? 0 : block_queries * p.value_dim);
      grad_score = arena.take<S>(backward ? block_queries * block_keys : 0);
      value = arena.take<S>(backward ? p.value_dim * block_keys : 0);
      grad_value = arena.take<S>(backward ? block_keys * p.value_dim : 0);
      grad_key = arena.take<S>(backward ? block_keys * p.features : 0);
      bytes = arena.used();
    }
    S *key, *bias, *score, *out, *grad_score, *value, *grad_value, *grad_key;
    size_t bytes;
  };

  template <class T>
  static const S* at(const T* base, long row, long width) {
    return static_cast<const S*>(base) + row * width;
  }
  static S* at(void* base, long row, long width) { return static_cast<S*>(base) + row * width; }

  INLINE static vector exp2(vector x) { return V::template exp2<6>(x); }

  INLINE static vector e_of(vector query, const S* key) {
    // The limit first: where either is NaN, min gives its second operand.
    return V::min(V::set1(Saturation<S>::limit), V::fma(query, V::load(key), V::set1(S(1))));
  }

  // Keys [first, first + count) across the lanes, and 0 or -inf for each; false when none may be seen.
  bool load_keys(long b, long first, long count, const Workspace& work) const {
    bool any = false;
    for (long j = 0; j < block_keys; j++) {
      const bool seen = j < count && (!problem_.mask || problem_.mask[b * problem_.keys + first + j]);
      work.bias[j] = seen ? S(0) : -Limits<S>::infinity;
      any |= seen;
    }
    if (any)
      pack(at(problem_.key, b * problem_.keys + first, problem_.features), count, problem_.features,
           work.key);
    return any;
  }

  static void pack(const S* rows, long count, long depth, S* panel) {
    if (count < block_keys) memset(panel, 0, depth * block_keys * sizeof(S));
    pack_transposed<V, block_keys>(rows, depth, count, depth, S(1), panel);
  }

  // score[row][lanes of keys] = offset + bias + sum_d weight[d] / e.
  void scores(const S* query, long rows, const Workspace& work) const {
    const S* weight = static_cast<const S*>(problem_.weight);
    const long features = problem_.features;
    for (long i = 0; i < rows; i++) {
      vector total[vectors];
      UNROLL for (int v = 0; v < vectors; v++) total[v] =
          V::add(V::set1(static_cast<S>(problem_.offset)), V::load(work.bias + v * V::lanes));
      for (long d = 0; d < features; d += 4) {
        vector q[4], w[4];
        UNROLL for (int x = 0; x < 4; x++) {
          q[x] = V::set1(query[i * features + d + x]);
          w[x] = V::set1(weight[d + x]);
        }
        UNROLL for (int v = 0; v < vectors; v++) {
          const S* key = work.key + d * block_keys + v * V::lanes;
          vector e[4];
          UNROLL for (int x = 0; x < 4; x++) e[x] = e_of(q[x], key + x * block_keys);
          const vector above0 = V::fma(w[0], e[1], V::mul(w[1], e[0])), below0 = V::mul(e[0], e[1]);
          const vector above1 = V::fma(w[2], e[3], V::mul(w[3], e[2])), below1 = V::mul(e[2], e[3]);
          const vector above = V::fma(above0, below1, V::mul(above1, below0));
          total[v] = V::add(total[v], V::div(above, V::mul(below0, below1)));
        }
      }
      UNROLL for (int v = 0; v < vectors; v++) V::store(work.score + i * block_keys + v * V::lanes, total[v]);
    }
  }

  // C[rows, columns] (=, +=) A B in groups of columns that the micro-kernel takes.
  template <class Finish, class A>
  static void product(long rows, long columns, A a, const S* b, long b_stride, long depth, S* c,
                      long c_stride) {
    for (long column = 0; column < columns; column += block_keys) {
      const int count = static_cast<int>(min<long>(block_keys, columns - column) / V::lanes);
      gemm_columns<V, Finish>(count, rows, a, b + column, b_stride, depth, c + column, c_stride);
    }
  }

  void forward_item(long b, long first, const Workspace& work, const AdditiveOutput& output) const {
    const long rows = min<long>(block_queries, problem_.queries - first), width = problem_.value_dim;
    const S* query = at(problem_.query, b * problem_.queries + first, problem_.features);
    S largest[block_queries], sum[block_queries];
    for (long i = 0; i < rows; i++) largest[i] = -Limits<S>::infinity, sum[i] = 0;
    memset(work.out, 0, rows * width * sizeof(S));

    for (long j = 0; j < problem_.keys; j += block_keys) {
      const long count = min<long>(block_keys, problem_.keys - j);
      if (!load_keys(b, j, count, work)) continue;
      scores(query, rows, work);
      for (long i = 0; i < rows; i++)
        soften(work.score + i * block_keys, largest[i], sum[i], work.out + i * width, width);
      product<Accumulate>(rows, width, DepthContiguous<S>{work.score, block_keys},
                          at(problem_.value, b * problem_.keys + j, width), width, count, work.out, width);
    }
    const long row = b * problem_.queries + first;
    for (long i = 0; i < rows; i++) {
      const vector factor = V::set1(sum[i] == 0 ? S(0) : S(1) / sum[i]);
      S* target = at(output.out, row + i, width);
      for (long d = 0; d < width; d += V::lanes)
        V::store(target + d, V::mul(factor, V::load(work.out + i * width + d)));
      at(output.largest, row + i, 1)[0] = largest[i];
      at(output.sum, row + i, 1)[0] = sum[i];
    }
  }

  // One row of scores to 2^(score - largest); what was summed before is brought to the new largest score.
  static void soften(S* score, S& largest, S& sum, S* out, long width) {
    vector highest = V::load(score);
    UNROLL for (int v = 1; v < vectors; v++) highest = V::max(V::load(score + v * V::lanes), highest);
    const S previous = largest;
    largest = max(V::maximum(highest), previous);
    const vector reference = V::set1(max(largest, Limits<S>::lowest));
    vector total = V::zero();
    UNROLL for (int v = 0; v < vectors; v++) {
      const vector p = exp2(V::sub(V::load(score + v * V::lanes), reference));
      V::store(score + v * V::lanes, p);
      total = V::add(total, p);
    }
    S factor[V::lanes];
    V::store(factor, exp2(V::sub(V::set1(previous), reference)));
    sum = sum * factor[0] + V::sum(total);
    if (factor[0] != 1)
      for (long d = 0; d < width; d += V::lanes)
        V::store(out + d, V::mul(V::set1(factor[0]), V::load(out + d)));
  }

  void backward_item(const Item& item, const Workspace& work, const AdditiveGradients& gradients) const {
    const long b = item / gradients.chunks, chunk = item % gradients.chunks;
    const long features = problem_.features, width = problem_.value_dim, queries = problem_.queries;
    const long size = round_up(ceil_div(problem_.keys, gradients.chunks), block_keys);
    const long end = min(problem_.keys, (chunk + 1) * size);
    S* grad_query = at(gradients.grad_query, (chunk * problem_.batch + b) * queries, features);
    S* grad_weight = at(gradients.grad_weight, chunk * problem_.batch + b, features);
    memset(grad_query, 0, queries * features * sizeof(S));
    memset(grad_weight, 0, features * sizeof(S));
    for (long j = chunk * size; j < end && !item.is_interrupted(); j += block_keys) {
      const long count = min(block_keys, end - j), key_row = b * problem_.keys + j;
      memset(work.grad_key, 0, block_keys * features * sizeof(S));
      memset(work.grad_value, 0, block_keys * width * sizeof(S));
      if (load_keys(b, j, count, work)) {
        pack(at(problem_.value, key_row, width), count, width, work.value);
        for (long first = 0; first < queries; first += block_queries)
          backward_tile(b, first, key_row, count, work, gradients, grad_query + first * features,
                        grad_weight);
        // Their weights of 0 have not kept out what is not finite in the gradient of the output.
        for (long k = 0; k < count; k++) {
          if (work.bias[k] == 0) continue;
          memset(work.grad_key + k * features, 0, features * sizeof(S));
          memset(work.grad_value + k * width, 0, width * sizeof(S));
        }
      }
      memcpy(at(gradients.grad_key, key_row, features), work.grad_key, count * features * sizeof(S));
      memcpy(at(gradients.grad_value, key_row, width), work.grad_value, count * width * sizeof(S));
    }
  }

  void backward_tile(long b, long first, long key_row, long count, const Workspace& work,
                     const AdditiveGradients& gradients, S* grad_query, S* grad_weight) const {
    const long rows = min<long>(block_queries, problem_.queries - first), width = problem_.value_dim;
    const long row = b * problem_.queries + first;
    const S* query = at(problem_.query, row, problem_.features);
    const S* grad_out = at(gradients.grad_out, row, width);
    scores(query, rows, work);
    product<Store>(rows, block_keys, DepthContiguous<S>{grad_out, width}, work.value, block_keys, width,
                   work.grad_score, block_keys);  // dP
    for (long i = 0; i < rows; i++) {
      const S lse = at(gradients.lse, row + i, 1)[0], delta = at(gradients.delta, row + i, 1)[0];
      // Against +inf every weight of a query without keys is 0.
      const vector reference = V::set1(lse < Limits<S>::lowest ? Limits<S>::infinity : lse);
      UNROLL for (int v = 0; v < vectors; v++) {
        S *score = work.score + i * block_keys + v * V::lanes,
          *grad = work.grad_score + i * block_keys + v * V::lanes;
        const vector p = exp2(V::sub(V::load(score), reference));
        V::store(score, p);
        V::store(grad, V::mul(p, V::sub(V::load(grad), V::set1(delta))));
      }
    }
    product<Accumulate>(count, width, RowsContiguous<S>{work.score, block_keys}, grad_out, width, rows,
                        work.grad_value, width);
    for (long i = 0; i < rows; i++)
      spread(query + i * problem_.features, work.grad_score + i * block_keys, key_row, count, work.grad_key,
             grad_query + i * problem_.features, grad_weight);
  }

  // The gradient of one query's scores, through the tanh, to the query, the keys and the weight. Features lie
  // across the lanes here, so that all three are sums of whole vectors; four keys share a division.
  void spread(const S* query, const S* grad_score, long key_row, long count, S* grad_key, S* grad_query,
              S* grad_weight) const {
    const long features = problem_.features;
    const S* keys = at(problem_.key, key_row, features);
    const long whole = count / 4 * 4;
    for (long d = 0; d < features; d += V::lanes) {
      const vector q = V::load(query + d);
      vector of_query = V::load(grad_query + d), of_weight = V::load(grad_weight + d);
      for (long j = 0; j < whole; j += 4)
        spread_keys<4>(q, grad_score + j, keys + j * features + d, grad_key + j * features + d, of_query,
                       of_weight);
      for (long j = whole; j < count; j++)
        spread_keys<1>(q, grad_score + j, keys + j * features + d, grad_key + j * features + d, of_query,
                       of_weight);
      V::store(grad_query + d, of_query);
      V::store(grad_weight + d, of_weight);
    }
  }

  template <int n>
  INLINE void spread_keys(vector q, const S* grad_score, const S* key, S* grad_key, vector& of_query,
                          vector& of_weight) const {
    const long features = problem_.features;
    vector r[n];
    UNROLL for (int x = 0; x < n; x++) r[x] = e_of(q, key + x * features);
    if constexpr (n == 4) {
      const vector first = V::mul(r[0], r[1]), second = V::mul(r[2], r[3]);
      const vector inverse = V::div(V::set1(S(1)), V::mul(first, second));
      const vector of_first = V::mul(inverse, second), of_second = V::mul(inverse, first);
      const vector e0 = r[0], e2 = r[2];
      r[0] = V::mul(of_first, r[1]);
      r[1] = V::mul(of_first, e0);
      r[2] = V::mul(of_second, r[3]);
      r[3] = V::mul(of_second, e2);
    } else {
      r[0] = V::div(V::set1(S(1)), r[0]);
    }
    UNROLL for (int x = 0; x < n; x++) {
      const vector ds = V::set1(grad_score[x]);
      // The dS of a query add up to 0: subtracting half of each keeps the terms, and their rounding, small.
      of_weight = V::fma(ds, V::sub(r[x], V::set1(S(0.5))), of_weight);
      const vector slope = V::mul(ds, V::fms(r[x], r[x], r[x]));
      of_query = V::add(of_query, slope);
      S* target = grad_key + x * features;
      V::store(target, V::add(V::load(target), slope));
    }
  }

  const AdditiveProblem& problem_;
};

// exp(2 x) as 2^t with t = 2 log2(e) x, and what rounding takes from t as a factor.
template <class V>
double additive_exponentials_of(const AdditiveExponentials& given, int threads) {
  using S = typename V::scalar;
  constexpr long double exact = 2.885390081777926814719849362003784L;
  constexpr S high = static_cast<S>(exact), low = static_cast<S>(exact - high);
  const S* const input = static_cast<const S*>(given.input);
  S* const output = static_cast<S*>(given.output);
  const int64_t block = max<int64_t>(1, 16384 / given.padded), items = ceil_div(given.rows, block);
  const AlignedBuffer largest(sizeof(S) * items);
  parallel_for(items, threads, 0, [&](int64_t item, void*) {
    auto most = V::zero(), not_finite = V::zero();
    for (int64_t i = item * block; i < min(given.rows, (item + 1) * block); i++)
      for (int64_t d = 0; d < given.padded; d += V::lanes) {
        const auto x = V::load(input + i * given.features + d, given.features - d);
        most = V::max(V::max(x, V::sub(V::zero(), x)), most);
        not_finite = V::fma(x, V::zero(), not_finite);
        const auto t = V::mul(x, V::set1(high));
        const auto rest = V::fma(x, V::set1(low), V::fused(x, V::set1(high), V::sub(V::zero(), t)));
        V::store(output + i * given.padded + d,
                 V::mul(V::template exp2<6>(t), V::fma(rest, V::set1(static_cast<S>(ln_2)), V::set1(1))));
      }
    static_cast<S*>(largest.data())[item] = V::maximum(most) + V::sum(not_finite);
  });
  S result = 0;
  for (int64_t item = 0; item < items; item++) {
    const S value = static_cast<S*>(largest.data())[item];
    result = value <= result ? result : value;
    if (value != value) return value;
  }
  return result;
}

inline double additive_exponentials(const AdditiveExponentials& given, int threads) {
  if (given.dtype == DType::f64) return additive_exponentials_of<F64>(given, threads);
  return additive_exponentials_of<F32>(given, threads);
}

inline void additive_forward(const AdditiveProblem& problem, const AdditiveOutput& output, int threads) {
  if (problem.dtype == DType::f64) return Additive<F64>(problem).forward(output, threads);
  Additive<F32>(problem).forward(output, threads);
}

inline void additive_backward(const AdditiveProblem& problem, const AdditiveGradients& gradients,
                              int threads) {
  if (problem.dtype == DType::f64) return Additive<F64>(problem).backward(gradients, threads);
  Additive<F32>(problem).backward(gradients, threads);
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
