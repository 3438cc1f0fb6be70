// The fused sparsify-elect-combine kernel: DESIGN's one merge operation, written once over the vector type.
#pragma once

#include "kernels/philox-inl.h"
#include "kernels/run-inl.h"
#include "kernels/trim-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

// Merges `count` elements, a multiple of kLanes. Returns the largest key of any delta and adds the balance of the votes to *balance,
// which when given means that only that is wanted and nothing is stored.
template <class L, Vote kVote, Sparsify kSparsify, class T>
inline typename L::Key MergeRun(const Run<L>& run, const T* base, const T* const* x, T* out, int64_t count, bool stream,
                                int64_t* balance) {
  using Vec = typename L::Vec;
  using R = typename L::Real;
  auto largest = L::SetKey(0);
  const Vec one = L::Set(R(1)), minus_one = L::Set(R(-1));
  for (int64_t i = 0; i < count; i += L::kLanes) {
    const Vec b = base ? L::Load(base + i) : L::Zero();
    Vec vote = L::Zero(), sum = L::Zero(), sum_negative = L::Zero(), divisor = L::Zero(), divisor_negative = L::Zero();
    for (int m = 0; m < run.models; ++m) {
      Vec t = L::Sub(L::Load(x[m] + i), b);
      const auto key = L::KeysOf(t);
      largest = L::Max(largest, key);
      if (run.rescaled) t = L::Mul(t, L::Set(run.rescale[m]));
      typename L::Mask kept{};
      if constexpr (kSparsify == Sparsify::kMagnitude) kept = L::Greater(key, L::SetKey(run.above[m]));
      if constexpr (kSparsify == Sparsify::kBand) {
        kept = L::AndNot(L::Greater(key, L::SetKey(run.above[m])), L::Greater(key, L::SetKey(run.larger[m])));
      }
      if constexpr (kSparsify == Sparsify::kBernoulli) kept = L::FromBits(run.keep->word[m][i / 64] >> (i % 64));
      if constexpr (kSparsify != Sparsify::kNone) t = L::Where(kept, t);
      const Vec p = L::Mul(t, L::Set(run.weight[m]));
      if constexpr (kVote == Vote::kNone) {
        sum = L::Add(sum, p);
        if (run.count_kept) divisor = kSparsify == Sparsify::kNone ? L::Add(divisor, one) : L::AddIf(kept, divisor, one);
      } else {
        const Vec v = run.vote_weighted ? p : t;
        const auto positive = L::Positive(v), negative = L::Negative(v);
        if constexpr (kVote == Vote::kMass) {
          vote = L::Add(vote, v);
        } else {
          vote = L::AddIf(negative, L::AddIf(positive, vote, one), minus_one);
        }
        sum = L::AddIf(positive, sum, p);
        sum_negative = L::AddIf(negative, sum_negative, p);
        if (run.divided) {
          const Vec u = L::Set(run.unit[m]);
          divisor = L::AddIf(positive, divisor, u);
          divisor_negative = L::AddIf(negative, divisor_negative, u);
        }
      }
    }
    if constexpr (kVote != Vote::kNone) {
      const auto positive = L::Positive(vote), negative = L::Negative(vote);
      if (balance) {
        *balance += L::Count(positive) - L::Count(negative);
        continue;
      }
      const auto wins = run.zero_vote == ZeroVote::kPositive ? L::Not(negative) : positive;
      sum = L::Blend(wins, sum, sum_negative);
      divisor = L::Blend(wins, divisor, divisor_negative);
      if (run.zero_vote == ZeroVote::kDrop) sum = L::Where(L::Or(positive, negative), sum);
    }
    if (run.divided) {
      if (kVote == Vote::kNone && !run.count_kept) {
        sum = L::Div(sum, L::Set(run.total));
      } else {
        sum = L::Div(sum, L::Blend(L::IsZero(divisor), one, divisor));
      }
    }
    const Vec result = L::Add(b, L::Mul(sum, L::Set(run.scale)));
    if (stream) {
      L::Stream(out + i, result);
    } else {
      L::Store(out + i, result);
    }
  }
  return L::ReduceMax(largest);
}

// The same for whole deltas without an election (linear, task arithmetic), `count` of them from `begin`, a multiple of 2 * kLanes. Merging so few
// models on two cores is bound by memory only if nothing is done twice. kOnes: run.ones; the multiplications left out leave time to divide.
// Returns false if some result may not be finite, which it is not where a delta is not; then all has to be written again, as a Pair need
// not round NaN.
template <class L, bool kOnes, class T>
bool MergeWhole(const MergeJob& job, const Run<L>& run, int64_t begin, int64_t count) {
  using Vec = typename L::Vec;
  using P = Pair<L, T>;
  const T* base = At<T>(job.in.base, begin);
  const T* x[kMaxModels];
  for (int m = 0; m < run.models; ++m) x[m] = At<T>(job.in.model[m], begin);
  T* out = static_cast<T*>(job.out.data) + begin;
  const bool stream = job.stream && Streamable<L, 2>(out);
  const Vec scale = L::Set(run.scale), total = L::Set(run.count_kept ? static_cast<typename L::Real>(run.models) : run.total);
  auto largest = L::SetKey(0);
  for (int64_t i = 0; i < count; i += 2 * L::kLanes) {
    const P b = base ? P::Load(base + i) : P{};
    const Vec from[2] = {b.Half(0), b.Half(1)};
    Vec sum[2] = {L::Zero(), L::Zero()};
    for (int m = 0; m < run.models; ++m) {
      const P pair = P::Load(x[m] + i);
      const Vec weight = L::Set(run.weight[m]);
      for (int h = 0; h < 2; ++h) {
        const Vec delta = L::Sub(pair.Half(h), from[h]);
        sum[h] = L::Add(sum[h], kOnes ? delta : L::Mul(delta, weight));
      }
    }
    for (int h = 0; h < 2; ++h) {
      if (run.divided) sum[h] = L::Div(sum[h], total);
      sum[h] = L::Add(from[h], kOnes ? sum[h] : L::Mul(sum[h], scale));
    }
    largest = L::Max(largest, L::KeysOf(L::Add(sum[0], sum[1])));
    if (stream) {
      P::Stream(out + i, sum[0], sum[1]);
    } else {
      P::Store(out + i, sum[0], sum[1]);
    }
  }
  return L::ReduceMax(largest) < KeyOf<typename L::Real>::kInfinity;
}

// Merges [begin, begin + count) of one block by way of scratch in the compute dtype: mixed dtypes, tails.
template <class L, Vote kVote, Sparsify kSparsify>
typename L::Key MergeThroughScratch(const MergeJob& job, const Run<L>& run, int64_t begin, int64_t count, int64_t* balance) {
  using R = typename L::Real;
  constexpr int kPiece = 256;  // so that 64 models' scratch stays within the second cache
  alignas(64) R scratch[kMaxModels + 2][kPiece];
  KeepBlock shifted;
  Run<L> piece_run = run;
  auto largest = typename L::Key(0);
  for (int64_t done = 0; done < count; done += kPiece) {
    const int64_t n = count - done < kPiece ? count - done : kPiece;
    const int64_t padded = (n + L::kLanes - 1) / L::kLanes * L::kLanes;
    const R* x[kMaxModels];
    R* base = scratch[kMaxModels];
    R* out = scratch[kMaxModels + 1];
    Widen(job.in.base, begin + done, n, base);
    for (int64_t i = n; i < padded; ++i) base[i] = R(0);
    for (int m = 0; m < run.models; ++m) {
      Widen(job.in.model[m], begin + done, n, scratch[m]);
      for (int64_t i = n; i < padded; ++i) scratch[m][i] = R(0);
      x[m] = scratch[m];
      if (kSparsify == Sparsify::kBernoulli) {
        // A tail starts anywhere in the block: move its bits to the front.
        const int64_t first = begin % kBlock + done;
        for (int w = 0; w * 64 < padded; ++w) {
          const uint64_t* word = run.keep->word[m] + first / 64 + w;
          shifted.word[m][w] = first % 64 ? word[0] >> (first % 64) | word[1] << (64 - first % 64) : word[0];
        }
      }
    }
    piece_run.keep = &shifted;
    const auto top = MergeRun<L, kVote, kSparsify, R>(piece_run, base, x, out, padded, false, balance);
    largest = top > largest ? top : largest;
    if (!balance) Narrow(out, begin + done, n, job.out);
  }
  return largest;
}

template <class L, Vote kVote, Sparsify kSparsify, class T>
typename L::Key MergeSpan(const MergeJob& job, Run<L>& run, bool direct, int64_t begin, int64_t end, int64_t* balance) {
  using Key = typename L::Key;
  Key largest = 0;
  KeepBlock keep;
  const PhiloxKeys keys(job.seed);
  for (int64_t i = begin; i < end;) {
    int64_t stop = end;
    if constexpr (kSparsify == Sparsify::kBernoulli) {
      if (stop > (i / kBlock + 1) * kBlock) stop = (i / kBlock + 1) * kBlock;
      for (int m = 0; m < run.models; ++m) {
        for (int64_t w = 0; w * 64 < stop - i; w += 2) {
          KeepBits(keys, job.tensor_id, static_cast<uint32_t>(m), job.keep_below[m], job.in.first + i + w * 64, keep.word[m] + w);
        }
        keep.word[m][(stop - i + 63) / 64] = 0;
      }
      run.keep = &keep;
    }
    if constexpr (std::is_same_v<L, Lanes>) {
      // Kernels for pairs of vectors, which give up where something is not finite.
      const int64_t pairs = direct && !run.rescaled ? (stop - i) / (2 * L::kLanes) * (2 * L::kLanes) : 0;
      if constexpr (kVote == Vote::kNone && kSparsify == Sparsify::kNone) {
        if (run.ones ? MergeWhole<L, true, T>(job, run, i, pairs) : MergeWhole<L, false, T>(job, run, i, pairs)) i += pairs;
      }
      if constexpr (kVote == Vote::kMass && kSparsify == Sparsify::kMagnitude) {
        if (!balance && MergeTrimmed<L, T>(job, run, i, pairs)) i += pairs;
      }
    }
    const int64_t whole = direct ? (stop - i) / L::kLanes * L::kLanes : 0;
    if (whole) {
      const T* x[kMaxModels];
      for (int m = 0; m < run.models; ++m) x[m] = At<T>(job.in.model[m], i);
      T* out = static_cast<T*>(job.out.data) + i;
      const Key top = MergeRun<L, kVote, kSparsify, T>(run, At<T>(job.in.base, i), x, out, whole, job.stream && Streamable<L>(out), balance);
      largest = top > largest ? top : largest;
    }
    if (i + whole < stop) {
      const Key top = MergeThroughScratch<L, kVote, kSparsify>(job, run, i + whole, stop - i - whole, balance);
      largest = top > largest ? top : largest;
    }
    i = stop;
  }
  L::Fence();
  return largest;
}

template <class L, Vote kVote, class T>
typename L::Key MergeVoted(const MergeJob& job, Run<L>& run, bool direct, int64_t begin, int64_t end, int64_t* balance) {
  switch (job.sparsify) {
    case Sparsify::kMagnitude: return MergeSpan<L, kVote, Sparsify::kMagnitude, T>(job, run, direct, begin, end, balance);
    case Sparsify::kBand: return MergeSpan<L, kVote, Sparsify::kBand, T>(job, run, direct, begin, end, balance);
    case Sparsify::kBernoulli: return MergeSpan<L, kVote, Sparsify::kBernoulli, T>(job, run, direct, begin, end, balance);
    case Sparsify::kNone: break;
  }
  return MergeSpan<L, kVote, Sparsify::kNone, T>(job, run, direct, begin, end, balance);
}

template <class L, class T>
typename L::Key MergeChosen(const MergeJob& job, Run<L>& run, bool direct, int64_t begin, int64_t end, int64_t* balance) {
  switch (job.vote) {
    case Vote::kMass: return MergeVoted<L, Vote::kMass, T>(job, run, direct, begin, end, balance);
    case Vote::kCount: return MergeVoted<L, Vote::kCount, T>(job, run, direct, begin, end, balance);
    case Vote::kNone: break;
  }
  return MergeVoted<L, Vote::kNone, T>(job, run, direct, begin, end, balance);
}

// Whether all tensors share one dtype that the lanes load and store, so that no scratch is needed.
inline bool Uniform(const MergeJob& job) {
  bool same = job.in.f64 == (job.out.dtype == DType::kF64) && (!job.in.base.data || job.in.base.dtype == job.out.dtype);
  for (int m = 0; m < job.in.models; ++m) same &= job.in.model[m].dtype == job.out.dtype;
  return same;
}

template <class L>
typename L::Key MergeRange(const MergeJob& job, int64_t begin, int64_t end, int64_t* balance) {
  using Key = typename L::Key;
  Run<L> run = MakeRun<L>(job);
  Key largest = 0;
  const bool direct = Uniform(job);
  while (begin < end) {
    // A cut makes one comparison depend on the index; between cuts "key > key_m" or "key >= key_m" is all there is.
    int64_t stop = end;
    const auto threshold = [&](const Selection& s) {
      const Key key = s.key > KeyOf<typename L::Real>::kMax ? KeyOf<typename L::Real>::kMax : static_cast<Key>(s.key);
      if (begin <= s.cut && s.cut + 1 < stop) stop = s.cut + 1;
      return begin <= s.cut ? key - 1 : key;
    };
    if (job.sparsify == Sparsify::kMagnitude || job.sparsify == Sparsify::kBand) {
      for (int m = 0; m < run.models; ++m) {
        run.above[m] = threshold(job.selection[m]);
        if (job.sparsify == Sparsify::kBand) run.larger[m] = threshold(job.larger[m]);
      }
    }
    Key top;
    if constexpr (sizeof(typename L::Real) == sizeof(double)) {
      top = MergeChosen<L, double>(job, run, direct, begin, stop, balance);
    } else {
      top = WithStorage(job.out.dtype, direct, [&](auto storage) {
        return MergeChosen<L, typename decltype(storage)::Type>(job, run, direct, begin, stop, balance);
      });
    }
    largest = top > largest ? top : largest;
    begin = stop;
  }
  return largest;
}

bool Merge(const MergeJob& job, int64_t begin, int64_t end) {
  if (job.in.f64) return MergeRange<ScalarLanes<double>>(job, begin, end, nullptr) < KeyOf<double>::kInfinity;
  return MergeRange<Lanes>(job, begin, end, nullptr) < KeyOf<float>::kInfinity;
}

int64_t Balance(const MergeJob& job, int64_t begin, int64_t end) {
  int64_t balance = 0;
  if (job.in.f64) {
    MergeRange<ScalarLanes<double>>(job, begin, end, &balance);
  } else {
    MergeRange<Lanes>(job, begin, end, &balance);
  }
  return balance;
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
