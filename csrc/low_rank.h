// A low-rank product added to a range of a matrix.
#pragma once

#include <cstdint>

#include "types.h"

namespace pymerge {

// Adds to all `n` elements of job.x.
void AddLowRank(const LowRankJob& job, int64_t n, int threads);

}  // namespace pymerge
