// One model's search for its k-th magnitude: a bracket, and the passes over the keys that prove it or say where to look next.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "arena.h"
#include "dispatch.h"
#include "rank.h"
#include "sample.h"
#include "types.h"

namespace pymerge {

template <class Key>
class Search {
 public:
  // 0 < k < n, of n keys. `limit`: how many to collect at most. `width`: of the sample's bracket (sample.h).
  Search(int model, int64_t k, int64_t n, int64_t limit, double width) : model_(model), k_(k), n_(n), limit_(limit), width_(width) {}

  int Model() const { return model_; }
  int64_t Guess() const { return bracket_.mid; }
  // Of a finished search: the k-th key, and how many elements are on different sides of it and of the guess, or more.
  Key Kth() const { return key_; }
  int64_t Strayed() const { return strayed_; }

  // Elements [begin, end) of a part are in the sample.
  void Sample(const Deltas& part, int64_t begin, int64_t end) {
    const size_t used = sample_.size();
    sample_.resize(used + static_cast<size_t>(end - begin));
    CurrentKernels().keys(part, model_, begin, end, sample_.data() + used);
  }

  // Starts a pass: with the sample's bracket where there is one.
  void Begin() {
    chunks_.clear();
    collected_ = 0;
    if (sample_.empty()) return;
    const std::vector<Key> sample = std::move(sample_);
    sample_.clear();
    const int64_t size = static_cast<int64_t>(sample.size());
    bracket_ = BracketOfSample(sample.data(), size, static_cast<double>(k_) / static_cast<double>(n_), width_);
    const auto inside =
        std::count_if(sample.begin(), sample.end(), [&](Key x) { return x >= bracket_.lo && x <= bracket_.hi && x != bracket_.mid; });
    // Twice as many as expected fit: a sample errs, and its error costs a pass.
    if (2 * static_cast<double>(inside) / static_cast<double>(size) * static_cast<double>(n_) > static_cast<double>(limit_)) UseHistogram();
  }

  void SetChunks(size_t count) { chunks_.resize(count); }

  // Elements [begin, end) of a part are a chunk of the pass. Different ones may be counted at the same time.
  void Count(size_t chunk, const Deltas& part, int64_t begin, int64_t end, Arena<Key>* arena) {
    Key* staging = arena->Staging(kChunk + 16);
    const BracketCount count = CurrentKernels().count(part, model_, bracket_, begin, end, staging);
    Chunk& found = chunks_[chunk];
    found.above = static_cast<int32_t>(count.above);
    found.equal = static_cast<int32_t>(count.equal);
    found.collected = static_cast<int32_t>(count.collected);
    if (histogram_) {
      std::lock_guard<std::mutex> lock(mutex_);
      for (int64_t i = 0; i < count.collected; ++i) histogram_->Add(staging[i]);
    } else if (collected_.fetch_add(count.collected, std::memory_order_relaxed) < limit_) {
      found.keys = arena->Keep(staging, count.collected);
    }
  }

  // Ends a pass: finds the k-th key and, unless all ties are kept, its rank among its equals in chunks; or else says where to look next.
  bool Finish(bool tie_all) {
    const Key lo = static_cast<Key>(bracket_.lo), mid = static_cast<Key>(bracket_.mid), hi = static_cast<Key>(bracket_.hi);
    int64_t above = 0, equal = 0, collected = 0, upper = 0;
    bool complete = true;
    for (const Chunk& chunk : chunks_) {
      above += chunk.above;
      equal += chunk.equal;
      collected += chunk.collected;
      complete &= !chunk.collected || chunk.keys;
      if (chunk.keys) upper += std::count_if(chunk.keys, chunk.keys + chunk.collected, [&](Key x) { return x > mid; });
    }
    if (k_ <= above) return LookIn(hi + 1, kTop, n_);
    if (k_ > above + collected + equal) return LookIn(0, lo - 1, n_);
    int64_t from_guess = above + upper + equal;  // keys from the guess up
    int64_t ties = equal;                        // keys that equal the k-th
    rank_ = k_ - above;
    if (histogram_) {
      histogram_->Add(mid, equal);
      Key low, high;
      ties = histogram_->Find(&rank_, &low, &high);
      // Where its elements are, only a pass with another guess says.
      if (!histogram_->HasSingleKeys() || (!tie_all && low != mid)) return LookIn(low, high, ties);
      key_ = low;
      from_guess = above + histogram_->From(mid);
    } else if (!complete) {
      return LookIn(lo, hi, n_);
    } else if (rank_ <= upper) {
      ties = SelectCollected(mid + 1, hi, upper);
    } else if (rank_ > upper + equal) {
      rank_ -= upper + equal;
      ties = SelectCollected(lo, mid - 1, collected - upper);
    } else {
      key_ = mid;
      rank_ -= upper;
    }
    // Counted from the guess's last element to the key's.
    if (key_ != mid && !strayed_) strayed_ = std::abs(from_guess - (k_ - rank_ + ties));
    return true;
  }

  // Of a finished search: the chunk of the last element kept, whose rank among its equals there is *rank. `order`: the chunks' own.
  size_t FindTie(const std::vector<size_t>& order, int64_t* rank) const {
    *rank = rank_;
    for (size_t c : order) {
      const Chunk& chunk = chunks_[c];
      const int64_t here = key_ == bracket_.mid ? chunk.equal : std::count(chunk.keys, chunk.keys + chunk.collected, key_);
      if (*rank <= here) return c;
      *rank -= here;
    }
    throw std::logic_error("the elements changed while they were counted");
  }

 private:
  static constexpr Key kTop = std::numeric_limits<Key>::max();

  // No keys although some were collected: they were too many, or are in the histogram.
  struct Chunk {
    int32_t above = 0, equal = 0, collected = 0;
    const Key* keys = nullptr;
  };

  // The next pass looks in [lo, hi], which is known to hold the k-th key, and `inside` keys at most.
  bool LookIn(Key lo, Key hi, int64_t inside) {
    bracket_ = {lo, lo, hi};
    histogram_.reset();
    if (inside > limit_ && lo < hi) UseHistogram();
    strayed_ = n_;  // the guess was another pass's
    return false;
  }

  // In the memory of as many keys as may be collected.
  void UseHistogram() {
    constexpr int64_t kLeastBins = 1 << 16, kMostBins = 1 << 24;
    const int64_t bins = std::clamp(limit_ / static_cast<int64_t>(sizeof(int64_t) / sizeof(Key)), kLeastBins, kMostBins);
    histogram_.emplace(static_cast<Key>(bracket_.lo), static_cast<Key>(bracket_.hi), bins);
  }

  // The rank_-th largest of the collected keys in [lo, hi], which `inside` are, and then its rank: narrowing histograms, linear in their
  // number. Returns how many equal it.
  int64_t SelectCollected(Key lo, Key hi, int64_t inside) {
    while (lo < hi) {
      Histogram<Key> histogram(lo, hi, kDigitBins);
      for (const Chunk& chunk : chunks_) {
        for (int64_t i = 0; i < chunk.collected; ++i) {
          if (chunk.keys[i] >= lo && chunk.keys[i] <= hi) histogram.Add(chunk.keys[i]);
        }
      }
      inside = histogram.Find(&rank_, &lo, &hi);
    }
    key_ = lo;
    return inside;
  }

  const int model_;
  const int64_t k_, n_, limit_;
  const double width_;
  std::vector<Key> sample_;
  Bracket bracket_{0, 0, kTop};
  std::optional<Histogram<Key>> histogram_;  // of the bracket's keys, instead of collecting them
  std::mutex mutex_;                         // of the histogram
  std::atomic<int64_t> collected_{0};
  std::vector<Chunk> chunks_;
  Key key_ = 0;
  int64_t rank_ = 0;  // of the k-th key among its equals
  int64_t strayed_ = 0;
};

}  // namespace pymerge
