#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "digits.h"

namespace pymerge {

template <class Key>
Bracket BracketOfSample(const Key* sample, int64_t size, double share, double width) {
  const double last = static_cast<double>(size - 1), rank = share * static_cast<double>(size);
  const double margin = width * std::sqrt(rank * (1 - share)) + 2;  // 2: where few keys of the sample are above or below, they say little
  const auto at = [&](double from_zero) {
    int64_t k = static_cast<int64_t>(std::clamp(from_zero, 0.0, last)) + 1;
    return KthKey(sample, size, &k);
  };
  Bracket bracket{0, at(rank), std::numeric_limits<Key>::max()};
  if (rank - margin > 0) bracket.hi = at(rank - margin);
  if (rank + margin < last) bracket.lo = at(rank + margin);
  return bracket;
}

template Bracket BracketOfSample(const int32_t*, int64_t, double, double);
template Bracket BracketOfSample(const int64_t*, int64_t, double, double);

}  // namespace pymerge
