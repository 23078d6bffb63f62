#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>

#include "result_memory.h"

#if defined(__x86_64__)
#include <x86intrin.h>
#elif defined(__SSE2__)
#include <xmmintrin.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fastattn {
namespace {

constexpr size_t kCacheLine = 64;
// A skew between the threads' blocks, so that their hot lines do not share one cache set.
constexpr size_t kThreadSkew = 9 * kCacheLine;

bool forked = false;
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Whether denormal numbers are flushed to zero while it lives. In the kernels they are: softmax weights
// underflow by nature, and one denormal operand costs an FMA some 150 cycles on Intel cores.
class Denormals {
 public:
#if defined(__SSE2__)
  explicit Denormals(bool flushed) : saved_(_mm_getcsr()) {
    _mm_setcsr(flushed ? saved_ | 0x8040u : saved_ & ~0x8040u);
  }
  ~Denormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  explicit Denormals(bool) {}
#endif
};

InterruptSource interrupt_source{};

// A clock that is cheap beside the smallest item (a few ns), with no unit that matters.
#if defined(__x86_64__)
uint64_t ticks() { return __rdtsc(); }
constexpr uint64_t kAskEvery = uint64_t{1} << 27;  // 30 to 100 ms at 1.3 to 4.5 GHz
#else
uint64_t ticks() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}
constexpr uint64_t kAskEvery = 50 * 1000 * 1000;
#endif
constexpr uint64_t kNever = ~uint64_t{0};

// Scratch layouts poison the gaps between their arrays for the sanitizer of addresses (scratch.h), and leave
// them so.
void unpoison([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(data, bytes);
#endif
}

}  // namespace

void set_interrupt_source(InterruptSource source) { interrupt_source = source; }

bool Interruption::look_at_clock() {
  const uint64_t now = ticks();
  const bool is_soon = now - looked_ < kAskEvery / 64;
  round_ = is_soon ? std::min(2 * round_, 1024) : std::max(round_ / 2, 1);
  left_ = round_;
  looked_ = now;
  if (now < next_) return is_seen();
  if (next_ == 0) {
    next_ = now + kAskEvery;
  } else if (!interrupt_source.is_wanted || !interrupt_source.may_ask()) {
    next_ = kNever;
  } else {
    const Denormals kept(false);  // a signal's handler may compute
    if (interrupt_source.is_wanted()) seen_.store(true, std::memory_order_relaxed);
    // Asking waits for the interpreter's lock: that takes a sixteenth of the time at most.
    const uint64_t answered = ticks();
    next_ = answered + std::max(kAskEvery, 16 * (answered - now));
  }
  return is_seen();
}

void AlignedBuffer::allocate(size_t bytes) {
  constexpr size_t large = size_t{2} << 20;
  if (bytes >= large) {
    data_ = take_result_memory(bytes);
    pooled_ = bytes;
  } else if (posix_memalign(&data_, kCacheLine, bytes)) {
    data_ = nullptr;
  }
  if (!data_) throw std::bad_alloc();
}

void AlignedBuffer::release() {
  unpoison(data_, pooled_);
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
  explicit Scratch(size_t bytes) : own_(bytes > kMostKept || kept_.is_used ? bytes : 0), data_(own_.data()) {
    if (bytes == 0 || data_) return;
    if (kept_.bytes < bytes) {
      kept_.bytes = 0;
      kept_.buffer.reset();
      kept_.buffer = std::make_unique<AlignedBuffer>(bytes);
      kept_.bytes = bytes;
    }
    data_ = kept_.buffer->data();
    kept_.is_used = uses_kept_ = true;
  }
  ~Scratch() {
    if (uses_kept_) kept_.is_used = false;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  static constexpr size_t kMostKept = size_t{8} << 20;
  struct Kept {
    std::unique_ptr<AlignedBuffer> buffer;
    size_t bytes = 0;
    bool is_used = false;  // by a call that a signal's handler, which may call the engine, has interrupted
  };
  static thread_local Kept kept_;
  const AlignedBuffer own_;
  void* data_;
  bool uses_kept_ = false;
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

void run_items(int64_t items, int threads, size_t scratch_bytes, void (*body)(void*, const Item&, void*),
               void* context) {
  if (items <= 0) return;
  // The runtime ends the process where the system refuses it a thread; more than this never help.
  static const int most_threads = std::max(64, 4 * omp_get_num_procs());
  int team = static_cast<int>(std::min<int64_t>(std::clamp(threads, 1, most_threads), items));
  if (forked || omp_in_parallel()) team = 1;
  const size_t block = (scratch_bytes + kCacheLine - 1) / kCacheLine * kCacheLine + kThreadSkew;
  const Scratch scratch(scratch_bytes ? block * static_cast<size_t>(team) : 0);
  char* const base = static_cast<char*>(scratch.data());
  if (base) unpoison(base, block * static_cast<size_t>(team));

  Interruption interruption;
  if (team == 1) {
    const Denormals flushed(true);
    for (int64_t item = 0; item < items; ++item) {
      if (item > 0 && interruption.ask()) throw Interrupted();
      body(context, {item, item + 1, &interruption, true}, base);
    }
    if (interruption.is_seen()) throw Interrupted();
    return;
  }
  const std::unique_ptr<Share[]> shares(new Share[team]);
  for (int64_t first = 0; first < items; first += Share::most_items) {
    const int64_t count = std::min(items - first, Share::most_items);
    for (int i = 0; i < team; ++i) shares[i].set(count * i / team, count * (i + 1) / team);
#pragma omp parallel num_threads(team)
    {
      const Denormals flushed(true);
      const int self = omp_get_thread_num();
      char* const mine = base ? base + block * static_cast<size_t>(self) : nullptr;
      const auto is_interrupted = [&] { return self == 0 ? interruption.ask() : interruption.is_seen(); };
      const auto run = [&](int64_t item, int64_t next) {
        body(context, {first + item, next, &interruption, self == 0}, mine);
        return !is_interrupted();
      };
      int64_t item, next;
      bool goes_on = true;
      while (goes_on && shares[self].take_first(&item, &next))
        goes_on = run(item, next < 0 ? items : first + next);
      for (int k = 1; k < team; ++k)
        while (goes_on && shares[(self + k) % team].take_last(&item)) goes_on = run(item, items);
    }
    if (interruption.is_seen()) throw Interrupted();
  }
}

}  // namespace fastattn
