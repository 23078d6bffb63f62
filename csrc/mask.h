// The two questions every kernel asks: which keys can a block of queries see, and is a tile of scores
// empty, full or mixed. Everything that restricts attention is decided here, for all kernels alike.
#pragma once

#include "band.h"
#include "mask_map.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// Transposes 8 x 8 bytes: byte j of word i <-> byte i of word j. A vector of words does a block per lane.
template <class Word>
INLINE void transpose_bytes(Word (&x)[8]) {
  const auto swap = [&x](int distance, int shift, uint64_t low) {
    UNROLL for (int i = 0; i < 8; i++) {
      if (i & distance) continue;
      const Word t = ((x[i] >> shift) ^ x[i + distance]) & low;
      x[i + distance] ^= t;
      x[i] ^= t << shift;
    }
  };
  swap(1, 8, 0x00ff00ff00ff00ffull);
  swap(2, 16, 0x0000ffff0000ffffull);
  swap(4, 32, 0x00000000ffffffffull);
}

// Copies the bool mask's tile into bytes [keys][width], queries across; lanes past the last query are 0.
// Says whether all, none or some of its elements are true.
template <int width>
inline TileKind transpose_mask(const Problem& problem, const Tile& tile, uint8_t* bytes) {
  const Tensor4<const uint8_t>& mask = problem.mask;
  const long query_stride = mask.stride[2], key_stride = mask.stride[3];
  const uint8_t* source = mask.at(tile.batch, tile.head, tile.queries.begin, tile.keys.begin);
  const long queries = tile.queries.size(), keys = tile.keys.size();
  typedef uint64_t Words __attribute__((vector_size(32)));
  constexpr uint64_t all_true = 0x0101010101010101ull;  // a bool is 0 or 1
  uint64_t some = 0, every = all_true;
  if (query_stride == 0) {
    for (long k = 0; k < keys; k++) {
      const uint8_t value = source[k * key_stride] != 0;
      some |= value;
      every &= value ? all_true : 0;
      memset(bytes + k * width, value, queries);
      memset(bytes + k * width + queries, 0, width - queries);
    }
  } else {
    const long blocked_keys = key_stride == 1 ? keys / 8 * 8 : 0, blocked_queries = queries / 8 * 8;
    const auto one = [&](long q, long k) {
      const uint8_t value = source[q * query_stride + k * key_stride] != 0;
      some |= value;
      every &= value ? all_true : 0;
      bytes[k * width + q] = value;
    };
    const auto block = [&](long q, long k, auto word) {
      using Word = decltype(word);
      constexpr int blocks = sizeof(Word) / 8;
      Word x[8], or_all{}, and_all = Word{} + all_true;
      UNROLL for (int i = 0; i < 8; i++) {
        memcpy(&x[i], source + (q + i) * query_stride + k, sizeof(Word));
        or_all |= x[i];
        and_all &= x[i];
      }
      transpose_bytes(x);
      uint64_t words[8][blocks], ors[blocks], ands[blocks];
      memcpy(words, x, sizeof x);
      memcpy(ors, &or_all, sizeof ors);
      memcpy(ands, &and_all, sizeof ands);
      UNROLL for (int n = 0; n < blocks; n++) {
        some |= ors[n];
        every &= ands[n];
        UNROLL for (int i = 0; i < 8; i++) memcpy(bytes + (k + 8 * n + i) * width + q, &words[i][n], 8);
      }
    };
    for (long q = 0; q < blocked_queries; q += 8) {
      long k = 0;
      for (; k + 32 <= blocked_keys; k += 32) block(q, k, Words{});
      for (; k < blocked_keys; k += 8) block(q, k, uint64_t{});
      for (long k = blocked_keys; k < keys; k++)
        for (long i = q; i < q + 8; i++) one(i, k);
    }
    for (long q = blocked_queries; q < queries; q++)
      for (long k = 0; k < keys; k++) one(q, k);
    if (queries < width)
      for (long k = 0; k < keys; k++) memset(bytes + k * width + queries, 0, width - queries);
  }
  return !some ? TileKind::empty : every == all_true ? TileKind::full : TileKind::mixed;
}

// Classifies a tile; only when it is mixed, bytes [keys][width] tell for each key (row) and query (lane)
// whether the query may attend to it. `cells` are of the tile's queries, where there is a mask.
template <int width>
inline TileKind classify(const Problem& problem, const Band& band, const MaskCells& cells, const Tile& tile,
                         uint8_t* bytes) {
  TileKind kind = TileKind::full;
  if (problem.mask.data) {
    kind = cells.kind(tile.keys);
    if (kind == TileKind::mixed) kind = transpose_mask<width>(problem, tile, bytes);
    if (kind == TileKind::empty) return kind;
  }
  const Range all = band.seen_by_all(tile.queries);
  if (all.begin <= tile.keys.begin && tile.keys.end <= all.end) return kind;

  const bool blank = kind == TileKind::full;
  bool some = false;
  // Keys see an interval of queries whose ends move with the key: two cursors, no search.
  long begin = tile.queries.begin, end = tile.queries.begin;
  for (long key = tile.keys.begin; key < tile.keys.end; key++) {
    while (begin < tile.queries.end && band.row(begin).end <= key) begin++;
    end = max(end, begin);
    while (end < tile.queries.end && band.row(end).begin <= key) end++;
    uint8_t* row = bytes + (key - tile.keys.begin) * width;
    const long first = begin - tile.queries.begin, last = end - tile.queries.begin;
    if (blank) memset(row, 1, width);
    memset(row, 0, first);
    memset(row + last, 0, width - last);
    some |= first < last;
  }
  return some ? TileKind::mixed : TileKind::empty;
}

// bytes [keys][width] from the band alone, for each key (row) and query (lane) of a tile.
template <int width>
inline void bytes_of_band(const Band& band, const Tile& tile, uint8_t* bytes) {
  for (long key = tile.keys.begin; key < tile.keys.end; key++) {
    uint8_t* row = bytes + (key - tile.keys.begin) * width;
    const Range who = intersect(band.queries_of({key, key + 1}), tile.queries);
    memset(row, 0, width);
    if (!who.empty()) memset(row + (who.begin - tile.queries.begin), 1, who.size());
  }
}

// True when no query of the tile may attend to the key in this row of bytes.
template <int width>
INLINE bool is_dead(const uint8_t* row) {
  for (int i = 0; i < width; i += 8) {
    uint64_t word = 0;
    memcpy(&word, row + i, width - i < 8 ? width - i : 8);
    if (word) return false;
  }
  return true;
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
