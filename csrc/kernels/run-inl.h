// What a merge kernel has to know about a run of elements.
#pragma once

#include "kernels/convert-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

constexpr int kBlock = 1024;  // elements that keep bits are drawn for at a time

// Bernoulli keep bits of one block, and one word more so that a tail may read a whole word.
struct KeepBlock {
  uint64_t word[kMaxModels][kBlock / 64 + 1];
};

// Everything about a run of elements that does not change within it.
template <class L>
struct Run {
  using R = typename L::Real;
  using Key = typename L::Key;
  int models;
  Key above[kMaxModels];  // kept by magnitude: key > above
  Key larger[kMaxModels];  // left out of a band: key > larger
  R weight[kMaxModels];
  R unit[kMaxModels];  // what a kept model adds to the divisor
  R rescale[kMaxModels];
  R total;  // divisor without an election
  R scale;
  bool rescaled, vote_weighted, divided, count_kept;
  bool ones;  // weights and scale are all 1
  ZeroVote zero_vote;
  const KeepBlock* keep;
};

template <class L>
inline Run<L> MakeRun(const MergeJob& job) {
  using R = typename L::Real;
  Run<L> run;
  run.models = job.in.models;
  run.scale = static_cast<R>(job.scale);
  run.rescaled = false;
  run.ones = run.scale == R(1);
  run.vote_weighted = job.vote_weighted;
  run.divided = job.divisor != Divisor::kNone;
  run.count_kept = job.divisor == Divisor::kCount;
  run.zero_vote = job.zero_vote;
  run.keep = nullptr;
  run.total = R(0);
  for (int m = 0; m < run.models; ++m) {
    run.weight[m] = static_cast<R>(job.weight[m]);
    run.unit[m] = run.count_kept ? R(1) : run.weight[m];
    run.rescale[m] = static_cast<R>(job.rescale[m]);
    run.rescaled |= run.rescale[m] != R(1);
    run.ones &= run.weight[m] == R(1);
    run.total += run.weight[m];
    run.above[m] = run.larger[m] = -1;
  }
  if (run.total == R(0)) run.total = R(1);
  return run;
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
