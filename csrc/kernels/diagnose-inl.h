// What a merge depends on, of one piece of a tensor in one read: all dot products of base and deltas, L1 norms, agreement, and how the
// largest deltas of the models overlap and contradict each other.
#pragma once

#include <utility>

#include "kernels/reduce-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

constexpr int64_t kRun = 512;  // elements of every tensor in fp64 at a time: 4 KiB, so that a handful of models stay in the first cache

// fp64 vectors as wide as the target's registers: of longer ones GCC 12 makes scalar code under AVX2.
constexpr int kDoubles = Lanes::kLanes >= 16 ? 8 : Lanes::kLanes >= 8 ? 4 : 2;
typedef double Doubles __attribute__((vector_size(kDoubles * 8)));
typedef int64_t Longs __attribute__((vector_size(kDoubles * 8)));
typedef float Floats __attribute__((vector_size(kDoubles * 4)));

// By pointer: how such a vector is returned depends on the target.
inline void LoadDoubles(const double* p, Doubles* v) { memcpy(v, p, sizeof(*v)); }

inline void LoadDoubles(const float* p, Doubles* v) {
  Floats narrow;
  memcpy(&narrow, p, sizeof(narrow));
  *v = __builtin_convertvector(narrow, Doubles);
}

// wide[0..n) = narrow[0..n); n is a multiple of kSumLanes.
template <class R>
inline void ToDoubles(const R* narrow, int64_t n, double* wide) {
  for (int64_t i = 0; i < n; i += kDoubles) {
    Doubles v;
    LoadDoubles(narrow + i, &v);
    memcpy(wide + i, &v, sizeof(v));
  }
}

// One sum's lanes (reduce-inl.h has the order) over the rows of a run, the lanes being in memory between runs. Lane group by lane group, so
// that the accumulator stays in a register; the groups are independent, which hides the latency of the additions.
template <class Term>
inline void AddRows(double* lanes, int64_t n, Term&& term) {
  for (int j = 0; j < kSumLanes; j += kDoubles) {
    Doubles sum;
    LoadDoubles(lanes + j, &sum);
    for (int64_t row = 0; row < n; row += kSumLanes) {
      Doubles t;
      term(row + j, &t);
      sum += t;
    }
    memcpy(lanes + j, &sum, sizeof(sum));
  }
}

inline void Magnitude(Doubles* v) {
  Longs bits;
  memcpy(&bits, v, sizeof(bits));
  bits &= 0x7FFFFFFFFFFFFFFF;
  memcpy(v, &bits, sizeof(bits));
}

// Places (a, b), a <= b, of the upper triangle by rows.
template <int kVectors>
struct Triangle {
  static constexpr int kCount = kVectors * (kVectors + 1) / 2;
  int a[kCount] = {}, b[kCount] = {};
  constexpr Triangle() {
    for (int i = 0, k = 0; i < kVectors; ++i) {
      for (int j = i; j < kVectors; ++j, ++k) a[k] = i, b[k] = j;
    }
  }
};

// All sums of a few models at once: each vector is loaded once for all its products, and with 32 registers the accumulators of up to three
// models and a base stay in them. Written with folds because GCC does not keep an array in registers unless its indices are constants.
template <int kModels, int... kPair, int... kModel>
inline void AddRowsOfAll(const double (*wide)[kRun], int64_t n, double* lanes, std::integer_sequence<int, kPair...>,
                         std::integer_sequence<int, kModel...>) {
  constexpr Triangle<kModels + 1> kAt;
  constexpr int kPairs = Triangle<kModels + 1>::kCount;
  for (int j = 0; j < kSumLanes; j += kDoubles) {
    Doubles product[kPairs], magnitude[kModels], agreement;
    (LoadDoubles(lanes + kPair * kSumLanes + j, &product[kPair]), ...);
    (LoadDoubles(lanes + (kPairs + kModel) * kSumLanes + j, &magnitude[kModel]), ...);
    LoadDoubles(lanes + (kPairs + kModels) * kSumLanes + j, &agreement);
    for (int64_t row = j; row < n; row += kSumLanes) {
      Doubles v[kModels + 1], total;
      LoadDoubles(wide[0] + row, &v[0]);
      (LoadDoubles(wide[kModel + 1] + row, &v[kModel + 1]), ...);
      ((product[kPair] += v[kAt.a[kPair]] * v[kAt.b[kPair]]), ...);
      total = v[1];
      ((kModel ? void(total += v[kModel + 1]) : void()), ...);
      Magnitude(&total);
      agreement += total;
      ((Magnitude(&v[kModel + 1]), magnitude[kModel] += v[kModel + 1]), ...);
    }
    (memcpy(lanes + kPair * kSumLanes + j, &product[kPair], sizeof(Doubles)), ...);
    (memcpy(lanes + (kPairs + kModel) * kSumLanes + j, &magnitude[kModel], sizeof(Doubles)), ...);
    memcpy(lanes + (kPairs + kModels) * kSumLanes + j, &agreement, sizeof(Doubles));
  }
}

template <int kModels>
inline void AddRowsOfAll(const double (*wide)[kRun], int64_t n, double* lanes) {
  AddRowsOfAll<kModels>(wide, n, lanes, std::make_integer_sequence<int, Triangle<kModels + 1>::kCount>(),
                        std::make_integer_sequence<int, kModels>());
}

// Bit e of the words: element e of 64 is kept; it is negative. Zeros are never kept.
struct SignWords {
  uint64_t kept, negative;
};

template <class L>
inline SignWords WordsOf(const typename L::Real* delta, const Selection& s, int64_t first, int64_t* nonzero, typename L::Keys* largest) {
  using Key = typename L::Key;
  const Key key = s.key > KeyOf<typename L::Real>::kMax ? KeyOf<typename L::Real>::kMax : static_cast<Key>(s.key);
  const auto threshold = L::SetKey(key), zero = L::SetKey(0);
  uint64_t above = 0, equal = 0, negative = 0, any = 0;
  for (int i = 0; i < 64; i += L::kLanes) {
    const auto d = L::Load(delta + i);
    const auto keys = L::KeysOf(d);
    *largest = L::Max(*largest, keys);
    above |= L::Bits(L::Greater(keys, threshold)) << i;
    equal |= L::Bits(L::Equal(keys, threshold)) << i;
    any |= L::Bits(L::Greater(keys, zero)) << i;
    negative |= L::Bits(L::Negative(d)) << i;
  }
  *nonzero += __builtin_popcountll(any);
  const int64_t ties = s.cut + 1 - first;  // elements before it are kept at the threshold itself too
  if (ties > 0) above |= ties < 64 ? equal & ((uint64_t{1} << ties) - 1) : equal;
  return {above & any, negative & any};
}

// Adds what one word of all models says to the counts after those of each model (types.h has their order).
inline void CountTogether(const SignWords* word, int models, int64_t* counts) {
  uint64_t at_least[kMaxModels + 1] = {};  // bit e of word k: k models or more keep element e
  uint64_t positive = 0, negative = 0;
  for (int m = 0; m < models; ++m) {
    for (int k = m + 1; k > 1; --k) at_least[k] |= at_least[k - 1] & word[m].kept;
    at_least[1] |= word[m].kept;
    positive |= word[m].kept & ~word[m].negative;
    negative |= word[m].kept & word[m].negative;
  }
  if (models < 2 || !at_least[2]) return;
  for (int k = 2; k <= models; ++k) *counts++ += __builtin_popcountll(at_least[k]);
  *counts++ += __builtin_popcountll(positive & negative);
  int64_t* opposite = counts + models * (models - 1) / 2;
  for (int a = 0; a < models; ++a) {
    for (int b = a + 1; b < models; ++b) {
      const uint64_t shared = word[a].kept & word[b].kept;
      *counts++ += __builtin_popcountll(shared);
      *opposite++ += __builtin_popcountll(shared & (word[a].negative ^ word[b].negative));
    }
  }
}

// A run of n <= kRun elements: its sums go to the lanes, its counts to `counts`.
template <class L>
void DiagnoseRun(const DiagnoseJob& job, int64_t first, int64_t n, double* lanes, int64_t* counts, typename L::Keys* largest,
                 double (*wide)[kRun]) {
  using R = typename L::Real;
  const int models = job.in.models;
  const int64_t padded = (n + kSumLanes - 1) / kSumLanes * kSumLanes;  // with zeros, which change no sum and are not kept
  alignas(64) R base[kRun], delta[kRun];
  SignWords words[kRun / 64][kMaxModels];
  Widen(job.in.base, first, n, base);
  for (int64_t i = n; i < padded; ++i) base[i] = R(0);
  ToDoubles(base, padded, wide[0]);
  for (int m = 0; m < models; ++m) {
    Widen(job.in.model[m], first, n, delta);
    for (int64_t i = n; i < padded; ++i) delta[i] = R(0);
    for (int64_t i = 0; i < padded; i += L::kLanes) L::Store(delta + i, L::Sub(L::Load(delta + i), L::Load(base + i)));
    for (int64_t i = 0; i < padded; i += 64) words[i / 64][m] = WordsOf<L>(delta + i, job.selection[m], first + i, counts + m, largest + m);
    ToDoubles(delta, padded, wide[m + 1]);
  }
  for (int64_t i = 0; i < padded; i += 64) {
    for (int m = 0; m < models; ++m) counts[models + m] += __builtin_popcountll(words[i / 64][m].kept);
    CountTogether(words[i / 64], models, counts + 3 * models);
  }
  switch (models) {
    case 1: return AddRowsOfAll<1>(wide, padded, lanes);
    case 2: return AddRowsOfAll<2>(wide, padded, lanes);
    case 3: return AddRowsOfAll<3>(wide, padded, lanes);
    case 4: return AddRowsOfAll<4>(wide, padded, lanes);
  }
  for (int a = 0; a <= models; ++a) {
    for (int b = a; b <= models; ++b, lanes += kSumLanes) {
      if (a == 0 && !job.in.base.data) continue;
      AddRows(lanes, padded, [&](int64_t i, Doubles* t) {
        Doubles v;
        LoadDoubles(wide[a] + i, t);
        LoadDoubles(wide[b] + i, &v);
        *t *= v;
      });
    }
  }
  for (int m = 1; m <= models; ++m, lanes += kSumLanes) {
    AddRows(lanes, padded, [&](int64_t i, Doubles* t) {
      LoadDoubles(wide[m] + i, t);
      Magnitude(t);
    });
  }
  AddRows(lanes, padded, [&](int64_t i, Doubles* t) {
    LoadDoubles(wide[1] + i, t);
    for (int m = 2; m <= models; ++m) {
      Doubles v;
      LoadDoubles(wide[m] + i, &v);
      *t += v;
    }
    Magnitude(t);
  });
}

template <class L>
void DiagnoseRange(const DiagnoseJob& job, int64_t begin, int64_t end, double* lanes, double* sums, int64_t* counts) {
  alignas(64) double wide[kMaxModels + 1][kRun];
  typename L::Keys largest[kMaxModels];
  for (int m = 0; m < job.in.models; ++m) largest[m] = L::SetKey(0);
  for (int64_t block = begin; block < end; block += kSumBlock) {
    const int64_t stop = end < block + kSumBlock ? end : block + kSumBlock;
    memset(lanes, 0, static_cast<size_t>(job.sums) * kSumLanes * sizeof(double));
    for (int64_t first = block; first < stop; first += kRun) {
      DiagnoseRun<L>(job, first, stop - first < kRun ? stop - first : kRun, lanes, counts, largest, wide);
    }
    for (int i = 0; i < job.sums; ++i) {
      BlockSum sum;
      memcpy(sum.eight, lanes + i * kSumLanes, sizeof(sum.eight));
      sums[i] += sum.Fold();
    }
  }
  for (int m = 0; m < job.in.models; ++m) {
    int64_t* top = counts + 2 * job.in.models + m;
    const int64_t key = L::ReduceMax(largest[m]);
    if (key > *top) *top = key;
  }
}

void Diagnose(const DiagnoseJob& job, int64_t begin, int64_t end, double* lanes, double* sums, int64_t* counts) {
  if (job.in.f64) {
    DiagnoseRange<ScalarLanes<double>>(job, begin, end, lanes, sums, counts);
  } else {
    DiagnoseRange<Lanes>(job, begin, end, lanes, sums, counts);
  }
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
