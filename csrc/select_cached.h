// Exact selection of the k largest magnitudes in a tensor that fits in the caches.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace pymerge {

constexpr int64_t kMostCached = 1 << 21;  // elements; from there on TIES takes a single pass where it can (one_pass.h)

// Select (select.h) over one tensor of kMostCached elements at most; a thread takes a model at a time.
std::vector<Selection> SelectCached(const Deltas& in, const std::vector<int64_t>& counts, bool tie_all, int threads);

}  // namespace pymerge
