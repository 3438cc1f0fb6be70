#include "merge_many.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <numeric>

#include "dispatch.h"
#include "select.h"
#include "thread_pool.h"

namespace pymerge {
namespace {

// Calls work(begin, end, threads) with indices [begin, end) of tensors, so that each of sizes.size() is among them once; tensor i is of
// sizes[i] elements, and at least `bytes_each` are moved per element.
void ForEachGroup(const std::vector<int64_t>& sizes, int64_t bytes_each, int threads,
                  const std::function<void(const size_t*, const size_t*, int)>& work) {
  // Elements that a thread takes at a time, so that taking them costs nothing beside the work; and how many such takes even out a region's end.
  constexpr int64_t kItem = kChunk / 4, kItemsPerThread = 16;
  int64_t total = 0;
  for (int64_t n : sizes) total += n;
  const int useful = UsefulThreads(total * bytes_each, threads);
  // One thread with a larger tensor would keep the others waiting at the end.
  const int64_t largest = useful == 1 ? std::numeric_limits<int64_t>::max() : std::max(kChunk, total / (kItemsPerThread * useful));
  std::vector<size_t> small, starts;
  small.reserve(sizes.size());
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
    const size_t end = static_cast<size_t>(item) + 1 < starts.size() ? starts[item + 1] : small.size();
    work(small.data() + starts[item], small.data() + end, 1);
  });
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > largest) work(&i, &i + 1, threads);
  }
}

template <class T>
std::vector<int64_t> SizesOf(const std::vector<T>& tensors) {
  std::vector<int64_t> sizes(tensors.size());
  std::transform(tensors.begin(), tensors.end(), sizes.begin(), [](const T& t) { return t.n; });
  return sizes;
}

std::vector<int64_t> Marked(const std::vector<uint8_t>& marks) {
  std::vector<int64_t> indices;
  for (size_t i = 0; i < marks.size(); ++i) {
    if (marks[i]) indices.push_back(static_cast<int64_t>(i));
  }
  return indices;
}

// Indices of the tensors for which good(tensor, threads) is false.
template <class T, class F>
std::vector<int64_t> Failing(const std::vector<T>& tensors, int64_t bytes_each, int threads, F&& good) {
  std::vector<uint8_t> bad(tensors.size());
  ForEachGroup(SizesOf(tensors), bytes_each, threads, [&](const size_t* i, const size_t* end, int workers) {
    for (; i != end; ++i) bad[*i] = !good(tensors[*i], workers);
  });
  return Marked(bad);
}

void Copy(const std::vector<Selection>& from, Selection* to) { std::copy(from.begin(), from.end(), to); }

// `start`: index of the tensor's first element among those of all tensors. `plan` is `shared`, or was it before it merged another tensor.
void Complete(MergePlan* plan, const MergePlan& shared, const ManyTensor& tensor, int64_t start, int threads) {
  MergeJob& job = plan->job;
  job.in.n = tensor.n;
  job.in.f64 = tensor.f64;
  job.in.base = tensor.base;
  const size_t models = static_cast<size_t>(job.in.models);
  std::copy(tensor.models, tensor.models + models, job.in.model);
  job.out = tensor.out;
  job.tensor_id = tensor.tensor_id;
  job.zero_vote = shared.job.zero_vote;
  plan->selected = shared.selected;
  if (plan->selected) {
    for (size_t m = 0; m < models; ++m) job.selection[m] = {shared.job.selection[m].key, shared.job.selection[m].cut - start};
  } else if (job.sparsify == Sparsify::kBand) {
    const int64_t *kept = tensor.counts, *larger = kept + models;
    Copy(Select({job.in}, {kept, larger}, plan->tie_all, threads), job.selection);
    Copy(Select({job.in}, {larger, larger + models}, plan->tie_all, threads), job.larger);
    plan->selected = true;
  } else if (job.sparsify == Sparsify::kMagnitude) {
    std::copy(tensor.counts, tensor.counts + models, plan->counts);
  }
}

// Calls work(plan, i, threads) with the completed plan of each tensor. A plan is large: one serves many tensors.
template <class F>
void ForEachPlan(const MergePlan& shared, const std::vector<ManyTensor>& tensors, int64_t bytes_each, int threads, F&& work) {
  const std::vector<int64_t> sizes = SizesOf(tensors);
  std::vector<int64_t> starts(sizes.size() + 1);
  std::partial_sum(sizes.begin(), sizes.end(), starts.begin() + 1);
  ForEachGroup(sizes, bytes_each, threads, [&](const size_t* i, const size_t* end, int workers) {
    MergePlan plan = shared;
    for (; i != end; ++i) {
      Complete(&plan, shared, tensors[*i], starts[*i], workers);
      work(&plan, *i, workers);
    }
  });
}

constexpr int64_t kLeastBytes = 2;  // of an element

}  // namespace

std::vector<int64_t> MergeMany(const MergePlan& shared, const ManyTensors& all, int threads) {
  std::vector<uint8_t> bad(all.tensors.size());
  ForEachPlan(shared, all.tensors, kLeastBytes * (shared.job.in.models + 2), threads,
              [&](MergePlan* plan, size_t i, int workers) { bad[i] = !MergeTensor(plan, workers); });
  return Marked(bad);
}

int64_t VoteBalanceMany(const MergePlan& shared, const ManyTensors& all, int threads) {
  std::atomic<int64_t> balance{0};
  ForEachPlan(shared, all.tensors, kLeastBytes * (shared.job.in.models + 1), threads,
              [&](MergePlan* plan, size_t, int workers) { balance += VoteBalance(plan, workers); });
  return balance;
}

std::vector<int64_t> LerpMany(const std::vector<LerpJob>& jobs, int threads) {
  return Failing(jobs, 3 * kLeastBytes, threads, [](const LerpJob& job, int workers) { return LerpTensor(job, workers); });
}

std::vector<int64_t> FindNonFinite(const std::vector<Values>& tensors, int threads) {
  return Failing(tensors, kLeastBytes, threads, [](const Values& t, int workers) {
    std::atomic<bool> finite{true};
    ParallelFor((t.n + kChunk - 1) / kChunk, workers, [&](int64_t c, int) {
      if (!finite.load(std::memory_order_relaxed)) return;
      if (!CurrentKernels().finite(t.data, c * kChunk, std::min((c + 1) * kChunk, t.n))) finite = false;
    });
    return finite.load();
  });
}

}  // namespace pymerge
