// Linear interpolation: WiSE-FT, and EMA in place.
#pragma once

#include "kernels/convert-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

// Interpolates `count` elements, a multiple of kLanes. Returns the largest key of any difference.
template <class L, class T>
inline typename L::Key LerpRun(const LerpJob& job, const T* a, const T* b, T* out, int64_t count, bool stream) {
  const auto weight = L::Set(static_cast<typename L::Real>(job.weight));
  auto largest = L::SetKey(0);
  for (int64_t i = 0; i < count; i += L::kLanes) {
    const auto x = L::Load(a + i), y = L::Load(b + i);
    const auto difference = L::Sub(y, x);
    largest = L::Max(largest, L::KeysOf(difference));
    const auto step = L::Mul(difference, weight);
    const auto result = job.near_a ? L::Add(x, step) : L::Sub(y, step);
    if (stream) {
      L::Stream(out + i, result);
    } else {
      L::Store(out + i, result);
    }
  }
  return L::ReduceMax(largest);
}

template <class L>
bool LerpThroughScratch(const LerpJob& job, int64_t begin, int64_t end) {
  using R = typename L::Real;
  constexpr int kPiece = 1024;
  alignas(64) R a[kPiece] = {}, b[kPiece] = {};
  bool finite = true;
  for (int64_t i = begin; i < end; i += kPiece) {
    const int64_t n = end - i < kPiece ? end - i : kPiece;
    const int64_t padded = (n + L::kLanes - 1) / L::kLanes * L::kLanes;
    Widen(job.a, i, n, a);
    Widen(job.b, i, n, b);
    for (int64_t j = n; j < padded; ++j) a[j] = b[j] = R(0);
    finite &= LerpRun<L, R>(job, a, b, a, padded, false) < KeyOf<R>::kInfinity;
    Narrow(a, i, n, job.out);
  }
  return finite;
}

template <class L, class T>
bool LerpDirect(const LerpJob& job, int64_t begin, int64_t end) {
  using R = typename L::Real;
  const int64_t whole = (end - begin) / L::kLanes * L::kLanes;
  T* out = static_cast<T*>(job.out.data) + begin;
  const bool stream = job.stream && Streamable<L>(out);
  const bool finite = LerpRun<L, T>(job, At<T>(job.a, begin), At<T>(job.b, begin), out, whole, stream) < KeyOf<R>::kInfinity;
  L::Fence();
  return LerpThroughScratch<L>(job, begin + whole, end) && finite;
}

bool Lerp(const LerpJob& job, int64_t begin, int64_t end) {
  const bool uniform = job.a.dtype == job.b.dtype && job.a.dtype == job.out.dtype;
  if (job.f64) {
    if (uniform && job.out.dtype == DType::kF64) return LerpDirect<ScalarLanes<double>, double>(job, begin, end);
    return LerpThroughScratch<ScalarLanes<double>>(job, begin, end);
  }
  if (!uniform) return LerpThroughScratch<Lanes>(job, begin, end);
  return WithStorage(job.out.dtype, true,
                     [&](auto storage) { return LerpDirect<Lanes, typename decltype(storage)::Type>(job, begin, end); });
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
