// Merging by guessed thresholds while counting what proves or corrects them (csrc/one_pass.cpp): one read of every tensor instead of two.
#pragma once

#include "kernels/merge-inl.h"
#include "kernels/select-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

constexpr int kGroups = 64;  // pairs of vectors in a piece, for each of which and each model a word of "inside the bracket" bits is noted

// Thresholds, broadcast: what does not fit the registers is read from the first cache.
template <class L>
struct Thresholds {
  typename L::Keys above[kMaxModels];   // kept: key > above
  typename L::Keys middle[kMaxModels];  // the guess
  typename L::Keys below[kMaxModels];   // inside the bracket: key > below and not key > top
  typename L::Keys top[kMaxModels];
};

template <class L>
struct Tally {
  typename L::Keys kept[kMaxModels], equal[kMaxModels];  // per lane
};

// Merges `count` elements, a multiple of 2 * kLanes and at most kGroups times that. The election is by mass and nothing is rescaled.
// Returns false if some delta may not be finite, or the result is NaN, which a Pair need not round.
// kModels: how many models there are, 0 for any number. kWeighted: some weight is not 1. kTight: no key can be inside a bracket.
template <class L, int kModels, bool kWeighted, bool kTight, class T>
inline bool MergeCountingPiece(const Run<L>& run, const Thresholds<L>& at, const T* base, const T* const* x, T* out, int64_t count,
                               bool stream, Tally<L>* tally, uint32_t (*inside)[kGroups]) {
  using P = Pair<L, T>;
  using Vec = typename L::Vec;
  using R = typename L::Real;
  constexpr int64_t kLine = 64, kAhead = 8 * kLine, kSize = sizeof(T);
  const int models = kModels ? kModels : run.models;
  const Vec one = L::Set(R(1));
  constexpr int kRegisters = kModels ? kModels : kMaxModels;
  typename L::Keys kept_count[kRegisters], equal_count[kRegisters];
  for (int m = 0; m < models; ++m) kept_count[m] = tally->kept[m], equal_count[m] = tally->equal[m];
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
        const auto kept = L::Greater(key, at.above[m]), equal = L::Equal(key, at.middle[m]);
        kept_count[m] = L::CountIf(kept_count[m], kept);
        equal_count[m] = L::CountIf(equal_count[m], equal);
        if constexpr (!kTight) {
          const auto between = L::AndNot(L::AndNot(L::Greater(key, at.below[m]), L::Greater(key, at.top[m])), equal);
          bits[half][m] = L::Bits(between);
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
    if constexpr (!kTight) {
      for (int m = 0; m < models; ++m) inside[m][g] = static_cast<uint32_t>(bits[0][m] | bits[1][m] << L::kLanes);
    }
    if (stream) {
      P::Stream(out + i, result[0], result[1]);
    } else {
      P::Store(out + i, result[0], result[1]);
    }
  }
  for (int m = 0; m < models; ++m) tally->kept[m] = kept_count[m], tally->equal[m] = equal_count[m];
  return !L::Count(suspect);
}

// Counts a key inside a bracket, and writes it down while there is room.
inline void Note(int32_t key, int64_t place, Collected* into) {
  if (into->count++ >= into->room) return;
  into->keys[into->count - 1] = key;
  into->index[into->count - 1] = static_cast<uint16_t>(place);
}

// Writes down what a piece's words say is inside a bracket.
template <class L, class T>
inline void CollectInside(const uint32_t* inside, const T* base, const T* x, int32_t groups, int32_t first, Collected* into) {
  using S = ScalarLanes<float>;
  for (int32_t g = 0; g < groups; ++g) {
    for (uint32_t word = inside[g]; word; word &= word - 1) {
      const int32_t i = g * 2 * L::kLanes + Pair<L, T>::ElementOfBit(__builtin_ctz(word));
      const int32_t key = S::KeysOf(S::Sub(S::Load(x + i), base ? S::Load(base + i) : 0.0f));
      Note(key, first + i, into);
    }
  }
}

// A number of elements that is a multiple of 2 * kLanes.
template <class L, int kModels, bool kWeighted, bool kTight, class T>
bool MergeCountingRange(const MergeJob& job, const Run<L>& run, const Bracket* brackets, int64_t begin, int64_t end, Collected* collected) {
  constexpr int64_t kPiece = 2 * L::kLanes * kGroups;
  Thresholds<L> at;
  Tally<L> tally;
  uint32_t inside[kModels ? kModels : kMaxModels][kGroups];
  for (int m = 0; m < run.models; ++m) {
    at.above[m] = L::SetKey(run.above[m]);
    at.middle[m] = L::SetKey(static_cast<int32_t>(brackets[m].mid));
    at.below[m] = L::SetKey(static_cast<int32_t>(brackets[m].lo) - 1);
    at.top[m] = L::SetKey(static_cast<int32_t>(brackets[m].hi));
    tally.kept[m] = tally.equal[m] = L::SetKey(0);
  }
  const T* base = At<T>(job.in.base, begin);
  T* out = static_cast<T*>(job.out.data) + begin;
  const bool stream = job.stream && Streamable<L, 2>(out);
  bool finite = true;
  for (int64_t i = 0; i < end - begin; i += kPiece) {
    const int64_t n = end - begin - i < kPiece ? end - begin - i : kPiece;
    const T* x[kMaxModels];
    for (int m = 0; m < run.models; ++m) x[m] = At<T>(job.in.model[m], begin) + i;
    finite &= MergeCountingPiece<L, kModels, kWeighted, kTight, T>(run, at, base ? base + i : nullptr, x, out + i, n, stream, &tally, inside);
    if constexpr (!kTight) {
      for (int m = 0; m < run.models; ++m) {
        CollectInside<L, T>(inside[m], base ? base + i : nullptr, x[m], static_cast<int32_t>(n / (2 * L::kLanes)), static_cast<int32_t>(i),
                            &collected[m]);
      }
    }
  }
  for (int m = 0; m < run.models; ++m) {
    collected[m].kept += L::ReduceAdd(tally.kept[m]);
    collected[m].equal += L::ReduceAdd(tally.equal[m]);
  }
  L::Fence();
  return finite;
}

template <class L, class T>
bool MergeCountingAs(const MergeJob& job, const Run<L>& run, const Bracket* brackets, int64_t begin, int64_t end, Collected* collected) {
  bool weighted = false, tight = true;
  for (int m = 0; m < run.models; ++m) {
    weighted |= run.weight[m] != 1.0f;
    tight &= brackets[m].lo == brackets[m].mid && brackets[m].hi == brackets[m].mid;
  }
  const auto with_models = [&](auto weighted_type, auto tight_type) {
    constexpr bool kWeighted = decltype(weighted_type)::value, kTight = decltype(tight_type)::value;
    switch (run.models) {
      case 2: return MergeCountingRange<L, 2, kWeighted, kTight, T>(job, run, brackets, begin, end, collected);
      case 3: return MergeCountingRange<L, 3, kWeighted, kTight, T>(job, run, brackets, begin, end, collected);
      case 4: return MergeCountingRange<L, 4, kWeighted, kTight, T>(job, run, brackets, begin, end, collected);
      default: return MergeCountingRange<L, 0, kWeighted, kTight, T>(job, run, brackets, begin, end, collected);
    }
  };
  const std::true_type yes;
  const std::false_type no;
  if (weighted) return tight ? with_models(yes, yes) : with_models(yes, no);
  return tight ? with_models(no, yes) : with_models(no, no);
}

bool MergeCounting(const MergeJob& job, const Bracket* brackets, uint64_t keep_equal, int64_t begin, int64_t end, Collected* collected) {
  using L = Lanes;
  Run<L> run = MakeRun<L>(job);
  for (int m = 0; m < run.models; ++m) {
    run.above[m] = static_cast<int32_t>(brackets[m].mid) - static_cast<int32_t>(keep_equal >> m & 1);
    collected[m].kept = collected[m].equal = collected[m].count = 0;
  }
  const int64_t whole = begin + (end - begin) / (2 * L::kLanes) * (2 * L::kLanes);
  bool finite = WithStorage(job.out.dtype, true, [&](auto storage) {
    return MergeCountingAs<L, typename decltype(storage)::Type>(job, run, brackets, begin, whole, collected);
  });
  if (whole == end) return finite;
  finite &= MergeThroughScratch<L, Vote::kMass, Sparsify::kMagnitude>(job, run, whole, end - whole, nullptr) < KeyOf<float>::kInfinity;
  for (int m = 0; m < run.models; ++m) {
    int32_t keys[2 * L::kLanes];
    const int32_t n = static_cast<int32_t>(end - whole), middle = static_cast<int32_t>(brackets[m].mid);
    KeysRange<L>(job.in, m, whole, end, keys);
    Collected& into = collected[m];
    for (int32_t i = 0; i < n; ++i) {
      into.kept += keys[i] > run.above[m];
      into.equal += keys[i] == middle;
      if (keys[i] < brackets[m].lo || keys[i] > brackets[m].hi || keys[i] == middle) continue;
      Note(keys[i], whole - begin + i, &into);
    }
  }
  return finite;
}

// Merges single elements of a chunk again: begin + index[0], begin + index[1], ...; no selection's key is 0.
void MergeElements(const MergeJob& job, int64_t begin, const uint16_t* index, int64_t count) {
  using L = Lanes;
  using S = ScalarLanes<float>;
  constexpr int kPiece = 64;
  alignas(64) float scratch[kMaxModels][kPiece], base[kPiece], out[kPiece];
  Run<L> run = MakeRun<L>(job);
  const float* x[kMaxModels];
  for (int m = 0; m < run.models; ++m) {
    run.above[m] = static_cast<int32_t>(job.selection[m].key) - 1;
    x[m] = scratch[m];
  }
  WithStorage(job.out.dtype, true, [&](auto storage) {
    using T = typename decltype(storage)::Type;
    const T* b = At<T>(job.in.base, begin);
    for (int64_t done = 0; done < count; done += kPiece) {
      const int n = static_cast<int>(count - done < kPiece ? count - done : kPiece);
      for (int i = 0; i < kPiece; ++i) base[i] = i < n && b ? S::Load(b + index[done + i]) : 0.0f;
      for (int m = 0; m < run.models; ++m) {
        const T* from = At<T>(job.in.model[m], begin);
        const Selection& chosen = job.selection[m];
        for (int i = 0; i < kPiece; ++i) {
          scratch[m][i] = i < n ? S::Load(from + index[done + i]) : 0.0f;
          // An equal that is not kept: a delta of zero is not kept either.
          if (i < n && S::KeysOf(S::Sub(scratch[m][i], base[i])) == chosen.key && begin + index[done + i] > chosen.cut) scratch[m][i] = base[i];
        }
      }
      MergeRun<L, Vote::kMass, Sparsify::kMagnitude, float>(run, base, x, out, kPiece, false, nullptr);
      for (int i = 0; i < n; ++i) S::Store(static_cast<T*>(job.out.data) + begin + index[done + i], out[i]);
    }
    return 0;
  });
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
