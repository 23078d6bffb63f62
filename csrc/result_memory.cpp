#include "result_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "machine.h"

namespace fastattn {
namespace {

constexpr size_t huge_page = size_t{2} << 20;

struct Block {
  void* data;
  size_t bytes;
};

void* map(size_t bytes) {
  void* const mapped =
      mmap(nullptr, bytes + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const uintptr_t first = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t begin = (first + huge_page - 1) / huge_page * huge_page;
  if (begin > first) munmap(mapped, begin - first);
  if (begin < first + huge_page) munmap(reinterpret_cast<void*>(begin + bytes), first + huge_page - begin);
  void* const data = reinterpret_cast<void*>(begin);
  prefer_huge_pages(data, bytes);
  return data;
}

void unmap(Block block) { munmap(block.data, block.bytes); }

// The blocks kept, oldest first. Whoever finds them locked does without: a child of fork() may inherit the
// lock of a thread that it has not.
class Kept {
 public:
  static constexpr int most = 32;

  class Lock {
   public:
    explicit Lock(Kept& kept) : kept_(kept), held_(!kept.locked_.test_and_set(std::memory_order_acquire)) {}
    ~Lock() {
      if (held_) kept_.locked_.clear(std::memory_order_release);
    }
    explicit operator bool() const { return held_; }

   private:
    Kept& kept_;
    const bool held_;
  };

  // The smallest that holds `bytes` without wasting more than a quarter; of size 0 if there is none.
  Block take(size_t bytes) {
    int best = -1;
    for (int i = 0; i < count_; i++)
      if (blocks_[i].bytes >= bytes && blocks_[i].bytes <= bytes + bytes / 4 &&
          (best < 0 || blocks_[i].bytes < blocks_[best].bytes))
        best = i;
    return best < 0 ? Block{nullptr, 0} : remove(best);
  }
  // Removes the oldest into `dropped` until `bytes` more fit, unless they never will; returns how many.
  int make_room(size_t bytes, Block* dropped) {
    if (bytes > limit_) return 0;
    int n = 0;
    while (count_ && (bytes_ + bytes > limit_ || count_ == most)) dropped[n++] = remove(0);
    return n;
  }
  bool keep(Block block) {
    if (block.bytes > limit_) return false;
    blocks_[count_++] = block;
    bytes_ += block.bytes;
    return true;
  }
  void limit(size_t bytes) { limit_ = bytes; }
  size_t bytes() const { return bytes_; }

 private:
  Block remove(int i) {
    const Block block = blocks_[i];
    std::copy(blocks_ + i + 1, blocks_ + count_--, blocks_ + i);
    bytes_ -= block.bytes;
    return block;
  }

  std::atomic_flag locked_ = ATOMIC_FLAG_INIT;
  Block blocks_[most];
  int count_ = 0;
  size_t bytes_ = 0, limit_ = 0;
} kept;

void drop(const Block* dropped, int count) {
  for (int i = 0; i < count; i++) unmap(dropped[i]);
}

}  // namespace

void* take_result_memory(size_t& bytes) {
  bytes = std::max(huge_page, (bytes + huge_page - 1) / huge_page * huge_page);
  if (const Kept::Lock lock(kept); lock) {
    const Block block = kept.take(bytes);
    if (block.data) {
      bytes = block.bytes;
      return block.data;
    }
  }
  return map(bytes);
}

void give_back_result_memory(void* data, size_t bytes) {
  const Block block{data, bytes};
  Block dropped[Kept::most];
  int count = 0;
  bool is_kept = false;
  if (const Kept::Lock lock(kept); lock) {
    count = kept.make_room(bytes, dropped);
    is_kept = kept.keep(block);
  }
  drop(dropped, count);
  if (!is_kept) unmap(block);
}

void limit_kept_result_memory(size_t bytes) {
  Block dropped[Kept::most];
  int count = 0;
  if (const Kept::Lock lock(kept); lock) {
    kept.limit(bytes);
    count = kept.make_room(0, dropped);
  }
  drop(dropped, count);
}

size_t kept_result_memory() {
  const Kept::Lock lock(kept);
  return lock ? kept.bytes() : 0;
}

}  // namespace fastattn
