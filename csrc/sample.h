// Where a sample of a tensor looks.
#pragma once

#include <cstdint>

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

}  // namespace pymerge
