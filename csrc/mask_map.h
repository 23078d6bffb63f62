// Where a bool mask has no true element and where it has no false one, in cells of a panel of queries by 16
// keys: tiles that no query may attend to, or all may, are known without a look at their elements.
//
// A mask that heads, batch entries or queries share is scanned once for all of them, before the call's work;
// another one by the item that meets it, which then reads it from the cache. The cells are the same.
#pragma once

#include "band.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// The cells of one panel of queries along the keys.
class MaskCells {
 public:
  static constexpr long keys_per_cell = 16;
  static Range covering(Range keys) {
    return {keys.begin / keys_per_cell, ceil_div(keys.end, keys_per_cell)};
  }

  MaskCells() = default;
  // `first` is the cell that data begins with; stride 0 repeats one cell for all keys.
  MaskCells(const uint8_t* data, long first, long stride) : data_(data), first_(first), stride_(stride) {}

  // Mixed where a cell at an end has both, even if the keys have not.
  TileKind kind(Range keys) const {
    const Range cells = covering(keys);
    uint8_t any = 0, all = full;
    for (long c = cells.begin; c < cells.end; c++) any |= at(c), all &= at(c);
    return !any ? TileKind::empty : all == full ? TileKind::full : TileKind::mixed;
  }
  // The keys without the cells at both ends where no element is true.
  Range trimmed(Range keys) const {
    if (keys.empty()) return keys;
    Range cells = covering(keys);
    while (!cells.empty() && !at(cells.begin)) cells.begin++;
    while (!cells.empty() && !at(cells.end - 1)) cells.end--;
    return intersect(keys, {cells.begin * keys_per_cell, cells.end * keys_per_cell});
  }

  INLINE uint8_t at(long cell) const { return data_[(cell - first_) * stride_]; }

  // The values of a cell: some element is true, and beside it all are.
  static constexpr uint8_t some = 1, full = 3;
  static uint8_t value(bool any, bool all) { return all ? full : any ? some : 0; }

 private:
  // Not initialised by default: a small item's panels have many, and no mask.
  const uint8_t* data_;
  long first_, stride_;
};

// Bytes of a bool mask read together, each 0 or 1; any other is true too, and never counts as full.
struct MaskBytes {
  uint64_t any[2] = {0, 0}, all[2] = {each_true, each_true};
  static constexpr uint64_t each_true = 0x0101010101010101ull;
  uint8_t value() const { return MaskCells::value(any[0] | any[1], (all[0] & all[1]) == each_true); }
};

// Cells of `count` keys side by side, 16 `groups` of them at a time: rows follow each other in memory order
// over a few cache lines, so that the processor's prefetchers keep up.
template <int groups>
inline long scan_rows(const uint8_t* source, long stride, long queries, long key, long count,
                      uint8_t* cells) {
  typedef uint64_t Words __attribute__((vector_size(16 * (groups < 4 ? groups : 4))));
  constexpr int vectors = groups < 4 ? 1 : groups / 4;
  for (; key + 16 * groups <= count; key += 16 * groups) {
    Words any[vectors], all[vectors];
    for (int i = 0; i < vectors; i++) any[i] = Words{}, all[i] = Words{} + MaskBytes::each_true;
    MaskBytes bytes[groups];
    for (long q = 0; q < queries; q += 8) {
      for (long row = q; row < min(queries, q + 8); row++) UNROLL for (int i = 0; i < vectors; i++) {
          Words x;
          memcpy(&x, source + row * stride + key + i * sizeof x, sizeof x);
          any[i] |= x;
          all[i] &= x;
        }
      // Where all cells are mixed the other rows change nothing.
      bool done = true;
      for (int i = 0; i < groups; i++) {
        memcpy(bytes[i].any, reinterpret_cast<const char*>(any) + 16 * i, 16);
        memcpy(bytes[i].all, reinterpret_cast<const char*>(all) + 16 * i, 16);
        cells[key / 16 + i] = bytes[i].value();
        done &= cells[key / 16 + i] == MaskCells::some;
      }
      if (done) break;
    }
  }
  return key;
}

// cells[i] of the keys from 16 i on, of a panel of queries.
inline void scan_cells(const uint8_t* source, long query_stride, long key_stride, long queries, long keys,
                       uint8_t* cells) {
  long key = 0;
  if (key_stride == 1) {
    key = scan_rows<16>(source, query_stride, queries, key, keys, cells);
    key = scan_rows<1>(source, query_stride, queries, key, keys, cells);
  }
  for (; key < keys; key += MaskCells::keys_per_cell) {
    uint8_t any = 0, all = 1;
    for (long k = key; k < min(keys, key + MaskCells::keys_per_cell); k++)
      for (long q = 0; q < queries; q++) {
        const uint8_t x = source[q * query_stride + k * key_stride];
        any |= x;
        all &= x;
      }
    cells[key / MaskCells::keys_per_cell] = MaskCells::value(any, all);
  }
}

// The cells of all panels of `width` queries.
template <long width>
class MaskMap {
  // A smaller mask is scanned by each item anew, which takes less time than to share the work; a still
  // smaller one not at all: its tiles are mixed until their elements are read.
  static constexpr long least_shared = 16 * 1024, least_scanned = 1024;
  static constexpr uint8_t mixed_cell = MaskCells::some;

 public:
  explicit MaskMap(const Problem& problem)
      : problem_(problem),
        mask_(problem.mask),
        scanned_(mask_.data && problem.queries * problem.keys >= least_scanned),
        shared_(choose_shared()),
        batches_(mask_.stride[0] ? problem.batch : 1),
        heads_(mask_.stride[1] ? problem.query_heads : 1),
        panels_(mask_.stride[2] ? ceil_div(problem.queries, width) : 1),
        cells_(mask_.stride[3] ? ceil_div(problem.keys, MaskCells::keys_per_cell) : 1),
        memory_(shared_ ? batches_ * heads_ * panels_ * cells_ : 0) {}

  // Scans a mask that is shared. Interrupted as any parallel_for.
  void scan(int threads) const {
    if (!shared_) return;
    parallel_for(batches_ * heads_ * panels_, threads, 0, [this](int64_t row, void*) {
      const long first = row % panels_ * width;
      scan_panel(row / panels_ / heads_, row / panels_ % heads_,
                 {first, min(first + width, problem_.queries)}, {0, problem_.keys}, row_of_cells(row));
    });
  }

  // Bytes of scratch that `cells` needs for a tile of so many keys.
  long scratch(long keys) const { return scanned_ && !shared_ ? keys / MaskCells::keys_per_cell + 2 : 0; }
  // Of a panel of queries, at least for the tile's keys; none without a mask, or keys.
  MaskCells cells(const Tile& tile, uint8_t* scratch) const {
    if (!mask_.data || tile.keys.empty()) return {};
    if (!scanned_) return {&mixed_cell, 0, 0};
    return found_cells(tile, scratch);
  }

 private:
  // Not inlined: scanning would crowd the code of calls without a mask.
  __attribute__((noinline)) MaskCells found_cells(const Tile& tile, uint8_t* scratch) const {
    const long stride = mask_.stride[3] != 0;
    if (!shared_) {
      const Range covering = MaskCells::covering(tile.keys);
      scan_panel(tile.batch, tile.head, tile.queries, tile.keys, scratch);
      return {scratch, covering.begin, stride};
    }
    const long batch = mask_.stride[0] ? tile.batch : 0, head = mask_.stride[1] ? tile.head : 0;
    const long panel = mask_.stride[2] ? tile.queries.begin / width : 0;
    return {row_of_cells((batch * heads_ + head) * panels_ + panel), 0, stride};
  }

  bool choose_shared() const {
    if (!scanned_ || problem_.queries * problem_.keys < least_shared) return false;
    return (problem_.batch > 1 && !mask_.stride[0]) || (problem_.query_heads > 1 && !mask_.stride[1]) ||
           (problem_.queries > width && !mask_.stride[2]);
  }
  uint8_t* row_of_cells(long row) const { return static_cast<uint8_t*>(memory_.data()) + row * cells_; }

  // Whole cells, from the one of the first key on.
  void scan_panel(long batch, long head, Range queries, Range keys, uint8_t* cells) const {
    const Range covered = MaskCells::covering(keys);
    const long first = covered.begin * MaskCells::keys_per_cell,
               end = min(problem_.keys, covered.end * MaskCells::keys_per_cell);
    scan_cells(mask_.at(batch, head, queries.begin, first), mask_.stride[2], mask_.stride[3],
               mask_.stride[2] ? queries.size() : 1, mask_.stride[3] ? end - first : 1, cells);
  }

  const Problem& problem_;
  const Tensor4<const uint8_t>& mask_;
  const bool scanned_, shared_;
  const long batches_, heads_, panels_, cells_;
  const AlignedBuffer memory_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
