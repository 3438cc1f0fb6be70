#include "low_rank.h"

#include <algorithm>

#include "dispatch.h"
#include "thread_pool.h"

namespace pymerge {

void AddLowRank(const LowRankJob& job, int64_t n, int threads) {
  // Rows enough per task that copying the right factor costs little.
  const int64_t chunk = std::max<int64_t>(kChunk, 64 * job.columns);
  ParallelFor((n + chunk - 1) / chunk, threads,
              [&](int64_t c, int) { CurrentKernels().low_rank(job, c * chunk, std::min((c + 1) * chunk, n)); });
}

}  // namespace pymerge
