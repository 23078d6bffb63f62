#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "result_memory.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace fastattn {
namespace {

constexpr size_t kCacheLine = 64;
// A skew between the threads' blocks, so that their hot lines do not share one cache set.
constexpr size_t kThreadSkew = 9 * kCacheLine;

bool forked = false;
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Flushes denormal numbers to zero while it lives: softmax weights underflow by nature, and one
// denormal operand costs an FMA some 150 cycles on Intel cores.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace

AlignedBuffer::AlignedBuffer(size_t bytes) : data_(nullptr), pooled_(0) {
  constexpr size_t large = size_t{2} << 20;
  if (bytes >= large) {
    data_ = take_result_memory(bytes);
    pooled_ = bytes;
  } else if (bytes && posix_memalign(&data_, kCacheLine, bytes)) {
    data_ = nullptr;
  }
  if (bytes && !data_) throw std::bad_alloc();
}

AlignedBuffer::~AlignedBuffer() {
  if (pooled_)
    give_back_result_memory(data_, pooled_);
  else
    std::free(data_);
}

void order_heaviest_first(const int64_t* work, int64_t count, int64_t* order) {
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  std::stable_sort(order, order + count, [work](int64_t a, int64_t b) { return work[a] > work[b]; });
}

namespace {

// Scratch memory of a call. The calling thread keeps a moderate block for its next call: the page faults of a
// new one can take longer than a short call's work.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : own_(bytes > kMostKept ? bytes : 0), data_(own_.data()) {
    if (bytes == 0 || data_) return;
    if (kept_.bytes < bytes) {
      kept_.bytes = 0;
      kept_.buffer.reset();
      kept_.buffer = std::make_unique<AlignedBuffer>(bytes);
      kept_.bytes = bytes;
    }
    data_ = kept_.buffer->data();
  }
  void* data() const { return data_; }

 private:
  static constexpr size_t kMostKept = size_t{8} << 20;
  struct Kept {
    std::unique_ptr<AlignedBuffer> buffer;
    size_t bytes = 0;
  };
  static thread_local Kept kept_;
  const AlignedBuffer own_;
  void* data_;
};

thread_local Scratch::Kept Scratch::kept_;

// A thread's own items. Neighbouring ones share operands, and those of the last call may still be in its
// cache; who has no more of his own takes the last ones of the others.
class alignas(kCacheLine) Share {
 public:
  static constexpr int64_t most_items = int64_t{1} << 31;

  void set(int64_t begin, int64_t end) { range_.store(pack(begin, end), std::memory_order_relaxed); }
  // `next` is what the owner finds at the front then, -1 for nothing.
  bool take_first(int64_t* item, int64_t* next) {
    return take([&](int64_t begin, int64_t end) {
      *item = begin;
      *next = begin + 1 < end ? begin + 1 : -1;
      return pack(begin + 1, end);
    });
  }
  bool take_last(int64_t* item) {
    return take([&](int64_t begin, int64_t end) {
      *item = end - 1;
      return pack(begin, end - 1);
    });
  }

 private:
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  template <class F>
  bool take(F rest) {
    uint64_t range = range_.load(std::memory_order_relaxed);
    for (;;) {
      const auto begin = static_cast<int64_t>(range >> 32), end = static_cast<int64_t>(range & 0xffffffff);
      if (begin >= end) return false;
      if (range_.compare_exchange_weak(range, rest(begin, end), std::memory_order_relaxed)) return true;
    }
  }
  std::atomic<uint64_t> range_{0};
};

}  // namespace

void run_items(int64_t items, int threads, size_t scratch_bytes, void (*body)(void*, Item, void*),
               void* context) {
  if (items <= 0) return;
  // The runtime ends the process where the system refuses it a thread; more than this never help.
  static const int most_threads = std::max(64, 4 * omp_get_num_procs());
  int team = static_cast<int>(std::min<int64_t>(std::clamp(threads, 1, most_threads), items));
  if (forked || omp_in_parallel()) team = 1;
  const size_t block = (scratch_bytes + kCacheLine - 1) / kCacheLine * kCacheLine + kThreadSkew;
  const Scratch scratch(scratch_bytes ? block * static_cast<size_t>(team) : 0);
  char* const base = static_cast<char*>(scratch.data());

  if (team == 1) {
    const FlushDenormals flush;
    for (int64_t item = 0; item < items; ++item) body(context, {item, item + 1}, base);
    return;
  }
  const std::unique_ptr<Share[]> shares(new Share[team]);
  for (int64_t first = 0; first < items; first += Share::most_items) {
    const int64_t count = std::min(items - first, Share::most_items);
    for (int i = 0; i < team; ++i) shares[i].set(count * i / team, count * (i + 1) / team);
#pragma omp parallel num_threads(team)
    {
      const FlushDenormals flush;
      const int self = omp_get_thread_num();
      char* const mine = base ? base + block * static_cast<size_t>(self) : nullptr;
      int64_t item, next;
      while (shares[self].take_first(&item, &next))
        body(context, {first + item, next < 0 ? items : first + next}, mine);
      for (int k = 1; k < team; ++k)
        while (shares[(self + k) % team].take_last(&item)) body(context, {first + item, items}, mine);
    }
  }
}

}  // namespace fastattn
