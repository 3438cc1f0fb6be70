// Linear interpolation: WiSE-FT, and EMA in place.
#pragma once

#include "kernels/convert-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

template <class L, class T>
inline void LerpRun(const LerpJob& job, const T* a, const T* b, T* out, int64_t count, bool stream) {
  const auto weight = L::Set(static_cast<typename L::Real>(job.weight));
  for (int64_t i = 0; i < count; i += L::kLanes) {
    const auto x = L::Load(a + i), y = L::Load(b + i);
    const auto step = L::Mul(L::Sub(y, x), weight);
    const auto result = job.near_a ? L::Add(x, step) : L::Sub(y, step);
    if (stream) {
      L::Stream(out + i, result);
    } else {
      L::Store(out + i, result);
    }
  }
}

template <class L>
void LerpThroughScratch(const LerpJob& job, int64_t begin, int64_t end) {
  using R = typename L::Real;
  constexpr int kPiece = 1024;
  alignas(64) R a[kPiece] = {}, b[kPiece] = {};
  for (int64_t i = begin; i < end; i += kPiece) {
    const int64_t n = end - i < kPiece ? end - i : kPiece;
    Widen(job.a, i, n, a);
    Widen(job.b, i, n, b);
    LerpRun<L, R>(job, a, b, a, (n + L::kLanes - 1) / L::kLanes * L::kLanes, false);
    Narrow(a, i, n, job.out);
  }
}

template <class L, class T>
void LerpDirect(const LerpJob& job, int64_t begin, int64_t end) {
  const int64_t whole = (end - begin) / L::kLanes * L::kLanes;
  T* out = static_cast<T*>(job.out.data) + begin;
  LerpRun<L, T>(job, At<T>(job.a, begin), At<T>(job.b, begin), out, whole, job.stream && Streamable<L>(out));
  L::Fence();
  LerpThroughScratch<L>(job, begin + whole, end);
}

void Lerp(const LerpJob& job, int64_t begin, int64_t end) {
  const bool uniform = job.a.dtype == job.b.dtype && job.a.dtype == job.out.dtype;
  if (job.f64) {
    if (uniform && job.out.dtype == DType::kF64) return LerpDirect<ScalarLanes<double>, double>(job, begin, end);
    return LerpThroughScratch<ScalarLanes<double>>(job, begin, end);
  }
  if (!uniform) return LerpThroughScratch<Lanes>(job, begin, end);
  WithStorage(job.out.dtype, true, [&](auto storage) {
    LerpDirect<Lanes, typename decltype(storage)::Type>(job, begin, end);
    return 0;
  });
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
