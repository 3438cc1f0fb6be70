// Histograms of keys, which narrow down where the k-th largest is, and which of its equals is the last one kept. Ranks count from 1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

namespace pymerge {

constexpr int64_t kDigitBins = 1 << 11;  // of a histogram in the first cache

// How many keys of [lo, hi] there are in each of at most `most_bins` bins of one width, a power of two.
template <class Key>
class Histogram {
 public:
  Histogram(Key lo, Key hi, int64_t most_bins) : lo_(lo), hi_(hi) {
    while (Offset(hi) >> shift_ >= static_cast<uint64_t>(most_bins)) ++shift_;
    bins_.resize(BinOf(hi) + 1);
  }

  void Add(Key key, int64_t count = 1) { bins_[BinOf(key)] += count; }

  bool HasSingleKeys() const { return shift_ == 0; }  // in every bin

  // The bin of the k-th largest key as [*lo, *hi], and *k as the rank in it. Returns how many keys it has.
  int64_t Find(int64_t* k, Key* lo, Key* hi) const {
    size_t bin = bins_.size() - 1;
    while (*k > bins_[bin]) *k -= bins_[bin--];
    *lo = static_cast<Key>(lo_ + (static_cast<Key>(bin) << shift_));
    const Key width = Key{1} << shift_;
    *hi = hi_ - *lo < width ? hi_ : static_cast<Key>(*lo + (width - 1));
    return bins_[bin];
  }

  // Keys in x's bin and above it.
  int64_t From(Key x) const { return std::accumulate(bins_.begin() + static_cast<int64_t>(BinOf(x)), bins_.end(), int64_t{0}); }

 private:
  using Unsigned = std::make_unsigned_t<Key>;
  Unsigned Offset(Key key) const { return static_cast<Unsigned>(key) - static_cast<Unsigned>(lo_); }
  size_t BinOf(Key key) const { return static_cast<size_t>(Offset(key) >> shift_); }

  Key lo_, hi_;
  int shift_ = 0;
  std::vector<int64_t> bins_;
};

// Where the rank-th of those that equal `key` is.
template <class Key>
int64_t IndexOfEqual(const Key* keys, int64_t n, Key key, int64_t rank) {
  int64_t i = 0;
  while (i < n - 1 && (keys[i] != key || --rank > 0)) ++i;
  return i;
}

}  // namespace pymerge
