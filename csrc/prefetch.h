// Rows that are needed soon, brought into the level 2 cache a few lines at a time while there is arithmetic
// to do: at every tile of scores, so that no burst of them stands in its way. The processor's own prefetchers
// follow rows, but begin with each panel anew: a call on 128 keys whose operands lie in memory would wait for
// them for a third of its time.
#pragma once

#include "simd_common.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

class Upcoming {
 public:
  // `count` rows of `bytes` bytes, `stride` bytes apart; rows to be written are fetched to be owned.
  void add(const void* data, long stride, long count, long bytes, bool written) {
    if (count > 0)
      regions_[size_++] = {static_cast<const char*>(data), stride, count, ceil_div(bytes, 64L), written};
  }
  // About how often fetch_some() will be called.
  void share_among(long calls) {
    long lines = 0;
    for (int i = 0; i < size_; i++) lines += regions_[i].count * regions_[i].lines;
    lines_at_once_ = ceil_div(lines, max(1L, calls));
  }
  INLINE void fetch_some() {
    for (long left = lines_at_once_; left > 0 && region_ < size_;) {
      const Region& r = regions_[region_];
      const char* row = r.data + row_ * r.stride;
      if (r.written)
        for (long i = 0; i < r.lines; i++) __builtin_prefetch(row + i * 64, 1, 2);
      else
        for (long i = 0; i < r.lines; i++) __builtin_prefetch(row + i * 64, 0, 2);
      left -= r.lines;
      if (++row_ == r.count) row_ = 0, region_++;
    }
  }

 private:
  struct Region {
    const char* data;
    long stride, count, lines;
    bool written;
  };
  Region regions_[5];
  int size_ = 0, region_ = 0;
  long row_ = 0, lines_at_once_ = 0;
};

// Rows to come, each brought into the cache while an earlier one is read; none by default.
struct RowsToCome {
  const void* data = nullptr;
  long stride = 0, size = 0;  // in bytes
  INLINE void fetch(long row) const {
    const char* const bytes = static_cast<const char*>(data) + row * stride;
    for (long line = 0; line < size; line += 64) __builtin_prefetch(bytes + line);
  }
};

// What the next block of keys and what the next work item begins with.
struct Ahead {
  Upcoming block, item;
  INLINE void fetch_some() {
    block.fetch_some();
    item.fetch_some();
  }
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
