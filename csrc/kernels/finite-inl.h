// Whether a range has no NaN and no infinity: EMA looks at a model before it changes anything.
#pragma once

#include "kernels/convert-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

template <class R, class T>
bool FiniteRun(const T* x, int64_t n) {
  using L = typename LanesFor<R>::Type;
  using S = ScalarLanes<R>;
  auto largest = L::SetKey(0);
  auto rest = S::SetKey(0);
  int64_t i = 0;
  for (; i + L::kLanes <= n; i += L::kLanes) largest = L::Max(largest, L::KeysOf(L::Load(x + i)));
  for (; i < n; ++i) rest = S::Max(rest, S::KeysOf(S::Load(x + i)));
  return L::ReduceMax(largest) < KeyOf<R>::kInfinity && rest < KeyOf<R>::kInfinity;
}

bool Finite(const Input& in, int64_t begin, int64_t end) {
  switch (in.dtype) {
    case DType::kF32: return FiniteRun<float>(At<float>(in, begin), end - begin);
    case DType::kBF16: return FiniteRun<float>(At<Bf16>(in, begin), end - begin);
    case DType::kF16: return FiniteRun<float>(At<F16>(in, begin), end - begin);
    case DType::kF64: break;
  }
  return FiniteRun<double>(At<double>(in, begin), end - begin);
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
