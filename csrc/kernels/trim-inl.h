// TIES' trim, election and mean for pairs of vectors: the merge whose arithmetic, not its memory, sets the pace.
#pragma once

#include "kernels/run-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

constexpr int kGroups = 64;  // pairs of vectors in a piece, for each of which and each model a word of "inside the bracket" bits is noted

// Thresholds, broadcast: what does not fit the registers is read from the first cache.
template <class L>
struct Thresholds {
  typename L::Keys above[kMaxModels];   // kept: key > above
  typename L::Keys middle[kMaxModels];  // to be counted
  typename L::Keys lo[kMaxModels];      // of the bracket, which is [lo, lo + width]
  typename L::Keys width[kMaxModels];
};

template <class L>
struct Tally {
  typename L::Keys kept[kMaxModels], equal[kMaxModels];  // per lane
};

// What is found out about the keys on the way: nothing; how many are kept and how many equal `middle`; and which are inside a bracket.
enum class Learn { kNothing, kCounts, kInside };

// Merges `count` elements, a multiple of 2 * kLanes and, to learn what is inside, at most kGroups times that. The election is by mass and
// nothing is rescaled. Returns false if some delta may not be finite, or the result is NaN, which a Pair need not round.
// kModels: how many models there are, 0 for any number. kWeighted: some weight is not 1.
template <class L, int kModels, bool kWeighted, Learn kLearn, class T>
inline bool MergeTrimmedPiece(const Run<L>& run, const Thresholds<L>& at, const T* base, const T* const* x, T* out, int64_t count,
                              bool stream, Tally<L>* tally, uint32_t (*inside)[kGroups]) {
  using P = Pair<L, T>;
  using Vec = typename L::Vec;
  using R = typename L::Real;
  constexpr int64_t kLine = 64, kAhead = 8 * kLine, kSize = sizeof(T);
  const int models = kModels ? kModels : run.models;
  const Vec one = L::Set(R(1));
  constexpr int kRegisters = kModels ? kModels : kMaxModels;
  typename L::Keys kept_count[kRegisters], equal_count[kRegisters];
  if constexpr (kLearn != Learn::kNothing) {
    for (int m = 0; m < models; ++m) kept_count[m] = tally->kept[m], equal_count[m] = tally->equal[m];
  }
  typename L::Mask suspect = L::Positive(L::Zero());
  for (int64_t i = 0, g = 0; i < count; i += 2 * L::kLanes, ++g) {
    const P b = base ? P::Load(base + i) : P{};
    P raw[kRegisters];
    for (int m = 0; m < models; ++m) raw[m] = P::Load(x[m] + i);
    // So much is done per line that out-of-order execution does not reach the next ones, and the hardware's prefetcher alone is late.
    for (int64_t next = i + kAhead / kSize; next < i + kAhead / kSize + 2 * L::kLanes; next += kLine / kSize) {
      if (base) __builtin_prefetch(base + next);
      for (int m = 0; m < models; ++m) __builtin_prefetch(x[m] + next);
    }
    Vec result[2];
    uint64_t bits[2][kRegisters];
    const auto merge_half = [&](auto half) {
      const Vec from = b.Half(half);
      Vec t[kRegisters];
      Vec vote = L::Zero();
      for (int m = 0; m < models; ++m) {
        const Vec delta = L::Sub(raw[m].Half(half), from);
        const auto key = L::KeysOf(delta);
        const auto kept = L::Greater(key, at.above[m]);
        if constexpr (kLearn != Learn::kNothing) {
          const auto equal = L::Equal(key, at.middle[m]);
          kept_count[m] = L::CountIf(kept_count[m], kept);
          equal_count[m] = L::CountIf(equal_count[m], equal);
          if constexpr (kLearn == Learn::kInside) {
            bits[half][m] = L::Bits(L::AndNot(L::Within(key, at.lo[m], at.width[m]), equal));
          }
        }
        t[m] = L::Where(kept, delta);
        vote = L::Add(vote, kWeighted && run.vote_weighted ? L::Mul(t[m], L::Set(run.weight[m])) : t[m]);
      }
      const Vec sign = L::SignWhere(run.zero_vote == ZeroVote::kPositive ? L::Negative(vote) : L::NotPositive(vote));
      Vec sum = L::Zero(), divisor = L::Zero();
      auto count = L::SetKey(0);
      for (int m = 0; m < models; ++m) {
        const Vec p = kWeighted ? L::Mul(t[m], L::Set(run.weight[m])) : t[m];
        const auto agrees = L::Positive(L::XorBits(kWeighted && run.vote_weighted ? p : t[m], sign));
        sum = L::AddIf(agrees, sum, p);
        if constexpr (kWeighted) {
          divisor = L::AddIf(agrees, divisor, L::Set(run.unit[m]));
        } else {
          count = L::CountIf(count, agrees);
        }
      }
      if (run.zero_vote == ZeroVote::kDrop) sum = L::Where(L::Or(L::Positive(vote), L::Negative(vote)), sum);
      if constexpr (!kWeighted) divisor = L::ToReal(L::Max(count, L::SetKey(1)));
      if (run.divided) sum = L::Div(sum, kWeighted ? L::Blend(L::IsZero(divisor), one, divisor) : divisor);
      result[half] = L::Add(from, L::Mul(sum, L::Set(run.scale)));
      suspect = L::Or(suspect, L::NotFinite(L::Add(vote, result[half])));
    };
    merge_half(std::integral_constant<int, 0>());
    merge_half(std::integral_constant<int, 1>());
    if constexpr (kLearn == Learn::kInside) {
      for (int m = 0; m < models; ++m) inside[m][g] = static_cast<uint32_t>(bits[0][m] | bits[1][m] << L::kLanes);
    }
    if (stream) {
      P::Stream(out + i, result[0], result[1]);
    } else {
      P::Store(out + i, result[0], result[1]);
    }
  }
  if constexpr (kLearn != Learn::kNothing) {
    for (int m = 0; m < models; ++m) tally->kept[m] = kept_count[m], tally->equal[m] = equal_count[m];
  }
  return !L::Count(suspect);
}

// Calls f(models, weighted) with types that have the number of models, 0 if it is a rare one, and whether a weight is not 1.
template <class L, class F>
inline bool WithRunTypes(const Run<L>& run, F&& f) {
  bool weighted = false;
  for (int m = 0; m < run.models; ++m) weighted |= run.weight[m] != typename L::Real(1);
  const auto with_models = [&](auto weighted_type) {
    switch (run.models) {
      case 2: return f(std::integral_constant<int, 2>(), weighted_type);
      case 3: return f(std::integral_constant<int, 3>(), weighted_type);
      case 4: return f(std::integral_constant<int, 4>(), weighted_type);
      default: return f(std::integral_constant<int, 0>(), weighted_type);
    }
  };
  return weighted ? with_models(std::true_type()) : with_models(std::false_type());
}

// Merges `count` elements from `begin`, a multiple of 2 * kLanes, keeping those above run.above. Returns as MergeTrimmedPiece does; all has
// to be written again then.
template <class L, class T>
bool MergeTrimmed(const MergeJob& job, const Run<L>& run, int64_t begin, int64_t count) {
  Thresholds<L> at;
  const T* x[kMaxModels];
  for (int m = 0; m < run.models; ++m) {
    at.above[m] = L::SetKey(run.above[m]);
    x[m] = At<T>(job.in.model[m], begin);
  }
  T* out = static_cast<T*>(job.out.data) + begin;
  const bool stream = job.stream && Streamable<L, 2>(out);
  return WithRunTypes(run, [&](auto models, auto weighted) {
    return MergeTrimmedPiece<L, decltype(models)::value, decltype(weighted)::value, Learn::kNothing, T>(
        run, at, At<T>(job.in.base, begin), x, out, count, stream, nullptr, nullptr);
  });
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
