// Whole-tensor operations: from plain arguments to kernels run over chunks by the pool.
#pragma once

#include <cstdint>

#include "types.h"

namespace pymerge {

enum class Rescale : int { kNone, kDensity, kNorm };

// What has to be found out about a tensor before MergeJob is complete.
struct MergePlan {
  MergeJob job;
  int64_t counts[kMaxModels];  // elements to keep by magnitude, unless `selected`
  double density[kMaxModels];
  bool selected = false;  // job.selection is given
  bool rescaled = false;  // job.rescale is given
  bool tie_all = false;
  bool majority = false;  // tied elections go to the tensor's majority, job.zero_vote is to be found
  Rescale rescale = Rescale::kNone;
};

// Of an element.
int64_t BytesOf(DType dtype);

// Merges one tensor; false when some delta is not finite. plan.job is completed on the way.
bool MergeTensor(MergePlan* plan, int threads);

// Elections that the positive side wins minus those that the negative side wins.
int64_t VoteBalance(MergePlan* plan, int threads);

// Interpolates; false when some difference is not finite.
bool LerpTensor(LerpJob job, int threads);

// Adds the L1 norms of each model's delta (sums[2 * m]) and of its kept part (sums[2 * m + 1]), block by block in order: called for the
// parts of a tensor one after the other, it gives the sums of the whole. The selection must be given.
void AddAbsSums(const MergeJob& job, int threads, double* sums);

// Adds a·a, b·b and a·b likewise.
void DotProducts(int64_t n, const Input& a, const Input& b, bool f64, int threads, double* sums);

}  // namespace pymerge
