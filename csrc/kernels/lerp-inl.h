// Linear interpolation: WiSE-FT, and EMA in place.
#pragma once

#include "kernels/convert-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

// Interpolates `count` elements, a multiple of kLanes. Returns the largest key of any difference.
template <class L, class A, class B>
inline typename L::Key LerpRun(const LerpJob& job, const A* a, const B* b, A* out, int64_t count, bool stream) {
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

// The same for a multiple of 2 * kLanes elements, with fewer instructions for each.
template <class L, class T>
inline typename L::Key LerpPairs(const LerpJob& job, const T* a, const T* b, T* out, int64_t count, bool stream) {
  using P = Pair<L, T>;
  const auto weight = L::Set(static_cast<typename L::Real>(job.weight));
  typename L::Key largest = 0;
  for (int64_t i = 0; i < count; i += 2 * L::kLanes) {
    const P from = P::Load(a + i), to = P::Load(b + i);
    typename L::Vec difference[2], result[2];
    for (int h = 0; h < 2; ++h) {
      const auto x = from.Half(h), y = to.Half(h);
      difference[h] = L::Sub(y, x);
      const auto step = L::Mul(difference[h], weight);
      result[h] = job.near_a ? L::Add(x, step) : L::Sub(y, step);
    }
    if (L::Count(L::NotFinite(L::Add(difference[0], difference[1])))) {  // perhaps NaN, which a Pair need not round
      const auto key = LerpRun<L>(job, a + i, b + i, out + i, 2 * L::kLanes, false);
      largest = key > largest ? key : largest;
    } else if (stream) {
      P::Stream(out + i, result[0], result[1]);
    } else {
      P::Store(out + i, result[0], result[1]);
    }
  }
  return largest;
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
    finite &= LerpRun<L>(job, a, b, a, padded, false) < KeyOf<R>::kInfinity;
    Narrow(a, i, n, job.out);
  }
  return finite;
}

// `out` has a's dtype.
template <class L, class A, class B>
bool LerpDirect(const LerpJob& job, int64_t begin, int64_t end) {
  using R = typename L::Real;
  constexpr bool kPairs = std::is_same_v<A, B> && L::kLanes > 1;  // compilers make better vectors of single lanes
  constexpr int64_t kStep = kPairs ? 2 * L::kLanes : L::kLanes;
  const int64_t whole = (end - begin) / kStep * kStep;
  const A* a = At<A>(job.a, begin);
  const B* b = At<B>(job.b, begin);
  A* out = static_cast<A*>(job.out.data) + begin;
  typename L::Key largest;
  if constexpr (kPairs) {
    largest = LerpPairs<L>(job, a, b, out, whole, job.stream && Streamable<L, 2>(out));
  } else {
    largest = LerpRun<L>(job, a, b, out, whole, job.stream && Streamable<L>(out));
  }
  L::Fence();
  return LerpThroughScratch<L>(job, begin + whole, end) && largest < KeyOf<R>::kInfinity;
}

bool Lerp(const LerpJob& job, int64_t begin, int64_t end) {
  const DType a = job.a.dtype, b = job.b.dtype;
  if (a == job.out.dtype) {
    if (job.f64 && a == DType::kF64 && b == a) return LerpDirect<ScalarLanes<double>, double, double>(job, begin, end);
    if (!job.f64 && a == b) {
      return WithStorage(a, true, [&](auto storage) {
        using T = typename decltype(storage)::Type;
        return LerpDirect<Lanes, T, T>(job, begin, end);
      });
    }
    // An average in fp32 of weights in less.
    if (!job.f64 && a == DType::kF32) {
      return WithStorage(b, true, [&](auto storage) { return LerpDirect<Lanes, float, typename decltype(storage)::Type>(job, begin, end); });
    }
  }
  if (job.f64) return LerpThroughScratch<ScalarLanes<double>>(job, begin, end);
  return LerpThroughScratch<Lanes>(job, begin, end);
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
