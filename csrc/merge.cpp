#include "merge.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "dispatch.h"
#include "one_pass.h"
#include "select.h"
#include "thread_pool.h"

namespace pymerge {
namespace {

int64_t BytesMoved(const Deltas& in) {
  int64_t bytes = in.base.data ? BytesOf(in.base.dtype) : 0;
  for (int m = 0; m < in.models; ++m) bytes += BytesOf(in.model[m].dtype);
  return bytes * in.n;
}

// Above this a result would push everything else out of the caches, and is not there any more when it is read: store past them.
constexpr int64_t kStreamBytes = 4 << 20;

template <class F>
void ForEachChunk(int64_t n, int64_t bytes, int threads, F&& f) {
  ParallelFor((n + kChunk - 1) / kChunk, UsefulThreads(bytes, threads),
              [&](int64_t c, int) { f(c * kChunk, std::min((c + 1) * kChunk, n)); });
}

void ChooseFactors(MergePlan* plan, int threads) {
  MergeJob& job = plan->job;
  if (plan->rescaled) return;
  const bool sparse = job.sparsify != Sparsify::kNone;
  double sums[2 * kMaxModels] = {};
  if (sparse && plan->rescale == Rescale::kNorm) AddAbsSums(job, threads, sums);
  for (int m = 0; m < job.in.models; ++m) {
    job.rescale[m] = 1.0;
    if (sparse && plan->rescale == Rescale::kDensity && plan->density[m] > 0) job.rescale[m] = 1.0 / plan->density[m];
    if (sums[2 * m + 1] > 0) job.rescale[m] = sums[2 * m] / sums[2 * m + 1];
  }
}

void ChooseElements(MergePlan* plan, int threads) {
  MergeJob& job = plan->job;
  if (job.sparsify == Sparsify::kMagnitude && !plan->selected) {
    const std::vector<int64_t> counts(plan->counts, plan->counts + job.in.models);
    const std::vector<Selection> chosen = Select({job.in}, counts, plan->tie_all, threads);
    std::copy(chosen.begin(), chosen.end(), job.selection);
  }
  ChooseFactors(plan, threads);
}

int64_t CountBalance(const MergeJob& job, int threads) {
  std::atomic<int64_t> balance{0};
  ForEachChunk(job.in.n, BytesMoved(job.in), threads,
               [&](int64_t begin, int64_t end) { balance += CurrentKernels().balance(job, begin, end); });
  return balance;
}

}  // namespace

int64_t BytesOf(DType dtype) { return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2; }

int64_t VoteBalance(MergePlan* plan, int threads) {
  ChooseElements(plan, threads);
  return CountBalance(plan->job, threads);
}

bool MergeTensor(MergePlan* plan, int threads) {
  MergeJob& job = plan->job;
  job.stream = job.in.n * BytesOf(job.out.dtype) >= kStreamBytes;
  bool finite_in_one = true;
  if (MergeInOnePass(plan, UsefulThreads(BytesMoved(job.in), threads), &finite_in_one)) return finite_in_one;
  ChooseElements(plan, threads);
  if (plan->majority) job.zero_vote = CountBalance(job, threads) > 0 ? ZeroVote::kPositive : ZeroVote::kNegative;
  std::atomic<bool> finite{true};
  ForEachChunk(job.in.n, BytesMoved(job.in), threads, [&](int64_t begin, int64_t end) {
    if (!CurrentKernels().merge(job, begin, end)) finite = false;
  });
  return finite;
}

void AddAbsSums(const MergeJob& job, int threads, double* sums) {
  const size_t blocks = static_cast<size_t>((job.in.n + kSumBlock - 1) / kSumBlock);
  std::vector<double> full(blocks), kept(blocks);
  for (int m = 0; m < job.in.models; ++m) {
    ForEachChunk(job.in.n, BytesMoved(job.in), threads,
                 [&](int64_t begin, int64_t end) { CurrentKernels().abs_sums(job, m, begin, end, full.data(), kept.data()); });
    for (size_t b = 0; b < blocks; ++b) {
      sums[2 * m] += full[b];
      sums[2 * m + 1] += kept[b];
    }
  }
}

bool LerpTensor(LerpJob job, int threads) {
  const int64_t bytes = BytesOf(job.a.dtype) + BytesOf(job.b.dtype) + BytesOf(job.out.dtype);
  job.stream = job.out.data != job.a.data && job.n * BytesOf(job.out.dtype) >= kStreamBytes;
  std::atomic<bool> finite{true};
  ForEachChunk(job.n, bytes * job.n, threads, [&](int64_t begin, int64_t end) {
    if (!CurrentKernels().lerp(job, begin, end)) finite = false;
  });
  return finite;
}

void DotProducts(int64_t n, const Input& a, const Input& b, bool f64, int threads, double* sums) {
  std::vector<double> blocks(static_cast<size_t>(3 * ((n + kSumBlock - 1) / kSumBlock)));
  ForEachChunk(n, (BytesOf(a.dtype) + BytesOf(b.dtype)) * n, threads,
               [&](int64_t begin, int64_t end) { CurrentKernels().dots(a, b, f64, begin, end, blocks.data()); });
  for (size_t i = 0; i < blocks.size(); ++i) sums[i % 3] += blocks[i];
}

}  // namespace pymerge
