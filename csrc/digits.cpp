#include "digits.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "arena.h"
#include "dispatch.h"
#include "sample.h"
#include "types.h"

namespace pymerge {
namespace {

constexpr int kRun = 32;            // digits sampled side by side: a cache line
constexpr int64_t kLeastSample = 1 << 12, kLargestSample = 1 << 14;  // of fewer than twice the least there is none

// The digit of about that rank.
int Guess(const int16_t* digits, int64_t n, int64_t k) {
  int16_t sample[kLargestSample];
  const int64_t runs = std::clamp(n / 64, kLeastSample, kLargestSample) / kRun, size = runs * kRun;
  ForEachRun(n, kRun, runs, [&](int64_t r, int64_t begin) { std::copy(digits + begin, digits + begin + kRun, sample + r * kRun); });
  const double rank = static_cast<double>(k) / static_cast<double>(n) * static_cast<double>(size);
  return KthDigit(sample, size, std::max<int64_t>(1, static_cast<int64_t>(rank))).digit;
}

}  // namespace

RankedDigit KthDigit(const int16_t* digits, int64_t n, int64_t k) {
  const Kernels& kernels = CurrentKernels();
  int lo = std::numeric_limits<int16_t>::min() - 1, hi = std::numeric_limits<int16_t>::max();  // k or more are above lo, fewer above hi
  int64_t above_lo = n, above_hi = 0;
  const auto probe = [&](int bound) {
    const int64_t above = kernels.count_above(digits, n, bound);
    if (above >= k) {
      lo = bound;
      above_lo = above;
    } else {
      hi = bound;
      above_hi = above;
    }
  };
  if (n >= 2 * kLeastSample) {
    const int guess = Guess(digits, n, k), least = lo, most = hi;
    // Away from the guess by longer and longer steps, until the k-th has been passed.
    for (int step = 0; hi == most && guess + step < hi; step = 2 * step + 1) probe(guess + step);
    for (int step = 1; lo == least && hi - step > lo; step *= 2) probe(hi - step);
  }
  while (hi - lo > 1) probe(lo + (hi - lo) / 2);
  return {hi, above_lo - above_hi, k - above_hi};
}

template <class Key>
Key KthKey(const Key* keys, int64_t n, int64_t* k) {
  // Kept: fresh memory's page faults cost more than a selection.
  static thread_local std::vector<int16_t> digit_memory;
  static thread_local std::vector<int32_t> equal_memory;
  static thread_local std::vector<Key> left_memory;
  int16_t* const digits = Room(&digit_memory, n);
  Key key = 0;
  int offset = 0;  // the upper digit is not negative as it is
  for (int shift = 8 * sizeof(Key) - 16; shift >= 0; shift -= 16, offset = kDigitOffset) {
    for (int64_t i = 0; i < n; ++i) digits[i] = static_cast<int16_t>((keys[i] >> shift) - offset);
    const RankedDigit kth = KthDigit(digits, n, *k);
    *k = kth.rank;
    key |= static_cast<Key>(kth.digit + offset) << shift;
    if (!shift) break;
    int32_t* const equal = Room(&equal_memory, kth.equal + kFoundMore);
    Key* const left = Room(&left_memory, kth.equal);
    n = CurrentKernels().find_equal(digits, n, kth.digit, equal);
    for (int64_t i = 0; i < n; ++i) left[i] = keys[equal[i]];
    keys = left;
  }
  return key;
}

template int32_t KthKey(const int32_t*, int64_t, int64_t*);
template int64_t KthKey(const int64_t*, int64_t, int64_t*);

}  // namespace pymerge
