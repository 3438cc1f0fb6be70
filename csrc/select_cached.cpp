// As in select.cpp a sample gives a bracket, a counting pass proves it and collects what lies inside, and the k-th is selected there. But
// passes cost little here, while what is sampled and collected is a larger part of so few elements: the bracket is narrower, as a miss only
// costs another pass; the pass counts by blocks, so that the last element kept is looked for in one block; and nothing branches on a key.
#include "select_cached.h"

#include <algorithm>
#include <array>
#include <limits>

#include "dispatch.h"
#include "rank.h"
#include "sample.h"
#include "thread_pool.h"

namespace pymerge {
namespace {

constexpr int64_t kDirect = 1 << 12;  // elements up to which all keys are looked at, without a sample
constexpr int64_t kFew = 256;         // keys of which the k-th is found by comparing them
constexpr int kRun = 16;              // elements sampled side by side: a cache line or two
constexpr double kSpread = 3.5;       // half the bracket's width in standard deviations; a miss is cheap here

template <class Key>
struct Scratch {
  std::vector<Key> keys, work;
};

// A thread's own, kept: fresh memory's page faults cost more than a selection.
template <class Key>
Scratch<Key>& ScratchFor(int64_t n) {
  static thread_local Scratch<Key> scratch;
  const size_t room = static_cast<size_t>(n) + 16;  // a counting pass stores whole vectors
  if (scratch.keys.size() < room) {
    scratch.keys.resize(room);
    scratch.work.resize(room);
  }
  return scratch;
}

// Moves the keys in [lo, hi] to the front of `to`, which may be `keys` and has room for a vector more; returns their number. Keys are the
// bits of non-negative numbers, so that the counting pass does it.
template <class Key>
int64_t Gather(const Key* keys, int64_t n, Key lo, Key hi, Key* to) {
  Deltas in;
  in.n = n;
  in.models = 1;
  in.f64 = sizeof(Key) == sizeof(double);
  in.model[0] = {keys, in.f64 ? DType::kF64 : DType::kF32};
  constexpr int64_t kNone = -1;
  return CurrentKernels().count(in, 0, {lo, kNone, hi}, 0, n, to).collected;
}

// The k-th largest of n keys, all in [lo, hi], and its rank among those equal to it, both from 1. Reorders the keys.
template <class Key>
Key Kth(Key* keys, int64_t n, int64_t k, Key lo, Key hi, int64_t* rank) {
  while (n > kFew && lo < hi) {
    Histogram<Key> histogram(lo, hi, std::min(n, kDigitBins));
    for (int64_t i = 0; i < n; ++i) histogram.Add(keys[i]);
    histogram.Find(&k, &lo, &hi);
    n = Gather(keys, n, lo, hi, keys);
  }
  if (lo < hi) return KthLargest(keys, n, k, rank);
  *rank = k;
  return lo;
}

template <class Key>
class CachedSelection {
 public:
  CachedSelection(const Deltas& in, int model)
      : kernels_(CurrentKernels()), in_(in), model_(model), n_(in.n), keys_(ScratchFor<Key>(in.n).keys.data()), work_(ScratchFor<Key>(in.n).work.data()) {}

  Selection Find(int64_t k, bool tie_all) {
    if (k <= 0 || n_ == 0) return {std::numeric_limits<int64_t>::max(), -1};
    if (k >= n_) return {0, n_ - 1};
    if (n_ > kDirect) {
      Guess(k);
      while (!Count(k)) {
      }
      return Choose(k, tie_all);
    }
    int64_t rank;
    kernels_.keys(in_, model_, 0, n_, keys_);
    std::copy(keys_, keys_ + n_, work_);
    const Key key = Kth(work_, n_, k, Key{0}, kTop, &rank);
    return {key, tie_all ? n_ - 1 : IndexOfEqual(keys_, n_, key, rank)};
  }

 private:
  static constexpr Key kTop = std::numeric_limits<Key>::max();
  static constexpr size_t kBlocks = kMostCached / kSumBlock;

  void Guess(int64_t k) {
    const int64_t runs = std::max<int64_t>(n_ / 64 / kRun, 16), size = runs * kRun;
    ForEachRun(n_, kRun, runs, [&](int64_t r, int64_t begin) { kernels_.keys(in_, model_, begin, begin + kRun, keys_ + r * kRun); });
    bracket_ = BracketOfSample(keys_, size, static_cast<double>(k) / static_cast<double>(n_), kSpread);
  }

  // Counts the keys against the bracket, and collects those inside into keys_; false, with another bracket, when the k-th lies outside.
  bool Count(int64_t k) {
    above_ = equal_ = collected_ = 0;
    for (int64_t begin = 0; begin < n_; begin += kSumBlock) {
      const BracketCount count =
          kernels_.count(in_, model_, bracket_, begin, std::min(begin + kSumBlock, n_), keys_ + collected_);
      blocks_[static_cast<size_t>(begin / kSumBlock)] = count;
      above_ += count.above;
      equal_ += count.equal;
      collected_ += count.collected;
    }
    if (k <= above_) {
      bracket_ = {bracket_.hi + 1, bracket_.hi + 1, kTop};
      return false;
    }
    if (k > above_ + equal_ + collected_) {
      bracket_ = {0, 0, bracket_.lo - 1};
      return false;
    }
    return true;
  }

  Selection Choose(int64_t k, bool tie_all) {
    const Key lo = static_cast<Key>(bracket_.lo), mid = static_cast<Key>(bracket_.mid), hi = static_cast<Key>(bracket_.hi);
    const int64_t upper = Gather(keys_, collected_, static_cast<Key>(mid + 1), hi, work_);
    Key key = mid;
    int64_t rank = k - above_ - upper;
    if (rank <= 0) {
      key = Kth(work_, upper, k - above_, static_cast<Key>(mid + 1), hi, &rank);
    } else if (rank > equal_) {
      const int64_t lower = Gather(keys_, collected_, lo, static_cast<Key>(mid - 1), work_);
      key = Kth(work_, lower, rank - equal_, lo, static_cast<Key>(mid - 1), &rank);
    }
    return {key, tie_all ? n_ - 1 : LastKept(key, rank)};
  }

  // Flat index of the rank-th element of those with this key.
  int64_t LastKept(Key key, int64_t rank) {
    const Key* collected = keys_;
    for (size_t b = 0;; ++b) {
      const BracketCount& block = blocks_[b];
      const int64_t here = key == bracket_.mid ? block.equal : std::count(collected, collected + block.collected, key);
      if (rank <= here) {
        const int64_t begin = static_cast<int64_t>(b) * kSumBlock, end = std::min(begin + kSumBlock, n_);
        kernels_.keys(in_, model_, begin, end, keys_);
        return begin + IndexOfEqual(keys_, end - begin, key, rank);
      }
      rank -= here;
      collected += block.collected;
    }
  }

  const Kernels& kernels_;
  const Deltas& in_;
  const int model_;
  const int64_t n_;
  Key *keys_, *work_;
  Bracket bracket_;
  std::array<BracketCount, kBlocks> blocks_;
  int64_t above_ = 0, equal_ = 0, collected_ = 0;
};

}  // namespace

std::vector<Selection> SelectCached(const Deltas& in, const std::vector<int64_t>& counts, bool tie_all, int threads) {
  std::vector<Selection> result(counts.size());
  ParallelFor(static_cast<int64_t>(counts.size()), threads, [&](int64_t m, int) {
    const int model = static_cast<int>(m);
    result[m] = in.f64 ? CachedSelection<int64_t>(in, model).Find(counts[m], tie_all) : CachedSelection<int32_t>(in, model).Find(counts[m], tie_all);
  });
  return result;
}

}  // namespace pymerge
