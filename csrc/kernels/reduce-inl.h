// Whole-tensor sums in the one order that every backend uses (docs/arithmetic.md): these are the sums of single blocks of 4096.
#pragma once

#include "kernels/convert-inl.h"
#include "kernels/philox-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

constexpr int kSumLanes = 64;

// Lane j holds the terms of index j mod 64, added in order.
struct BlockSum {
  double lane[kSumLanes] = {};

  double Fold() {
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    return lane[0];
  }
};

// kept[i] = all bits set iff element first + i, i < n <= kSumBlock, is kept; first is a multiple of kSumBlock. As wide as the data, so
// that the compiler can blend with it.
template <class R>
inline void KeptElements(const MergeJob& job, int model, int64_t first, int64_t n, const R* delta, typename KeyOf<R>::Type* kept) {
  using Key = typename KeyOf<R>::Type;
  using S = ScalarLanes<R>;
  if (job.sparsify == Sparsify::kMagnitude) {
    const Selection& s = job.selection[model];
    const Key key = s.key > KeyOf<R>::kMax ? KeyOf<R>::kMax : static_cast<Key>(s.key);
    const int64_t ties = s.cut + 1 - first < n ? s.cut + 1 - first : n;  // elements before it are kept at the threshold itself too
    int64_t i = 0;
    for (; i < ties; ++i) kept[i] = -Key{S::KeysOf(delta[i]) >= key};
    for (; i < n; ++i) kept[i] = -Key{S::KeysOf(delta[i]) > key};
  } else {
    for (int64_t w = 0; w < n; w += 64) {
      const uint64_t bits = KeepBits(job.seed, job.tensor_id, static_cast<uint32_t>(model), job.keep_below[model], first + w);
      for (int i = 0; i < 64; ++i) kept[w + i] = -static_cast<Key>(bits >> i & 1);
    }
  }
}

template <class R>
void AbsSumsRange(const MergeJob& job, int model, int64_t begin, int64_t end, double* full, double* part) {
  using Key = typename KeyOf<R>::Type;
  alignas(64) R base[kSumBlock], delta[kSumBlock];
  alignas(64) Key kept[kSumBlock];
  for (int64_t first = begin; first < end; first += kSumBlock) {
    const int64_t n = end - first < kSumBlock ? end - first : kSumBlock;
    const int64_t padded = (n + kSumLanes - 1) / kSumLanes * kSumLanes;  // with zeros, which change no sum
    Widen(job.in.base, first, n, base);
    Widen(job.in.model[model], first, n, delta);
    for (int64_t i = 0; i < n; ++i) delta[i] -= base[i];
    for (int64_t i = n; i < padded; ++i) delta[i] = R(0);
    KeptElements(job, model, first, padded, delta, kept);
    BlockSum all, some;
    for (int64_t row = 0; row < padded; row += kSumLanes) {
      for (int j = 0; j < kSumLanes; ++j) {
        const Key magnitude = ScalarLanes<R>::KeysOf(delta[row + j]);
        all.lane[j] += static_cast<double>(BitCast<R>(magnitude));
        some.lane[j] += static_cast<double>(BitCast<R>(static_cast<Key>(magnitude & kept[row + j])));
      }
    }
    full[first / kSumBlock] = all.Fold();
    part[first / kSumBlock] = some.Fold();
  }
}

template <class R>
void DotsRange(const Input& a, const Input& b, int64_t begin, int64_t end, double* sums) {
  alignas(64) R x[kSumBlock], y[kSumBlock];
  for (int64_t first = begin; first < end; first += kSumBlock) {
    const int64_t n = end - first < kSumBlock ? end - first : kSumBlock;
    const int64_t padded = (n + kSumLanes - 1) / kSumLanes * kSumLanes;
    Widen(a, first, n, x);
    Widen(b, first, n, y);
    for (int64_t i = n; i < padded; ++i) x[i] = y[i] = R(0);
    BlockSum aa, bb, ab;
    for (int64_t row = 0; row < padded; row += kSumLanes) {
      for (int j = 0; j < kSumLanes; ++j) {
        const double u = x[row + j], v = y[row + j];
        aa.lane[j] += u * u;
        bb.lane[j] += v * v;
        ab.lane[j] += u * v;
      }
    }
    double* sum = sums + 3 * (first / kSumBlock);
    sum[0] = aa.Fold();
    sum[1] = bb.Fold();
    sum[2] = ab.Fold();
  }
}

void AbsSums(const MergeJob& job, int model, int64_t begin, int64_t end, double* full, double* kept) {
  if (job.in.f64) {
    AbsSumsRange<double>(job, model, begin, end, full, kept);
  } else {
    AbsSumsRange<float>(job, model, begin, end, full, kept);
  }
}

void Dots(const Input& a, const Input& b, bool f64, int64_t begin, int64_t end, double* sums) {
  if (f64) {
    DotsRange<double>(a, b, begin, end, sums);
  } else {
    DotsRange<float>(a, b, begin, end, sums);
  }
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
