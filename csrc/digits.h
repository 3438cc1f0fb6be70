// The k-th largest of many numbers without a branch on any of them: digit by digit of 16 bits, a digit by counting how many are above a bound, of
// which vectors take 32 or 16 at a time. Ranks count from 1.
#pragma once

#include <cstdint>

namespace pymerge {

// A digit, how many are equal to it, and the rank among those of the one that was asked for.
struct RankedDigit {
  int digit;
  int64_t equal, rank;
};

// The k-th largest of n digits, 0 < k <= n.
RankedDigit KthDigit(const int16_t* digits, int64_t n, int64_t k);

// The k-th largest of n keys, which are not negative; then *k is its rank among those equal to it. For Key int32_t and int64_t.
template <class Key>
Key KthKey(const Key* keys, int64_t n, int64_t* k);

}  // namespace pymerge
