// The same operation on many tensors: small ones a thread each, all in one parallel region; large ones all threads on one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "merge.h"

namespace pymerge {

// What sets a tensor apart from the others that are merged with it.
struct ManyTensor {
  int64_t n = 0;
  uint32_t tensor_id = 0;
  bool f64 = false;
  Output out;
  Input base;
  const Input* models = nullptr;
  const int64_t* counts = nullptr;  // of elements to keep, per model; of a band both ends' counts; none where the plan's selection holds
};

struct ManyTensors {
  std::vector<Input> inputs;  // of all models of all tensors
  std::vector<ManyTensor> tensors;
};

// Merges each tensor by `shared`, whose selection, where it has one, is of all tensors one after the other. Returns the indices of those with
// a delta that is not finite.
std::vector<int64_t> MergeMany(const MergePlan& shared, const ManyTensors& tensors, int threads);

// The sum of VoteBalance over the tensors.
int64_t VoteBalanceMany(const MergePlan& shared, const ManyTensors& tensors, int threads);

// Interpolates in each pair; returns the indices of those with a difference that is not finite.
std::vector<int64_t> LerpMany(const std::vector<LerpJob>& jobs, int threads);

struct Values {
  int64_t n = 0;
  Input data;
};

// Indices of the tensors that have a NaN or an infinity.
std::vector<int64_t> FindNonFinite(const std::vector<Values>& tensors, int threads);

}  // namespace pymerge
