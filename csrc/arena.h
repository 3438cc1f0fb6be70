// Memory that is kept: for scratch, and for what chunks say of their keys.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "types.h"

namespace pymerge {

// Room for at least n elements in memory that only grows.
template <class T>
T* Room(std::vector<T>* memory, int64_t n) {
  if (memory->size() < static_cast<size_t>(n)) memory->resize(static_cast<size_t>(n));
  return memory->data();
}

// Collected keys of all chunks, in blocks that are allocated as needed and kept for the next call: page faults of fresh memory cost more
// than the selection itself.
template <class Key>
class Arena {
 public:
  // Copies n keys in; nullptr when there is no memory.
  const Key* Keep(const Key* keys, int64_t n) {
    constexpr int64_t kBlockKeys = 1 << 18;
    static_assert(kBlockKeys >= kChunk, "a chunk's keys must fit a block");
    if (used_ + n > kBlockKeys || blocks_.empty()) {
      if (!blocks_.empty()) ++current_;
      used_ = 0;
      if (current_ == blocks_.size()) {
        std::unique_ptr<Key[]> block(new (std::nothrow) Key[kBlockKeys]);
        if (!block) return nullptr;
        blocks_.push_back(std::move(block));
      }
    }
    Key* kept = blocks_[current_].get() + used_;
    memcpy(kept, keys, static_cast<size_t>(n) * sizeof(Key));
    used_ += n;
    return kept;
  }

  void Reset() {
    constexpr size_t kCachedBlocks = 64;
    if (blocks_.size() > kCachedBlocks) blocks_.resize(kCachedBlocks);
    current_ = 0;
    used_ = 0;
  }

  // Room for at least that many keys.
  Key* Staging(int64_t keys) { return Room(&staging_, keys); }

 private:
  std::vector<std::unique_ptr<Key[]>> blocks_;
  std::vector<Key> staging_;
  size_t current_ = 0;
  int64_t used_ = 0;
};

}  // namespace pymerge
