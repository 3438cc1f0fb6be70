#include "sample.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace pymerge {

template <class Key>
Bracket BracketOfSample(Key* sample, int64_t size, double share, double width) {
  const double last = static_cast<double>(size - 1), rank = share * static_cast<double>(size);
  const double margin = width * std::sqrt(rank * (1 - share)) + 2;  // 2: where few keys of the sample are above or below, they say little
  const auto nth = [&](double r, Key* first, Key* end) {
    Key* at = sample + static_cast<int64_t>(std::clamp(r, 0.0, last));
    std::nth_element(first, at, end, std::greater<Key>());
    return at;
  };
  Key* const mid = nth(rank, sample, sample + size);
  Bracket bracket{0, *mid, std::numeric_limits<Key>::max()};
  if (rank - margin > 0) bracket.hi = *nth(rank - margin, sample, mid + 1);
  if (rank + margin < last) bracket.lo = *nth(rank + margin, mid, sample + size);
  return bracket;
}

template Bracket BracketOfSample(int32_t*, int64_t, double, double);
template Bracket BracketOfSample(int64_t*, int64_t, double, double);

}  // namespace pymerge
