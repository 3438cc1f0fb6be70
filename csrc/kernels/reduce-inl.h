// Whole-tensor sums in the one order that every backend uses (docs/arithmetic.md): these are the sums of single blocks of 4096.
#pragma once

#include "kernels/convert-inl.h"
#include "kernels/philox-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

constexpr int kSumLanes = 64;

// Eight lanes; GCC and Clang split these vectors where the target's are shorter.
typedef float EightFloats __attribute__((vector_size(32)));
typedef double EightDoubles __attribute__((vector_size(64)));

// By pointer: how such a vector is returned depends on the target.
inline void LoadEight(const double* p, EightDoubles* v) { memcpy(v, p, sizeof(*v)); }

inline void LoadEight(const float* p, EightDoubles* v) {
  EightFloats narrow;
  memcpy(&narrow, p, sizeof(narrow));
  *v = __builtin_convertvector(narrow, EightDoubles);
}

// Lane j holds the terms of index j mod 64, added in order.
struct BlockSum {
  EightDoubles eight[kSumLanes / 8] = {};

  template <class R>
  void Add(const R* row) {
    for (int j = 0; j < kSumLanes / 8; ++j) {
      EightDoubles v;
      LoadEight(row + 8 * j, &v);
      eight[j] += v;
    }
  }

  template <class R>
  void AddProducts(const R* row, const R* other) {
    for (int j = 0; j < kSumLanes / 8; ++j) {
      EightDoubles u, v;
      LoadEight(row + 8 * j, &u);
      LoadEight(other + 8 * j, &v);
      eight[j] += u * v;
    }
  }

  double Fold() {
    double lane[kSumLanes];
    memcpy(lane, eight, sizeof(lane));
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    return lane[0];
  }
};

// part[i] = magnitude[i] where element first + i, i < n, is in a selection, else 0.
template <class R>
inline void SelectedPart(const Selection& s, int64_t first, int64_t n, const R* magnitude, R* part) {
  using Key = typename KeyOf<R>::Type;
  const Key key = s.key > KeyOf<R>::kMax ? KeyOf<R>::kMax : static_cast<Key>(s.key);
  const int64_t ties = s.cut + 1 - first < n ? s.cut + 1 - first : n;  // elements before it are kept at the threshold itself too
  int64_t i = 0;
  for (; i < ties; ++i) part[i] = BitCast<Key>(magnitude[i]) >= key ? magnitude[i] : R(0);
  for (; i < n; ++i) part[i] = BitCast<Key>(magnitude[i]) > key ? magnitude[i] : R(0);
}

// part[i] = magnitude[i] where element first + i, i < n <= kSumBlock, is kept, else 0; first is a multiple of kSumBlock, n one of kSumLanes.
template <class R>
inline void KeptPart(const MergeJob& job, int model, int64_t first, int64_t n, const R* magnitude, R* part) {
  using L = typename LanesFor<R>::Type;
  if (job.sparsify == Sparsify::kMagnitude || job.sparsify == Sparsify::kBand) {
    SelectedPart(job.selection[model], first, n, magnitude, part);
    if (job.sparsify == Sparsify::kBand) {
      alignas(64) R larger[kSumBlock];
      SelectedPart(job.larger[model], first, n, magnitude, larger);
      for (int64_t i = 0; i < n; ++i) part[i] = larger[i] != R(0) ? R(0) : part[i];
    }
  } else {
    const PhiloxKeys keys(job.seed);
    uint64_t words[2];
    for (int64_t w = 0; w < n; w += 64) {
      if (w % 128 == 0) KeepBits(keys, job.tensor_id, static_cast<uint32_t>(model), job.keep_below[model], job.in.first + first + w, words);
      const uint64_t bits = words[w / 64 % 2];
      for (int i = 0; i < 64; i += L::kLanes) L::Store(part + w + i, L::Where(L::FromBits(bits >> i), L::Load(magnitude + w + i)));
    }
  }
}

template <class R>
void AbsSumsRange(const MergeJob& job, int model, int64_t begin, int64_t end, double* full, double* kept) {
  using Key = typename KeyOf<R>::Type;
  alignas(64) R magnitude[kSumBlock], part[kSumBlock];
  for (int64_t first = begin; first < end; first += kSumBlock) {
    const int64_t n = end - first < kSumBlock ? end - first : kSumBlock;
    const int64_t padded = (n + kSumLanes - 1) / kSumLanes * kSumLanes;  // with zeros, which change no sum
    Widen(job.in.base, first, n, part);
    Widen(job.in.model[model], first, n, magnitude);
    for (int64_t i = n; i < padded; ++i) magnitude[i] = part[i] = R(0);
    for (int64_t i = 0; i < padded; ++i) {
      magnitude[i] = BitCast<R>(static_cast<Key>(ScalarLanes<R>::KeysOf(magnitude[i] - part[i])));
    }
    KeptPart(job, model, first, padded, magnitude, part);
    BlockSum all, some;
    for (int64_t row = 0; row < padded; row += kSumLanes) {
      all.Add(magnitude + row);
      some.Add(part + row);
    }
    full[first / kSumBlock] = all.Fold();
    kept[first / kSumBlock] = some.Fold();
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
      aa.AddProducts(x + row, x + row);
      bb.AddProducts(y + row, y + row);
      ab.AddProducts(x + row, y + row);
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
