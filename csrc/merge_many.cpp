#include "merge_many.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>

#include "dispatch.h"
#include "select.h"
#include "thread_pool.h"

namespace pymerge {
namespace {

// Calls work(i, threads) once for each tensor i of sizes[i] elements, which moves at least `bytes_each` per element.
void ForEachTensor(const std::vector<int64_t>& sizes, int64_t bytes_each, int threads, const std::function<void(size_t, int)>& work) {
  // Elements that a thread takes at a time, so that taking them costs nothing beside the work; and how many such takes even out a region's end.
  constexpr int64_t kItem = kChunk / 4, kItemsPerThread = 16;
  int64_t total = 0;
  for (int64_t n : sizes) total += n;
  const int useful = UsefulThreads(total * bytes_each, threads);
  // One thread with a larger tensor would keep the others waiting at the end.
  const int64_t largest = useful == 1 ? std::numeric_limits<int64_t>::max() : std::max(kChunk, total / (kItemsPerThread * useful));
  std::vector<size_t> small, starts;
  int64_t gathered = kItem;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > largest) continue;
    if (gathered >= kItem) {
      starts.push_back(small.size());
      gathered = 0;
    }
    small.push_back(i);
    gathered += sizes[i];
  }
  ParallelFor(static_cast<int64_t>(starts.size()), useful, [&](int64_t item, int) {
    const size_t begin = starts[item], end = static_cast<size_t>(item) + 1 < starts.size() ? starts[item + 1] : small.size();
    for (size_t i = begin; i < end; ++i) work(small[i], 1);
  });
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > largest) work(i, threads);
  }
}

template <class T>
std::vector<int64_t> SizesOf(const std::vector<T>& tensors) {
  std::vector<int64_t> sizes;
  for (const T& t : tensors) sizes.push_back(t.n);
  return sizes;
}

// Indices of the tensors for which good(i, threads) is false.
template <class T, class F>
std::vector<int64_t> Failing(const std::vector<T>& tensors, int64_t bytes_each, int threads, F&& good) {
  std::vector<uint8_t> bad(tensors.size());
  ForEachTensor(SizesOf(tensors), bytes_each, threads, [&](size_t i, int workers) { bad[i] = !good(i, workers); });
  std::vector<int64_t> failing;
  for (size_t i = 0; i < bad.size(); ++i) {
    if (bad[i]) failing.push_back(static_cast<int64_t>(i));
  }
  return failing;
}

void Copy(const std::vector<Selection>& from, Selection* to) { std::copy(from.begin(), from.end(), to); }

// `start`: index of the tensor's first element among those of all tensors. A plan is large: made where it is used.
void Complete(MergePlan* plan, const ManyTensor& tensor, int64_t start, int threads) {
  MergeJob& job = plan->job;
  job.in.n = tensor.n;
  job.in.f64 = tensor.f64;
  job.in.base = tensor.base;
  std::copy(tensor.models.begin(), tensor.models.end(), job.in.model);
  job.out = tensor.out;
  job.tensor_id = tensor.tensor_id;
  const size_t models = tensor.models.size();
  if (plan->selected) {
    for (size_t m = 0; m < models; ++m) job.selection[m].cut -= start;
  } else if (job.sparsify == Sparsify::kBand) {
    const auto larger = tensor.counts.begin() + static_cast<ptrdiff_t>(models);
    Copy(Select({job.in}, {tensor.counts.begin(), larger}, plan->tie_all, threads), job.selection);
    Copy(Select({job.in}, {larger, tensor.counts.end()}, plan->tie_all, threads), job.larger);
    plan->selected = true;
  } else {
    std::copy(tensor.counts.begin(), tensor.counts.end(), plan->counts);
  }
}

std::vector<int64_t> Starts(const std::vector<ManyTensor>& tensors) {
  std::vector<int64_t> starts;
  int64_t start = 0;
  for (const ManyTensor& t : tensors) {
    starts.push_back(start);
    start += t.n;
  }
  return starts;
}

constexpr int64_t kLeastBytes = 2;  // of an element

}  // namespace

std::vector<int64_t> MergeMany(const MergePlan& shared, const std::vector<ManyTensor>& tensors, int threads) {
  const std::vector<int64_t> starts = Starts(tensors);
  return Failing(tensors, kLeastBytes * (shared.job.in.models + 2), threads, [&](size_t i, int workers) {
    MergePlan plan = shared;
    Complete(&plan, tensors[i], starts[i], workers);
    return MergeTensor(&plan, workers);
  });
}

int64_t VoteBalanceMany(const MergePlan& shared, const std::vector<ManyTensor>& tensors, int threads) {
  const std::vector<int64_t> starts = Starts(tensors);
  std::atomic<int64_t> balance{0};
  ForEachTensor(SizesOf(tensors), kLeastBytes * (shared.job.in.models + 1), threads, [&](size_t i, int workers) {
    MergePlan plan = shared;
    Complete(&plan, tensors[i], starts[i], workers);
    balance += VoteBalance(&plan, workers);
  });
  return balance;
}

std::vector<int64_t> LerpMany(const std::vector<LerpJob>& jobs, int threads) {
  return Failing(jobs, 3 * kLeastBytes, threads, [&](size_t i, int workers) { return LerpTensor(jobs[i], workers); });
}

std::vector<int64_t> FindNonFinite(const std::vector<Values>& tensors, int threads) {
  return Failing(tensors, kLeastBytes, threads, [&](size_t i, int workers) {
    std::atomic<bool> finite{true};
    ParallelFor((tensors[i].n + kChunk - 1) / kChunk, workers, [&](int64_t c, int) {
      if (!finite.load(std::memory_order_relaxed)) return;
      if (!CurrentKernels().finite(tensors[i].data, c * kChunk, std::min((c + 1) * kChunk, tensors[i].n))) finite = false;
    });
    return finite.load();
  });
}

}  // namespace pymerge
