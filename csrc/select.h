// Exact selection of the k largest magnitudes, over one tensor or over many taken together.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace pymerge {

// For each model m, what its counts[m] largest deltas are. `tensors` all have the same models and compute dtype; flat indices run through
// them in order. tie_all keeps everything at the k-th magnitude instead of the lowest indices.
std::vector<Selection> Select(const std::vector<Deltas>& tensors, const std::vector<int64_t>& counts, bool tie_all, int threads);

// Threads worth waking for work that moves this many bytes.
int UsefulThreads(int64_t bytes, int threads);

}  // namespace pymerge
