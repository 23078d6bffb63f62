// Work distribution: each thread of an OpenMP team takes the items of its own share, then the others'.
//
// What an item computes never depends on the number of threads or on who draws it, so results are
// bitwise equal for any team.  Callers number the items heaviest first, so that the last ones drawn are
// small and the threads finish together.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace fastattn {

// Who may interrupt a call. `may_ask` says whether the thread that makes the call may ask at all, `is_wanted`
// asks; both are called on that thread, `is_wanted` at most every 30 to 100 ms.
struct InterruptSource {
  bool (*may_ask)();
  bool (*is_wanted)();
};
void set_interrupt_source(InterruptSource source);

// Thrown by run_items, when all threads have stopped. What the call would have written is unspecified.
struct Interrupted {};

// Tells the threads of a call that it has been interrupted. Only the one that made the call asks the source.
class Interruption {
 public:
  bool is_seen() const { return seen_.load(std::memory_order_relaxed); }
  bool ask() {
    if (--left_ > 0) return is_seen();
    return look_at_clock();
  }

 private:
  bool look_at_clock();

  std::atomic<bool> seen_{false};
  // Of so many times to ask (`round_`, of which `left_` are to come) only the last looks at the clock, which
  // takes some of a small item's time.
  int left_ = 16, round_ = 16;
  uint64_t looked_ = 0, next_ = 0;  // when it was looked at, and when to ask the source, in ticks
};

// A piece of work, and the one that the same thread takes next: the number of items if that is not known yet.
struct Item {
  int64_t index, next;
  Interruption* interruption;
  bool is_callers;  // computed by the thread that made the call

  operator int64_t() const { return index; }
  // A long item asks between its parts, and returns if so.
  bool is_interrupted() const { return is_callers ? interruption->ask() : interruption->is_seen(); }
};

// Calls body(context, item, scratch) for every item in [0, items) on at most `threads` threads.
//
// scratch is a cache-line-aligned block of scratch_bytes, private to the thread and not initialised.
// All memory is allocated before the team starts: std::bad_alloc leaves from here, in the calling
// thread.  body must not throw.  Throws Interrupted where the interrupt source says so, asked between
// items and by long ones.  Runs serially inside another parallel region and in a child process
// forked from one that had loaded this library: the runtime's worker threads do not survive fork().
void run_items(int64_t items, int threads, size_t scratch_bytes, void (*body)(void*, const Item&, void*),
               void* context);

template <class Body>
void parallel_for(int64_t items, int threads, size_t scratch_bytes, Body&& body) {
  using Function = std::remove_reference_t<Body>;
  run_items(
      items, threads, scratch_bytes,
      [](void* context, const Item& item, void* scratch) {
        (*static_cast<Function*>(context))(item, scratch);
      },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

// Fills order with 0 .. count - 1 by falling work; equal work keeps its order.
void order_heaviest_first(const int64_t* work, int64_t count, int64_t* order);

// Memory aligned to cache lines that frees itself, a large block for the next one (result_memory.h); throws
// std::bad_alloc.
class AlignedBuffer {
 public:
  // Of no bytes it costs no call. Inlined for certain: a copy compiled for one instruction set must not serve
  // the others.
  __attribute__((always_inline)) explicit AlignedBuffer(size_t bytes) : data_(nullptr), pooled_(0) {
    if (bytes) allocate(bytes);
  }
  __attribute__((always_inline)) ~AlignedBuffer() {
    if (data_) release();
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  void* data() const { return data_; }

 private:
  void allocate(size_t bytes);
  void release();

  void* data_;
  size_t pooled_;  // bytes, 0 for a small block
};

}  // namespace fastattn
