// What a merge depends on, of one piece of a tensor in one read: all dot products of base and deltas, L1 norms, agreement, and how the
// largest deltas of the models overlap and contradict each other.
//
// A run at a time: first each model is measured by itself while its deltas are made, then the products are formed of what is in the first
// cache. In an fp32 computation a block's sums are fp32 as well (docs/arithmetic.md): twice the lanes of fp64, and no conversions.
#pragma once

#include <utility>

#include "kernels/reduce-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

constexpr int kRunWords = static_cast<int>(kDiagnoseRun / sizeof(float)) / 64;

// Largest magnitudes, 2^-40 and 2^50, between which no sum of a block overflows in fp32 or loses what matters below its smallest number. A
// block is added in fp64 when the base or a delta of it has a largest magnitude that is neither between them nor 0.
constexpr int32_t kTameLow = 0x2B800000, kTameHigh = 0x58800000;

// fp64 vectors as wide as the target's registers: of longer ones GCC 12 makes scalar code under AVX2.
struct WideLanes {
  static constexpr int kLanes = Lanes::kLanes >= 16 ? 8 : Lanes::kLanes >= 8 ? 4 : 2;
  typedef double Vec __attribute__((vector_size(kLanes * 8)));
  typedef int64_t Keys __attribute__((vector_size(kLanes * 8)));
  static Vec Load(const double* p) {
    Vec v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  static void Store(double* p, Vec v) { memcpy(p, &v, sizeof(v)); }
  static Vec Add(Vec a, Vec b) { return a + b; }
  static Vec Mul(Vec a, Vec b) { return a * b; }
  static Keys KeysOf(Vec v) { return reinterpret_cast<Keys>(v) & 0x7FFFFFFFFFFFFFFF; }
  static Vec ValuesOf(Keys k) { return reinterpret_cast<Vec>(k); }
};

template <class R>
struct ProductLanesFor;
template <>
struct ProductLanesFor<float> {
  using Type = Lanes;
};
template <>
struct ProductLanesFor<double> {
  using Type = WideLanes;
};

// Of a model in a run, bit e mod 64 of word e / 64: element e is kept, and above or below zero.
struct KeptWords {
  uint64_t positive[kRunWords], negative[kRunWords];
};

// Place of vectors a <= b in the upper triangle by rows.
inline constexpr int PlaceOf(int a, int b, int vectors) { return a * vectors - a * (a - 1) / 2 + b - a; }

// The pairs (a, b) of a tile: of kRows vectors with kColumns others, or of kColumns vectors with themselves.
template <int kRows, int kColumns>
struct Tile {
  static constexpr bool kTriangle = kRows == 0;
  static constexpr int kPairs = kTriangle ? kColumns * (kColumns + 1) / 2 : kRows * kColumns;
  int a[kPairs] = {}, b[kPairs] = {};
  constexpr Tile() {
    int k = 0;
    for (int i = 0; i < (kTriangle ? kColumns : kRows); ++i) {
      for (int j = kTriangle ? i : 0; j < kColumns; ++j, ++k) a[k] = i, b[k] = j;
    }
  }
};

// Adds the products of vectors `row`, row + 1, ... with `column`, column + 1, ... to their lanes. Each vector is loaded once for all its
// products, whose accumulators stay in registers. Written with folds because GCC does not keep an array in registers unless its indices are
// constants.
template <int kRows, int kColumns, class R, int64_t kRun, int... kPair, int... kColumn>
inline void AddTile(const R (*x)[kRun], int row, int column, int vectors, int64_t n, R* lanes, std::integer_sequence<int, kPair...>,
                    std::integer_sequence<int, kColumn...>) {
  using P = typename ProductLanesFor<R>::Type;
  using V = typename P::Vec;
  using T = Tile<kRows, kColumns>;
  constexpr T kAt;
  R* at[T::kPairs] = {lanes + PlaceOf(row + kAt.a[kPair], column + kAt.b[kPair], vectors) * kSumLanes...};
  for (int j = 0; j < kSumLanes; j += P::kLanes) {
    V sum[T::kPairs] = {P::Load(at[kPair] + j)...};
    for (int64_t i = j; i < n; i += kSumLanes) {
      const V right[kColumns] = {P::Load(x[column + kColumn] + i)...};
      if constexpr (T::kTriangle) {
        ((sum[kPair] = P::Add(sum[kPair], P::Mul(right[kAt.a[kPair]], right[kAt.b[kPair]]))), ...);
      } else {
        const V left = P::Load(x[row] + i);
        ((sum[kPair] = P::Add(sum[kPair], P::Mul(left, right[kAt.b[kPair]]))), ...);
      }
    }
    (P::Store(at[kPair] + j, sum[kPair]), ...);
  }
}

template <int kRows, int kColumns, class R, int64_t kRun>
inline void AddTile(const R (*x)[kRun], int row, int column, int vectors, int64_t n, R* lanes) {
  AddTile<kRows, kColumns>(x, row, column, vectors, n, lanes, std::make_integer_sequence<int, Tile<kRows, kColumns>::kPairs>(),
                           std::make_integer_sequence<int, kColumns>());
}

// All products of a run. Four vectors at a time, whose ten accumulators fit into sixteen registers.
template <class R, int64_t kRun>
void AddProducts(const R (*x)[kRun], int vectors, int64_t n, R* lanes) {
  for (int column = 0; column < vectors; column += 4) {
    switch (vectors - column) {
      case 1: AddTile<0, 1>(x, column, column, vectors, n, lanes); break;
      case 2: AddTile<0, 2>(x, column, column, vectors, n, lanes); break;
      case 3: AddTile<0, 3>(x, column, column, vectors, n, lanes); break;
      default: AddTile<0, 4>(x, column, column, vectors, n, lanes);
    }
    for (int row = 0; row < column; ++row) {
      switch (vectors - column) {
        case 1: AddTile<1, 1>(x, row, column, vectors, n, lanes); break;
        case 2: AddTile<1, 2>(x, row, column, vectors, n, lanes); break;
        case 3: AddTile<1, 3>(x, row, column, vectors, n, lanes); break;
        default: AddTile<1, 4>(x, row, column, vectors, n, lanes);
      }
    }
  }
}

// Puts the bits of a vector of elements, the v-th of 64, into their word. Sixteen or eight are stored as they are, on a little-endian machine,
// which is cheaper than to shift them together in a register.
template <class L>
inline void PutBits(typename L::Mask mask, int v, uint64_t* word) {
  const uint64_t bits = L::Bits(mask);
  if constexpr (L::kLanes >= 8) {
    memcpy(reinterpret_cast<unsigned char*>(word) + v * L::kLanes / 8, &bits, L::kLanes / 8);
  } else {
    *word = (v ? *word : 0) | bits << (v * L::kLanes);
  }
}

template <class L>
inline typename L::Key LargestKey(const typename L::Real* x, int64_t n, typename L::Key top) {
  auto largest = L::SetKey(top);
  for (int64_t i = 0; i < n; i += L::kLanes) largest = L::Max(largest, L::KeysOf(L::Load(x + i)));
  return L::ReduceMax(largest);
}

// One model's part of a run: its deltas; the L1 norm's lanes; which deltas are above the threshold; the largest key. Returns how many are
// zero. n is a multiple of kSumLanes.
template <class L, class T, class R>
inline int64_t MeasureModel(const T* x, const R* base, int64_t n, R threshold, R* delta, R* lanes, KeptWords* kept, typename L::Key* top) {
  constexpr int kVectors = kSumLanes / L::kLanes;
  const auto above = L::Set(threshold), below = L::Set(-threshold);
  auto largest = L::SetKey(*top), zeros = L::SetKey(0);
  typename L::Vec sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = L::Load(lanes + v * L::kLanes);
  for (int64_t row = 0; row < n; row += kSumLanes) {
    uint64_t positive, negative;
    uint64_t* const positives = L::kLanes >= 8 ? kept->positive + row / 64 : &positive;
    uint64_t* const negatives = L::kLanes >= 8 ? kept->negative + row / 64 : &negative;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = row + v * L::kLanes;
      const auto d = L::Sub(L::Load(x + i), L::Load(base + i));
      L::Store(delta + i, d);
      const auto keys = L::KeysOf(d);
      largest = L::Max(largest, keys);
      sum[v] = L::Add(sum[v], L::ValuesOf(keys));
      PutBits<L>(L::Below(above, d), v, positives);
      PutBits<L>(L::Below(d, below), v, negatives);
      zeros = L::CountIf(zeros, L::IsZero(d));
    }
    if constexpr (L::kLanes < 8) kept->positive[row / 64] = positive, kept->negative[row / 64] = negative;
  }
  for (int v = 0; v < kVectors; ++v) L::Store(lanes + v * L::kLanes, sum[v]);
  *top = L::ReduceMax(largest);
  return L::ReduceAdd(zeros);
}

// The lanes of |sum of the deltas|.
template <class R, int64_t kRun>
inline void AddAgreement(const R (*delta)[kRun], int models, int64_t n, R* lanes) {
  using P = typename ProductLanesFor<R>::Type;
  constexpr int kVectors = kSumLanes / P::kLanes;
  typename P::Vec sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = P::Load(lanes + v * P::kLanes);
  for (int64_t row = 0; row < n; row += kSumLanes) {
    typename P::Vec total[kVectors];
    for (int v = 0; v < kVectors; ++v) total[v] = P::Load(delta[0] + row + v * P::kLanes);
    for (int m = 1; m < models; ++m) {
      for (int v = 0; v < kVectors; ++v) total[v] = P::Add(total[v], P::Load(delta[m] + row + v * P::kLanes));
    }
    for (int v = 0; v < kVectors; ++v) sum[v] = P::Add(sum[v], P::ValuesOf(P::KeysOf(total[v])));
  }
  for (int v = 0; v < kVectors; ++v) P::Store(lanes + v * P::kLanes, sum[v]);
}

inline int64_t CountBits(const uint64_t* word, int words) {
  int64_t count = 0;
  for (int w = 0; w < words; ++w) count += __builtin_popcountll(word[w]);
  return count;
}

// Adds what the words of all models say to the counts of kept elements and those that follow them (types.h has their order).
inline void CountTogether(const KeptWords* kept, int models, int words, int64_t* counts) {
  uint64_t at_least[kMaxModels + 1][kRunWords];  // bit e of word k: k models or more keep element e
  uint64_t positive[kRunWords] = {}, negative[kRunWords] = {};
  memset(at_least, 0, sizeof(at_least[0]) * static_cast<size_t>(models + 1));
  for (int m = 0; m < models; ++m) {
    for (int k = m + 1; k > 1; --k) {
      for (int w = 0; w < words; ++w) at_least[k][w] |= at_least[k - 1][w] & (kept[m].positive[w] | kept[m].negative[w]);
    }
    for (int w = 0; w < words; ++w) {
      at_least[1][w] |= kept[m].positive[w] | kept[m].negative[w];
      positive[w] |= kept[m].positive[w];
      negative[w] |= kept[m].negative[w];
    }
    counts[m] += CountBits(kept[m].positive, words) + CountBits(kept[m].negative, words);
  }
  if (models < 2) return;
  counts += 2 * models;
  for (int k = 2; k <= models; ++k) *counts++ += CountBits(at_least[k], words);
  for (int w = 0; w < words; ++w) *counts += __builtin_popcountll(positive[w] & negative[w]);
  ++counts;
  int64_t* opposite = counts + models * (models - 1) / 2;
  for (int a = 0; a < models; ++a) {
    for (int b = a + 1; b < models; ++b) {
      int64_t same = 0, different = 0;
      for (int w = 0; w < words; ++w) {
        same += __builtin_popcountll((kept[a].positive[w] & kept[b].positive[w]) | (kept[a].negative[w] & kept[b].negative[w]));
        different += __builtin_popcountll((kept[a].positive[w] & kept[b].negative[w]) | (kept[a].negative[w] & kept[b].positive[w]));
      }
      *counts++ += same + different;
      *opposite++ += different;
    }
  }
}

// A delta is kept in a run where it is above the result, or equal to the selection's key at element `ties` - 1 of the run or before.
template <class R>
inline R ThresholdOf(const Selection& s, int64_t first, int64_t n, int64_t* ties) {
  using Key = typename KeyOf<R>::Type;
  const Key key = s.key > KeyOf<R>::kMax ? KeyOf<R>::kMax : static_cast<Key>(s.key);
  const int64_t before = s.cut + 1 - first;
  *ties = key == 0 || before <= 0 || before >= n ? 0 : before;
  return BitCast<R>(before >= n && key > 0 ? key - 1 : key);
}

template <class R>
inline void KeepTies(const R* delta, int64_t ties, int64_t key, KeptWords* kept) {
  for (int64_t i = 0; i < ties; ++i) {
    const auto equal = static_cast<uint64_t>(ScalarLanes<R>::KeysOf(delta[i]) == key);
    uint64_t* words = delta[i] > 0 ? kept->positive : kept->negative;  // GCC 12's sanitizer cannot choose between the arrays themselves
    words[i / 64] |= equal << (i % 64);
  }
}

// Memory for one thread, of DiagnoseScratch (diagnose.cpp) bytes: the sums' lanes, then a run of base and deltas, and two
// more of its length.
template <class R>
struct Scratch {
  static constexpr int64_t kRun = kDiagnoseRun / sizeof(R);
  R* lanes;
  R (*x)[kRun];
  R *model;

  Scratch(const DiagnoseJob& job, void* memory) {
    lanes = static_cast<R*>(memory);
    x = reinterpret_cast<R(*)[kRun]>(static_cast<double*>(memory) + static_cast<int64_t>(job.sums) * kSumLanes);
    model = x[job.in.models + 1];
  }
};

// Elements [first, first + n) of a tensor in the compute dtype, then zeros up to a multiple of kSumLanes, which is returned.
template <class R>
inline int64_t WidenPadded(const Input& in, int64_t first, int64_t n, R* dst) {
  const int64_t padded = (n + kSumLanes - 1) / kSumLanes * kSumLanes;
  Widen(in, first, n, dst);
  for (int64_t i = n; i < padded; ++i) dst[i] = R(0);
  return padded;
}

template <class R>
void DiagnoseRun(const DiagnoseJob& job, int64_t first, int64_t n, const Scratch<R>& scratch, int64_t* counts, typename KeyOf<R>::Type* top) {
  using L = typename LanesFor<R>::Type;
  const int models = job.in.models, products = PlaceOf(models, models, models + 1) + 1;
  KeptWords kept[kMaxModels];
  R* base = scratch.x[0];
  const int64_t padded = WidenPadded(job.in.base, first, n, base);
  top[0] = LargestKey<L>(base, padded, top[0]);
  for (int m = 0; m < models; ++m) {
    const Input& in = job.in.model[m];
    R *delta = scratch.x[m + 1], *lanes = scratch.lanes + (products + m) * kSumLanes;
    int64_t ties;
    const R threshold = ThresholdOf<R>(job.selection[m], first, n, &ties);
    const auto measure = [&](const auto* x) {
      counts[m] += padded - MeasureModel<L>(x, base, padded, threshold, delta, lanes, kept + m, top + m + 1);
    };
    if (padded == n && in.dtype == DType::kBF16) {
      measure(At<Bf16>(in, first));
    } else if (padded == n && in.dtype == DType::kF16) {
      measure(At<F16>(in, first));
    } else {
      WidenPadded(in, first, n, scratch.model);
      measure(scratch.model);
    }
    KeepTies(delta, ties, job.selection[m].key, kept + m);
  }
  AddAgreement(scratch.x + 1, models, padded, scratch.lanes + (products + models) * kSumLanes);
  AddProducts(scratch.x, models + 1, padded, scratch.lanes);
  CountTogether(kept, models, static_cast<int>(padded / 64), counts + models);
}

// The sums of a run in fp64, of deltas in fp32.
void AddWideRun(const DiagnoseJob& job, int64_t first, int64_t n, const Scratch<double>& scratch) {
  const int models = job.in.models, products = PlaceOf(models, models, models + 1) + 1;
  float *x = reinterpret_cast<float*>(scratch.model), *base = x + Scratch<double>::kRun;
  const int64_t padded = WidenPadded(job.in.base, first, n, base);
  for (int64_t i = 0; i < padded; ++i) scratch.x[0][i] = base[i];
  for (int m = 0; m < models; ++m) {
    double* delta = scratch.x[m + 1];
    WidenPadded(job.in.model[m], first, n, x);
    for (int64_t i = 0; i < padded; ++i) delta[i] = x[i] - base[i];
    AddAgreement(scratch.x + m + 1, 1, padded, scratch.lanes + (products + m) * kSumLanes);
  }
  AddAgreement(scratch.x + 1, models, padded, scratch.lanes + (products + models) * kSumLanes);
  AddProducts(scratch.x, models + 1, padded, scratch.lanes);
}

inline bool IsTame(const int32_t* top, int vectors) {
  for (int v = 0; v < vectors; ++v) {
    if (top[v] != 0 && (top[v] < kTameLow || top[v] > kTameHigh)) return false;
  }
  return true;
}

// A block's sums: run(first, n) for its runs, which add to the lanes, and fold() of these when all are done.
template <class R, class Run>
inline void AddRuns(const DiagnoseJob& job, const Scratch<R>& scratch, int64_t begin, int64_t end, Run&& run) {
  memset(scratch.lanes, 0, static_cast<size_t>(job.sums) * kSumLanes * sizeof(R));
  for (int64_t first = begin; first < end; first += scratch.kRun) run(first, end - first < scratch.kRun ? end - first : scratch.kRun);
}

template <class R>
inline void FoldLanes(const DiagnoseJob& job, const R* lanes, double* sums) {
  for (int i = 0; i < job.sums; ++i) {
    BlockSum sum;
    for (int j = 0; j < kSumLanes / 8; ++j) LoadEight(lanes + i * kSumLanes + 8 * j, &sum.eight[j]);
    sums[i] += sum.Fold();
  }
}

template <class R>
void DiagnoseRange(const DiagnoseJob& job, int64_t begin, int64_t end, void* memory, double* sums, int64_t* counts) {
  const int models = job.in.models;
  const Scratch<R> scratch(job, memory);
  for (int64_t block = begin; block < end; block += kSumBlock) {
    const int64_t stop = end < block + kSumBlock ? end : block + kSumBlock;
    typename KeyOf<R>::Type top[kMaxModels + 1] = {};  // largest keys of the block, the base's first
    AddRuns(job, scratch, block, stop, [&](int64_t first, int64_t n) { DiagnoseRun(job, first, n, scratch, counts, top); });
    for (int m = 0; m < models; ++m) {
      if (top[m + 1] > counts[2 * models + m]) counts[2 * models + m] = top[m + 1];
    }
    if constexpr (sizeof(R) == sizeof(float)) {
      if (!IsTame(top, models + 1)) {
        const Scratch<double> wide(job, memory);
        AddRuns(job, wide, block, stop, [&](int64_t first, int64_t n) { AddWideRun(job, first, n, wide); });
        FoldLanes(job, wide.lanes, sums);
        continue;
      }
    }
    FoldLanes(job, scratch.lanes, sums);
  }
}

void Diagnose(const DiagnoseJob& job, int64_t begin, int64_t end, void* memory, double* sums, int64_t* counts) {
  if (job.in.f64) {
    DiagnoseRange<double>(job, begin, end, memory, sums, counts);
  } else {
    DiagnoseRange<float>(job, begin, end, memory, sums, counts);
  }
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
