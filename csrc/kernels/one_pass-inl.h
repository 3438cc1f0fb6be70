// Merging by guessed thresholds while counting what proves or corrects them (csrc/one_pass.cpp): one read of every tensor instead of two.
#pragma once

#include "kernels/bits-inl.h"
#include "kernels/merge-inl.h"
#include "kernels/select-inl.h"
#include "kernels/trim-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

// Writes down what a piece's words say is inside a bracket. `first`: the piece's place in the chunk.
template <class L, class T>
inline void CollectInside(const uint32_t* inside, const T* base, const T* x, int32_t groups, int32_t first, Collected* into) {
  using S = ScalarLanes<float>;
  constexpr int kBits = 2 * L::kLanes, kWords = 64 / kBits;
  if (into->count + groups * kBits + kFoundMore > into->room) {
    into->count = into->room + 1;
    return;
  }
  uint16_t* const index = into->index + into->count;
  int64_t found = 0;
  for (int32_t g = 0; g < groups; g += kWords) {
    uint64_t bits = 0;
    for (int w = 0; w < kWords && g + w < groups; ++w) bits |= static_cast<uint64_t>(inside[g + w]) << (w * kBits);
    found += ForEachBit(bits, [&](int n, int bit) {
      index[found + n] = static_cast<uint16_t>((g + bit / kBits) * kBits + Pair<L, T>::ElementOfBit(bit % kBits));
    });
  }
  for (int64_t n = 0; n < found; ++n) {
    const int32_t i = index[n];
    into->keys[into->count + n] = S::KeysOf(S::Sub(S::Load(x + i), base ? S::Load(base + i) : 0.0f));
    index[n] = static_cast<uint16_t>(first + i);
  }
  into->count += found;
}

// A number of elements that is a multiple of 2 * kLanes.
template <class L, int kModels, bool kPlain, Learn kLearn, class T>
bool MergeCountingRange(const MergeJob& job, const Run<L>& run, const Bracket* brackets, int64_t begin, int64_t end, Collected* collected) {
  constexpr int64_t kPiece = 2 * L::kLanes * kGroups;
  Thresholds<L> at;
  Tally<L> tally;
  uint32_t inside[kModels ? kModels : kMaxModels][kGroups];
  for (int m = 0; m < run.models; ++m) {
    at.above[m] = L::SetKey(run.above[m]);
    at.middle[m] = L::SetKey(static_cast<int32_t>(brackets[m].mid));
    at.lo[m] = L::SetKey(static_cast<int32_t>(brackets[m].lo));
    at.width[m] = L::SetKey(static_cast<int32_t>(brackets[m].hi - brackets[m].lo));
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
    finite &= MergeTrimmedPiece<L, kModels, kPlain, kLearn, T>(run, at, base ? base + i : nullptr, x, out + i, n, stream, &tally, inside);
    if constexpr (kLearn == Learn::kInside) {
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
  bool tight = true;  // no key can be inside a bracket
  for (int m = 0; m < run.models; ++m) tight &= brackets[m].lo == brackets[m].mid && brackets[m].hi == brackets[m].mid;
  return WithRunTypes(run, [&](auto models, auto plain) {
    constexpr int kModels = decltype(models)::value;
    constexpr bool kPlain = decltype(plain)::value;
    if (tight) return MergeCountingRange<L, kModels, kPlain, Learn::kCounts, T>(job, run, brackets, begin, end, collected);
    return MergeCountingRange<L, kModels, kPlain, Learn::kInside, T>(job, run, brackets, begin, end, collected);
  });
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
      if (into.count < into.room) {
        into.keys[into.count] = keys[i];
        into.index[into.count] = static_cast<uint16_t>(whole - begin + i);
      }
      into.count += into.count <= into.room;
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
