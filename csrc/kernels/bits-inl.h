// The bits of a word, without a branch on how many there are.
#pragma once

#include <cstdint>

#include "types.h"

namespace pymerge {
namespace PYMERGE_TARGET {

// Calls visit(n, i) with the n-th bit's place for each bit that is set, n = 0, 1, ..., and then maybe for an n and i of no meaning, n less than
// kFoundMore more than there are. Returns how many there are.
template <class F>
inline int ForEachBit(uint64_t bits, F&& visit) {
  const int count = __builtin_popcountll(bits);
  for (int n = 0; n < kFoundMore; ++n, bits &= bits - 1) visit(n, __builtin_ctzll(bits | 1ull << 63));
  for (int n = kFoundMore; bits; ++n, bits &= bits - 1) visit(n, __builtin_ctzll(bits));
  return count;
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
