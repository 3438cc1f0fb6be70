// TIES' trim, election and mean for pairs of vectors: the merge whose arithmetic, not its memory, sets the pace.
#pragma once

#include <limits>

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
// kModels: how many models there are, 0 for any number. kPlain: weights and scale are 1, the sum is divided, and no vote is dropped.
template <class L, int kModels, bool kPlain, Learn kLearn, class T>
inline bool MergeTrimmedPiece(const Run<L>& run, const Thresholds<L>& at, const T* base, const T* const* x, T* out, int64_t count,
                              bool stream, Tally<L>* tally, uint32_t (*inside)[kGroups]) {
  using P = Pair<L, T>;
  using Vec = typename L::Vec;
  using R = typename L::Real;
  constexpr int64_t kLine = 64, kAhead = 8 * kLine, kSize = sizeof(T);
  const int models = kModels ? kModels : run.models;
  constexpr int kRegisters = kModels ? kModels : kMaxModels;
  typename L::Keys kept_count[kRegisters], equal_count[kRegisters];
  if constexpr (kLearn != Learn::kNothing) {
    for (int m = 0; m < models; ++m) kept_count[m] = tally->kept[m], equal_count[m] = tally->equal[m];
  }
  // A vote below this elects the negative side.
  const Vec bound = L::Set(run.zero_vote == ZeroVote::kPositive ? R(0) : std::numeric_limits<R>::denorm_min());
  auto largest = L::SetKey(0);
  for (int64_t i = 0, g = 0; i < count; i += 2 * L::kLanes, ++g) {
    const P b = base ? P::Load(base + i) : P{};
    P raw[kRegisters];
    for (int m = 0; m < models; ++m) raw[m] = P::Load(x[m] + i);
    // So much is done per line that out-of-order execution does not reach the next ones, and the hardware's prefetcher alone is late.
    for (int64_t next = i + kAhead / kSize; next < i + kAhead / kSize + 2 * L::kLanes; next += kLine / kSize) {
      if (base) __builtin_prefetch(base + next);
      for (int m = 0; m < models; ++m) __builtin_prefetch(x[m] + next);
    }
    // Both halves step by step: each is a long chain of latencies.
    const Vec from[2] = {b.Half(0), b.Half(1)};
    Vec t[kRegisters][2], vote[2] = {L::Zero(), L::Zero()};
    uint64_t bits[kRegisters] = {};
    for (int m = 0; m < models; ++m) {
      for (int h = 0; h < 2; ++h) {
        const Vec delta = L::Sub(raw[m].Half(h), from[h]);
        const auto key = L::KeysOf(delta);
        const auto kept = L::Greater(key, at.above[m]);
        if constexpr (kLearn != Learn::kNothing) {
          const auto equal = L::Equal(key, at.middle[m]);
          kept_count[m] = L::CountIf(kept_count[m], kept);
          equal_count[m] = L::CountIf(equal_count[m], equal);
          if constexpr (kLearn == Learn::kInside) {
            bits[m] |= L::Bits(L::AndNot(L::Within(key, at.lo[m], at.width[m]), equal)) << (h * L::kLanes);
          }
        }
        t[m][h] = L::Where(kept, delta);
        vote[h] = L::Add(vote[h], !kPlain && run.vote_weighted ? L::Mul(t[m][h], L::Set(run.weight[m])) : t[m][h]);
      }
    }
    const Vec sign[2] = {L::SignWhere(L::Below(vote[0], bound)), L::SignWhere(L::Below(vote[1], bound))};
    Vec sum[2] = {L::Zero(), L::Zero()}, divisor[2] = {L::Zero(), L::Zero()};
    typename L::Keys agreeing[2] = {L::SetKey(0), L::SetKey(0)};
    for (int m = 0; m < models; ++m) {
      for (int h = 0; h < 2; ++h) {
        const Vec p = kPlain ? t[m][h] : L::Mul(t[m][h], L::Set(run.weight[m]));
        const auto agrees = L::Positive(L::XorBits(!kPlain && run.vote_weighted ? p : t[m][h], sign[h]));
        sum[h] = L::AddIf(agrees, sum[h], p);
        if constexpr (kPlain) {
          agreeing[h] = L::CountIf(agreeing[h], agrees);
        } else {
          divisor[h] = L::AddIf(agrees, divisor[h], L::Set(run.unit[m]));
        }
      }
    }
    Vec result[2];
    for (int h = 0; h < 2; ++h) {
      if constexpr (kPlain) {
        result[h] = L::Add(from[h], L::Div(sum[h], L::ToReal(L::Max(agreeing[h], L::SetKey(1)))));
      } else {
        if (run.zero_vote == ZeroVote::kDrop) sum[h] = L::Where(L::Or(L::Positive(vote[h]), L::Negative(vote[h])), sum[h]);
        if (run.divided) sum[h] = L::Div(sum[h], L::Blend(L::IsZero(divisor[h]), L::Set(R(1)), divisor[h]));
        result[h] = L::Add(from[h], L::Mul(sum[h], L::Set(run.scale)));
      }
    }
    largest = L::Max(largest, L::KeysOf(L::Add(L::Add(vote[0], result[0]), L::Add(vote[1], result[1]))));
    if constexpr (kLearn == Learn::kInside) {
      for (int m = 0; m < models; ++m) inside[m][g] = static_cast<uint32_t>(bits[m]);
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
  return L::ReduceMax(largest) < KeyOf<R>::kInfinity;
}

// Calls f(models, plain) with types that have MergeTrimmedPiece's kModels and kPlain.
template <class L, class F>
inline bool WithRunTypes(const Run<L>& run, F&& f) {
  const auto with_models = [&](auto plain) {
    switch (run.models) {
      case 2: return f(std::integral_constant<int, 2>(), plain);
      case 3: return f(std::integral_constant<int, 3>(), plain);
      case 4: return f(std::integral_constant<int, 4>(), plain);
      default: return f(std::integral_constant<int, 0>(), plain);
    }
  };
  const bool plain = run.ones && run.divided && run.zero_vote != ZeroVote::kDrop;
  return plain ? with_models(std::true_type()) : with_models(std::false_type());
}

// Merges `count` elements from `begin`, a multiple of 2 * kLanes, keeping those above run.above. Returns as MergeTrimmedPiece does; all has
// to be written again then.
template <class L, class T>
bool MergeTrimmed(const MergeJob& job, const Run<L>& run, int64_t begin, int64_t count) {
  Thresholds<L> at;
  const T* x[kMaxModels];
  for (int m = 0; m < run.models; ++m) {
    if (run.above[m] >= KeyOf<typename L::Real>::kInfinity) return false;  // what is not finite would go unnoticed if it is not kept
    at.above[m] = L::SetKey(run.above[m]);
    x[m] = At<T>(job.in.model[m], begin);
  }
  T* out = static_cast<T*>(job.out.data) + begin;
  const bool stream = job.stream && Streamable<L, 2>(out);
  return WithRunTypes(run, [&](auto models, auto plain) {
    return MergeTrimmedPiece<L, decltype(models)::value, decltype(plain)::value, Learn::kNothing, T>(
        run, at, At<T>(job.in.base, begin), x, out, count, stream, nullptr, nullptr);
  });
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
