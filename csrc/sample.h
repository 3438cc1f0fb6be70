// What a sample of a tensor says of its k-th magnitude.
#pragma once

#include <cstdint>

#include "types.h"

namespace pymerge {

// Calls visit(r, begin) for each of `runs` runs of `run` elements, one in each of as many equal parts of n elements, at a place in it that
// follows no pattern of the data's but is always the same.
template <class F>
void ForEachRun(int64_t n, int64_t run, int64_t runs, F&& visit) {
  const int64_t stride = n / runs;
  uint64_t hash = 0x9E3779B97F4A7C15u;
  for (int64_t r = 0; r < runs; ++r) {
    hash ^= hash << 13, hash ^= hash >> 7, hash ^= hash << 17;
    visit(r, r * stride + static_cast<int64_t>(hash % static_cast<uint64_t>(stride - run + 1)));
  }
}

// Where the k-th largest of n keys is, k = share * n, from a sample of `size` of them: mid is the sample's key at that
// rank, lo and hi are those `width` standard deviations of the rank among independent elements away, or the least and the largest key there
// can be. A wider bracket misses the k-th more rarely, and holds more keys. For Key int32_t and int64_t.
template <class Key>
Bracket BracketOfSample(const Key* sample, int64_t size, double share, double width);

}  // namespace pymerge
