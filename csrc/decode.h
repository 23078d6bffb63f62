// The forward pass for few queries (decoding): each key and value is read once, from memory, by all query
// heads that share it, and the rate is that of the memory.
//
// Here lanes lie along the head dimension for both products, so that keys and values are read in place and
// widened in registers. The keys are split into chunks (Flash-Decoding, Dao et al. 2023), as many as the
// shape asks for and not the threads; the chunks' results are merged in order.
#pragma once

#include "few_queries.h"
#include "mask.h"
#include "pack.h"
#include "parallel.h"
#include "prefetch.h"
#include "scratch.h"
#include "softmax.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class T>
class Decode {
  using V = std::conditional_t<sizeof(T) == 8, F64, F32>;
  using S = typename V::scalar;
  using vector = typename V::vector;
  static constexpr int W = V::lanes;
  static constexpr long block_keys = 64;  // per step: fits the L1 cache beside the queries
  // Keys and values of this size come from memory; from a cache, fetching them ahead costs more than it
  // gains.
  static constexpr long beyond_caches = 32L << 20;

 public:
  static bool suits(const Problem& problem) { return is_few<V>(problem.queries); }

  Decode(const Problem& problem, const ForwardOutput& output)
      : problem_(problem),
        output_(output),
        units_(problem.scale, problem.bias.data),
        rows_(problem.group() * problem.queries),
        record_(problem.value_dim + 2),
        chunk_keys_(choose_chunk(problem)),
        chunks_(max(1L, ceil_div(problem.keys, chunk_keys_))),
        masks_(problem),
        fetches_ahead_(beyond_caches <= static_cast<long>(sizeof(T)) * problem.batch * problem.kv_heads *
                                            problem.keys * (problem.head_dim + problem.value_dim)) {}

  void run(int threads) const {
    const long heads = problem_.batch * problem_.kv_heads;
    const AlignedBuffer partial(heads * chunks_ * rows_ * record_ * sizeof(S));
    S* records = static_cast<S*>(partial.data());
    masks_.scan(threads);
    parallel_for(heads * chunks_, threads, Workspace(*this, ScratchLayout()).bytes,
                 [=](int64_t item, void* scratch) {
                   attend_chunk(item / chunks_, item % chunks_, scratch, records + item * rows_ * record_);
                 });
    parallel_for(heads, threads, 0,
                 [=](int64_t head, void*) { merge(head, records + head * chunks_ * rows_ * record_); });
  }

 private:
  struct Workspace {
    Workspace(const Decode& d, ScratchLayout layout) {
      const Problem& p = d.problem_;
      query = layout.take<S>(d.rows_ * round_up(p.head_dim, W));
      weight = layout.take<S>(d.rows_ * block_keys);
      if (p.mask.data) {
        cells = layout.take<uint8_t>(d.masks_.scratch(d.chunk_keys_));
        if (d.masks_of_group() > 1)
          merged = layout.take<uint8_t>(d.chunk_keys_ / MaskCells::keys_per_cell + 2);
      }
      bytes = layout.used();
    }
    S *query, *weight;
    uint8_t *cells = nullptr, *merged = nullptr;
    size_t bytes;
  };

  // Enough chunks for many threads even with one head, but long enough to be worth a merge.
  static long choose_chunk(const Problem& problem) {
    const long heads = problem.batch * problem.kv_heads;
    return max(512L, round_up(ceil_div(problem.keys * heads, 64), block_keys));
  }

  // Row r of a key head's group is query r % Lq of its query head r / Lq.
  INLINE long head_of(long kv_head, long row) const {
    return kv_head * problem_.group() + row / problem_.queries;
  }
  INLINE long query_of(long row) const { return row % problem_.queries; }

  // A record is what one row got from one chunk: reference, sum of weights, output not yet divided.
  void attend_chunk(long head, long chunk, void* scratch, S* records) const {
    const long b = head / problem_.kv_heads, kv_head = head % problem_.kv_heads;
    const Workspace work(*this, ScratchLayout(scratch));
    const Band band(problem_, b);
    const long padded = round_up(problem_.head_dim, W);
    const Tensor4<const T> query = problem_.query.as<const T>();
    for (long r = 0; r < rows_; r++) {
      S* row = work.query + r * padded;
      memset(row, 0, padded * sizeof(S));
      copy_widened<V>(query.at(b, head_of(kv_head, r), query_of(r)), 0, 1, problem_.head_dim, row, 0);
      S* record = records + r * record_;
      memset(record, 0, record_ * sizeof(S));
      record[0] = -Limits<S>::infinity;
    }
    const Range all = intersect(band.seen_by_any({0, problem_.queries}),
                                {chunk * chunk_keys_, min((chunk + 1) * chunk_keys_, problem_.keys)});
    const MaskCells cells = cells_of_group(b, kv_head, all, work);
    const auto seen = [&](Range keys) { return problem_.mask.data ? cells.trimmed(keys) : keys; };
    const Range keys = seen(all);
    for (long k = keys.begin; k < keys.end; k += block_keys) {
      const Range block{k, min(k + block_keys, keys.end)};
      if (!seen(block).empty()) attend_block(b, kv_head, block, band, work, records);
    }
  }

  // How many masks the query heads of a key head have.
  long masks_of_group() const { return problem_.mask.stride[1] ? problem_.group() : 1; }

  // Where some query of some head of the group may attend to a key; none without a mask.
  MaskCells cells_of_group(long b, long kv_head, Range keys, const Workspace& work) const {
    const long first = kv_head * problem_.group();
    const auto of = [&](long head) {
      return masks_.cells({b, head, {0, problem_.queries}, keys}, work.cells);
    };
    if (!problem_.mask.data || masks_of_group() == 1 || keys.empty()) return of(first);
    const Range covered = MaskCells::covering(keys);
    memset(work.merged, 0, covered.size());
    for (long head = first; head < first + problem_.group(); head++) {
      const MaskCells cells = of(head);
      for (long c = covered.begin; c < covered.end; c++) work.merged[c - covered.begin] |= cells.at(c);
    }
    return {work.merged, covered.begin, 1};
  }

  void attend_block(long b, long kv_head, Range keys, const Band& band, const Workspace& work,
                    S* records) const {
    const Tensor4<const T> key = problem_.key.as<const T>(), value = problem_.value.as<const T>();
    const T *k = key.at(b, kv_head, keys.begin), *v = value.at(b, kv_head, keys.begin);
    const long padded = round_up(problem_.head_dim, W), count = keys.size();
    S* const weight = work.weight;
    // The processor's own prefetchers begin anew with each block of keys or values: the rows of one come
    // while those of the block before it are read.
    RowsToCome values, next_keys;
    if (fetches_ahead_) {
      values = rows_to_come(value, b, kv_head, keys.begin, problem_.value_dim);
      next_keys = rows_to_come(key, b, kv_head, keys.end, problem_.head_dim);
    }
    in_groups([&](auto group, long r) {
      score<decltype(group)::value>(work.query + r * padded, k, key.stride[2], count, weight + r * block_keys,
                                    r == 0 ? values : RowsToCome());
    });
    for (long r = 0; r < rows_; r++)
      weigh(b, head_of(kv_head, r), query_of(r), keys, band, weight + r * block_keys, records + r * record_);
    in_groups([&](auto group, long r) {
      accumulate<decltype(group)::value>(weight + r * block_keys, v, value.stride[2], count,
                                         records + r * record_ + 2, r == 0 ? next_keys : RowsToCome());
    });
  }

  static RowsToCome rows_to_come(const Tensor4<const T>& tensor, long b, long h, long first, long columns) {
    constexpr long size = sizeof(T);
    return {tensor.at(b, h, first), tensor.stride[2] * size, columns * size};
  }

  // Rows are taken four at a time, which share each load (and widening) of a key or value.
  template <class Function>
  void in_groups(Function function) const {
    long r = 0;
    for (; r + 4 <= rows_; r += 4) function(std::integral_constant<int, 4>(), r);
    for (; r + 2 <= rows_; r += 2) function(std::integral_constant<int, 2>(), r);
    if (r < rows_) function(std::integral_constant<int, 1>(), r);
  }

  // scores[row][count] = keys . query[row], W keys at a time: W sums across lanes are one transpose. The
  // backward adds in the same order (few_queries.h).
  template <int rows>
  void score(const S* query, const T* keys, long stride, long count, S* scores, RowsToCome next) const {
    const long padded = round_up(problem_.head_dim, W), whole = problem_.head_dim / W * W;
    const long rest = problem_.head_dim - whole;
    for (long first = 0; first < count; first += W) {
      vector products[rows][W];
      for (int i = 0; i < W; i++) {
        const T* key = keys + min(first + i, count - 1) * stride;
        next.fetch(first + i);
        vector sum[rows];
        UNROLL for (int r = 0; r < rows; r++) sum[r] = V::zero();
        for (long d = 0; d < whole; d += W) {
          const vector x = V::load(key + d);
          UNROLL for (int r = 0; r < rows; r++) sum[r] = V::fma(x, V::load(query + r * padded + d), sum[r]);
        }
        if (rest) {
          const vector x = V::load(key + whole, rest);
          UNROLL for (int r = 0; r < rows; r++) sum[r] =
              V::fma(x, V::load(query + r * padded + whole), sum[r]);
        }
        UNROLL for (int r = 0; r < rows; r++) products[r][i] = sum[r];
      }
      for (int r = 0; r < rows; r++) {
        V::transpose(products[r]);
        UNROLL for (int half = W / 2; half > 0; half /= 2) UNROLL for (int i = 0; i < half; i++)
            products[r][i] = V::add(products[r][i], products[r][i + half]);
        V::store(scores + r * block_keys + first, products[r][0]);
      }
    }
  }

  // Turns the scores of one row into weights, and brings the row's record to the new reference.
  void weigh(long b, long h, long i, Range keys, const Band& band, S* scores, S* record) const {
    const long count = keys.size();
    const Range seen = intersect(band.row(i), keys);
    auto largest = V::set1(-Limits<S>::infinity), strange = V::zero();
    for (long k = 0; k < count; k += W) {
      vector score = V::load(scores + k);
      if (problem_.bias.data)
        score = with_bias<V>(score, V::set1(units_.multiplier),
                             bias(b, h, i, keys.begin + k, min<long>(W, count - k)));
      else
        score = V::mul(score, V::set1(units_.multiplier));
      const auto inside =
          V::both(V::first_lanes(seen.end - keys.begin - k), V::lanes_from(seen.begin - keys.begin - k));
      score = V::select(inside, score, V::set1(-Limits<S>::infinity));
      if (problem_.mask.data) {
        uint8_t bytes[W];
        for (int lane = 0; lane < W; lane++)
          bytes[lane] = k + lane < count && *problem_.mask.at(b, h, i, keys.begin + k + lane);
        score = V::select(V::nonzero(bytes), score, V::set1(-Limits<S>::infinity));
      }
      V::store(scores + k, score);
      largest = V::max(largest, score);
      strange = V::max(strange, one_if_nan(score));
    }
    const S old = record[0];
    S now = max(old, V::maximum(largest) * units_.factor);
    // A maximum loses NaN: with a finite reference the weights carry it on.
    if (now < Limits<S>::lowest && V::maximum(strange) > 0) now = 0;
    if (now < Limits<S>::lowest) {  // nothing to attend to yet
      memset(scores, 0, block_keys * sizeof(S));
      return;
    }
    if (now > old) {
      const auto factor = V::template exp2<5>(V::set1(old - now));
      record[0] = now;
      for (long d = 1; d < record_; d += W)
        V::store(record + d, V::mul(V::load(record + d, record_ - d), factor), record_ - d);
    }
    auto total = V::zero();
    const auto factor = V::set1(units_.factor), reference = V::set1(now);
    const bool rounds_scores = V::any(huge<V>(reference));
    for (long k = 0; k < count; k += W) {
      const auto score = V::load(scores + k);
      const auto p = V::template exp2<5>(rounds_scores ? V::sub(V::mul(score, factor), reference)
                                                       : V::fused(score, factor, V::set1(-now)));
      total = V::add(total, p);
      V::store(scores + k, p);
    }
    record[1] += V::sum(total);
    if (problem_.dropout_p > 0) drop(b, h, i, keys, scores);
  }

  // Neither below infinity nor above 0.
  static vector one_if_nan(vector x) {
    const auto below = V::greater(V::set1(Limits<S>::infinity), x), above = V::greater(x, V::zero());
    return V::select(below, V::zero(), V::select(above, V::zero(), V::set1(1)));
  }

  vector bias(long b, long h, long i, long k, long count) const {
    const auto read = [&](auto source) {
      const auto* data = source.at(b, h, i, k);
      const long stride = source.stride[3];
      vector x;
      if (stride == 1) {
        x = V::load(data, count);
      } else {
        alignas(64) S buffer[W] = {};
        for (long lane = 0; lane < count; lane++)
          V::store(buffer + lane, V::load(data + lane * stride, 1), 1);
        x = V::load(buffer);
      }
      return x;
    };
    return problem_.bias_dtype == problem_.dtype ? read(problem_.bias.as<const T>())
                                                 : read(problem_.bias.as<const float>());
  }

  void drop(long b, long h, long i, Range keys, S* weights) const {
    const PhiloxKey key{static_cast<uint32_t>(problem_.dropout_seed),
                        static_cast<uint32_t>(problem_.dropout_seed >> 32)};
    const uint32_t threshold = static_cast<uint32_t>(problem_.dropout_p * 4294967296.0);
    // Of the generator's lanes, one query per lane, only the first is of use here.
    const PhiloxQueries<W> generator(key, static_cast<uint32_t>(problem_.dropout_offset),
                                     static_cast<uint32_t>(b * problem_.query_heads + h),
                                     static_cast<uint32_t>(i));
    typename PhiloxQueries<W>::Vector word[4];
    for (long k = keys.begin; k < keys.end; k++) {
      if (k == keys.begin || k % 4 == 0) generator.words(static_cast<uint32_t>(k / 4), word);
      if (word[k % 4][0] < threshold) weights[k - keys.begin] = 0;
    }
  }

  // out[row][Dv] += weights[row] . values. A weight of 0 in all rows skips its value, which may be NaN in
  // padding.
  template <int rows>
  void accumulate(const S* weights, const T* values, long stride, long count, S* out, RowsToCome next) const {
    constexpr int most = rows == 1 ? 8 : 16 / rows;
    long d = 0;
    const auto next_once = [&] { return d == 0 ? next : RowsToCome(); };
    for (; d + most * W <= problem_.value_dim; d += most * W)
      accumulate_columns<rows, most>(weights, values + d, stride, count, out + d, most * W, next_once());
    for (; d < problem_.value_dim; d += W)
      accumulate_columns<rows, 1>(weights, values + d, stride, count, out + d,
                                  min<long>(W, problem_.value_dim - d), next_once());
  }
  template <int rows, int vectors>
  void accumulate_columns(const S* weights, const T* values, long stride, long count, S* out, long width,
                          RowsToCome next) const {
    vector sum[rows][vectors];
    const bool whole = width == vectors * W;  // else one vector, in part
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < vectors; j++) sum[r][j] =
        whole ? V::load(out + r * record_ + j * W) : V::load(out + r * record_, width);
    for (long k = 0; k < count; k++) {
      next.fetch(k);
      vector p[rows];
      bool any = false;
      UNROLL for (int r = 0; r < rows; r++) {
        any |= weights[r * block_keys + k] != 0;
        p[r] = V::broadcast(weights + r * block_keys + k);
      }
      if (!any) continue;
      UNROLL for (int j = 0; j < vectors; j++) {
        const T* value = values + k * stride + j * W;
        const vector x = whole ? V::load(value) : V::load(value, width);
        UNROLL for (int r = 0; r < rows; r++) sum[r][j] = V::fma(p[r], x, sum[r][j]);
      }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < vectors; j++) {
      if (whole)
        V::store(out + r * record_ + j * W, sum[r][j]);
      else
        V::store(out + r * record_, sum[r][j], width);
    }
  }

  // The rows of one key head from their chunks' records, which the first chunk's take up.
  void merge(long head, S* records) const {
    const long b = head / problem_.kv_heads, kv_head = head % problem_.kv_heads;
    const Tensor4<T> out = output_.out.as<T>();
    const Tensor4<T> residual = output_.residual.as<T>();
    for (long r = 0; r < rows_; r++) {
      S* total = records + r * record_;
      S reference = -Limits<S>::infinity;
      for (long c = 0; c < chunks_; c++) reference = max(reference, total[c * rows_ * record_]);
      const bool none = reference < Limits<S>::lowest;
      for (long c = 0; c < chunks_; c++) {
        const S* record = total + c * rows_ * record_;
        const auto factor = none ? V::zero() : V::template exp2<5>(V::set1(record[0] - reference));
        for (long d = 1; d < record_; d += W) {
          const auto scaled = V::mul(V::load(record + d, record_ - d), factor);
          V::store(total + d, c ? V::add(V::load(total + d, record_ - d), scaled) : scaled, record_ - d);
        }
      }
      const long h = head_of(kv_head, r), i = query_of(r);
      const auto share = V::set1(none ? S(0) : static_cast<S>(1 / (total[1] * (1 - problem_.dropout_p))));
      T* target = out.at(b, h, i);
      for (long d = 0; d < problem_.value_dim; d += W) {
        const long width = problem_.value_dim - d;
        const auto x = V::mul(V::load(total + 2 + d, width), share);
        store_narrowed<V>(target + d, residual.data ? residual.at(b, h, i) + d : nullptr, x, width);
      }
      alignas(64) S log[W];
      V::store(log, log2_of<V>(V::set1(total[1])));
      static_cast<S*>(output_.lse)[(b * problem_.query_heads + h) * problem_.queries + i] =
          none ? -Limits<S>::infinity
          : reference <= lowest_reference<S>
              ? Limits<S>::lowest + (total[1] - total[1])  // or NaN (forward.h)
              : static_cast<S>((reference + log[0]) * ln_2);
    }
  }

  const Problem& problem_;
  const ForwardOutput& output_;
  const ScoreUnits<S> units_;
  const long rows_, record_, chunk_keys_, chunks_;
  const MaskMap<most_few<V>> masks_;
  const bool fetches_ahead_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
