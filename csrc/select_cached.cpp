// Of so few elements passes cost little: digits.h finds the k-th key by several. The first digit leaves, of normal deltas in fp32 computations,
// half a percent of the elements, and only of those the other digits are made.
#include "select_cached.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "arena.h"
#include "digits.h"
#include "dispatch.h"
#include "thread_pool.h"

namespace pymerge {
namespace {

Selection SelectOne(const Deltas& in, int model, int64_t k, bool tie_all) {
  if (k <= 0 || in.n == 0) return {std::numeric_limits<int64_t>::max(), -1};
  if (k >= in.n) return {0, in.n - 1};
  // Kept: fresh memory's page faults cost more than a selection.
  static thread_local std::vector<int16_t> digit_memory;
  static thread_local std::vector<int32_t> left_memory, equal_memory;
  const Kernels& kernels = CurrentKernels();
  int16_t* digits = Room(&digit_memory, in.n);
  kernels.upper_digits(in, model, 0, in.n, digits);
  int shift = in.f64 ? 48 : 16;
  RankedDigit kth = KthDigit(digits, in.n, k);
  int64_t key = int64_t{kth.digit} << shift;
  // Elements whose keys have the digits found so far, in order.
  int32_t* left = Room(&left_memory, kth.equal + kFoundMore);
  int64_t n = kernels.find_equal(digits, in.n, kth.digit, left);
  while (shift) {
    shift -= 16;
    kernels.digits_at(in, model, left, n, shift, digits);
    kth = KthDigit(digits, n, kth.rank);
    key |= int64_t{kth.digit + kDigitOffset} << shift;
    int32_t* equal = Room(&equal_memory, kth.equal + kFoundMore);
    n = kernels.find_equal(digits, n, kth.digit, equal);
    for (int64_t i = 0; i < n; ++i) left[i] = left[equal[i]];
  }
  return {key, tie_all ? in.n - 1 : left[kth.rank - 1]};
}

}  // namespace

std::vector<Selection> SelectCached(const Deltas& in, const std::vector<int64_t>& counts, bool tie_all, int threads) {
  std::vector<Selection> result(counts.size());
  ParallelFor(static_cast<int64_t>(counts.size()), threads, [&](int64_t m, int) {
    result[static_cast<size_t>(m)] = SelectOne(in, static_cast<int>(m), counts[static_cast<size_t>(m)], tie_all);
  });
  return result;
}

}  // namespace pymerge
