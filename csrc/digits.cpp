#include "digits.h"

#include <algorithm>
#include <limits>
#include <vector>

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
  int64_t rank = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(k) / static_cast<double>(n) * static_cast<double>(size)));
  return KthDigit(sample, size, &rank);
}

}  // namespace

int KthDigit(const int16_t* digits, int64_t n, int64_t* k) {
  const Kernels& kernels = CurrentKernels();
  int lo = std::numeric_limits<int16_t>::min() - 1, hi = std::numeric_limits<int16_t>::max();  // k or more are above lo, fewer above hi
  int64_t above_hi = 0;
  const auto probe = [&](int bound) {
    const int64_t above = kernels.count_above(digits, n, bound);
    if (above >= *k) {
      lo = bound;
    } else {
      hi = bound;
      above_hi = above;
    }
  };
  if (n >= 2 * kLeastSample) {
    const int guess = Guess(digits, n, *k), least = lo, most = hi;
    // Away from the guess by longer and longer steps, until the k-th has been passed.
    for (int step = 0; hi == most && guess + step < hi; step = 2 * step + 1) probe(guess + step);
    for (int step = 1; lo == least && hi - step > lo; step *= 2) probe(hi - step);
  }
  while (hi - lo > 1) probe(lo + (hi - lo) / 2);
  *k -= above_hi;
  return hi;
}

template <class Key>
Key KthKey(const Key* keys, int64_t n, int64_t* k) {
  // Kept: fresh memory's page faults cost more than a selection.
  static thread_local std::vector<int16_t> digits;
  static thread_local std::vector<int32_t> equal;
  static thread_local std::vector<Key> left;
  if (digits.size() < static_cast<size_t>(n)) {
    digits.resize(static_cast<size_t>(n));
    equal.resize(static_cast<size_t>(n + kFoundMore));
  }
  Key key = 0;
  int offset = 0;  // the upper digit is not negative as it is
  for (int shift = 8 * sizeof(Key) - 16; shift >= 0; shift -= 16, offset = kDigitOffset) {
    for (int64_t i = 0; i < n; ++i) digits[i] = static_cast<int16_t>((keys[i] >> shift) - offset);
    const int digit = KthDigit(digits.data(), n, k);
    key |= static_cast<Key>(digit + offset) << shift;
    if (!shift) break;
    const int64_t count = CurrentKernels().find_equal(digits.data(), n, digit, equal.data());
    if (left.size() < static_cast<size_t>(count)) left.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) left[i] = keys[equal[i]];
    keys = left.data();
    n = count;
  }
  return key;
}

template int32_t KthKey(const int32_t*, int64_t, int64_t*);
template int64_t KthKey(const int64_t*, int64_t, int64_t*);

}  // namespace pymerge
