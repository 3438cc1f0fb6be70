#include "diagnose.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "thread_pool.h"

namespace pymerge {

int DiagnoseSums(int models) { return (models + 1) * (models + 2) / 2 + models + 1; }
int DiagnoseCounts(int models) { return 4 * models + models * (models - 1); }

void DiagnoseTensor(DiagnoseJob job, int threads, double* sums, int64_t* counts) {
  const int models = job.in.models, own_counts = DiagnoseCounts(models);
  job.sums = DiagnoseSums(models);
  const int64_t pieces = (job.in.n + kDiagnosePiece - 1) / kDiagnosePiece;
  constexpr size_t kLine = 64;
  const size_t memory = static_cast<size_t>(job.sums) * 64 * sizeof(double) + static_cast<size_t>(models + 3) * kDiagnoseRun;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, pieces, kMaxThreads})));
  std::vector<double> piece_sums(static_cast<size_t>(pieces * job.sums));
  std::vector<unsigned char> scratch(memory * static_cast<size_t>(threads) + kLine);
  unsigned char* aligned = scratch.data() + (kLine - reinterpret_cast<uintptr_t>(scratch.data()) % kLine);
  std::vector<int64_t> piece_counts(static_cast<size_t>(pieces * own_counts));
  ParallelFor(pieces, threads, [&](int64_t i, int slot) {
    CurrentKernels().diagnose(job, i * kDiagnosePiece, std::min((i + 1) * kDiagnosePiece, job.in.n),
                              aligned + memory * static_cast<size_t>(slot), piece_sums.data() + i * job.sums,
                              piece_counts.data() + i * own_counts);
  });
  for (int64_t i = 0; i < pieces; ++i) {
    for (int s = 0; s < job.sums; ++s) sums[s] += piece_sums[static_cast<size_t>(i * job.sums + s)];
    for (int c = 0; c < own_counts; ++c) {
      const int64_t count = piece_counts[static_cast<size_t>(i * own_counts + c)];
      const bool largest = c >= 2 * models && c < 3 * models;
      counts[c] = largest ? std::max(counts[c], count) : counts[c] + count;
    }
  }
}

}  // namespace pymerge
