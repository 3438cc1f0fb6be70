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

// Which elements of [first, first + n), n <= kSumBlock and first a multiple of it, are kept; as 0 or 1.
template <class R>
inline void KeptElements(const MergeJob& job, int model, int64_t first, int64_t n, const R* delta, uint8_t* kept) {
  using S = ScalarLanes<R>;
  if (job.sparsify == Sparsify::kMagnitude) {
    const Selection& s = job.selection[model];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t key = S::KeysOf(delta[i]);
      kept[i] = key > s.key || (key == s.key && first + i <= s.cut);
    }
  } else {
    for (int64_t w = 0; w < n; w += 64) {
      const uint64_t bits = KeepBits(job.seed, job.tensor_id, static_cast<uint32_t>(model), job.keep_below[model], first + w);
      for (int64_t i = w; i < w + 64 && i < n; ++i) kept[i] = bits >> (i - w) & 1;
    }
  }
}

template <class R>
void AbsSumsRange(const MergeJob& job, int model, int64_t begin, int64_t end, double* full, double* part) {
  R base[kSumBlock], delta[kSumBlock];
  uint8_t kept[kSumBlock];
  for (int64_t first = begin; first < end; first += kSumBlock) {
    const int64_t n = end - first < kSumBlock ? end - first : kSumBlock;
    Widen(job.in.base, first, n, base);
    Widen(job.in.model[model], first, n, delta);
    for (int64_t i = 0; i < n; ++i) delta[i] -= base[i];
    KeptElements(job, model, first, n, delta, kept);
    BlockSum all, some;
    for (int64_t row = 0; row < n; row += kSumLanes) {
      const int64_t lanes = n - row < kSumLanes ? n - row : kSumLanes;
      for (int64_t j = 0; j < lanes; ++j) {
        const double d = delta[row + j], magnitude = d < 0 ? -d : d;
        all.lane[j] += magnitude;
        some.lane[j] += kept[row + j] ? magnitude : 0.0;
      }
    }
    full[first / kSumBlock] = all.Fold();
    part[first / kSumBlock] = some.Fold();
  }
}

template <class R>
void DotsRange(const Input& a, const Input& b, int64_t begin, int64_t end, double* sums) {
  R x[kSumBlock], y[kSumBlock];
  for (int64_t first = begin; first < end; first += kSumBlock) {
    const int64_t n = end - first < kSumBlock ? end - first : kSumBlock;
    Widen(a, first, n, x);
    Widen(b, first, n, y);
    BlockSum aa, bb, ab;
    for (int64_t row = 0; row < n; row += kSumLanes) {
      const int64_t lanes = n - row < kSumLanes ? n - row : kSumLanes;
      for (int64_t j = 0; j < lanes; ++j) {
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
