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

}  // namespace

void run_items(int64_t items, int threads, size_t scratch_bytes, void (*body)(void*, int64_t, void*),
               void* context) {
  if (items <= 0) return;
  int team = static_cast<int>(std::min<int64_t>(std::max(threads, 1), items));
  if (forked || omp_in_parallel()) team = 1;
  const size_t block = (scratch_bytes + kCacheLine - 1) / kCacheLine * kCacheLine + kThreadSkew;
  const Scratch scratch(scratch_bytes ? block * static_cast<size_t>(team) : 0);
  char* const base = static_cast<char*>(scratch.data());

  if (team == 1) {
    const FlushDenormals flush;
    for (int64_t item = 0; item < items; ++item) body(context, item, base);
    return;
  }
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(team)
  {
    const FlushDenormals flush;
    char* const mine = base ? base + block * static_cast<size_t>(omp_get_thread_num()) : nullptr;
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;)
      body(context, item, mine);
  }
}

}  // namespace fastattn
