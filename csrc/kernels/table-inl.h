// The kernels of the target that includes this file.
#pragma once

#include "kernels/diagnose-inl.h"
#include "kernels/digits-inl.h"
#include "kernels/finite-inl.h"
#include "kernels/kl-inl.h"
#include "kernels/lerp-inl.h"
#include "kernels/low_rank-inl.h"
#include "kernels/merge-inl.h"
#include "kernels/one_pass-inl.h"
#include "kernels/reduce-inl.h"
#include "kernels/select-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

inline constexpr Kernels MakeTable(const char* name) {
  return {name, Merge, Balance, Keys, Count, UpperDigits, DigitsAt, CountAbove, FindEqual, MergeCounting, MergeElements, AbsSums,
          Dots, Lerp, Finite, KlForward, KlBackward, LowRank, Diagnose};
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
