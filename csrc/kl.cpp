#include "kl.h"

#include <algorithm>

#include "dispatch.h"
#include "thread_pool.h"

namespace pymerge {
namespace {

// A row is never divided, so that results do not depend on the number of threads; short rows are handed out many at a time, because a
// task costs about as much as this many elements.
constexpr int64_t kElementsPerTask = 1 << 14;

void ForEachRows(const KlJob& job, int threads, void (*kernel)(const KlJob&, int64_t, int64_t)) {
  const int64_t step = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, job.vocab));
  ParallelFor((job.rows + step - 1) / step, threads, [&](int64_t i, int) { kernel(job, i * step, std::min((i + 1) * step, job.rows)); });
}

}  // namespace

void KlForwardRows(const KlJob& job, int threads) { ForEachRows(job, threads, CurrentKernels().kl_forward); }

void KlBackwardRows(const KlJob& job, int threads) { ForEachRows(job, threads, CurrentKernels().kl_backward); }

}  // namespace pymerge
