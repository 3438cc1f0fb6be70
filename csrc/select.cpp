// The k-th magnitude in one pass over the data (facts: sample, bracket, one counting pass):
//   1. sort a sample of the keys; take a guess at the k-th and a bracket around it that holds it almost surely;
//   2. one pass counts the keys above the bracket and equal to the guess, and collects those inside, about 1 %;
//   3. the counts prove that the k-th lies inside, and it is selected among the collected ones.
// The guess is counted and never collected: on bf16 deltas percents of all elements share one magnitude. When the counts do not prove it
// (adversarial data), the next pass looks where they say that it lies. Where more would be collected than there is room for, a histogram of
// the bracket takes its place: exact when a bin is one key, else the next pass looks inside one bin. Always exact, and rarely two passes.
#include "select.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>

#include "arena.h"
#include "dispatch.h"
#include "sample.h"
#include "select_cached.h"
#include "thread_pool.h"

namespace pymerge {
namespace {

constexpr int64_t kSmall = 1 << 12;  // up to here all keys are sorted out, without a sample
constexpr int kDigit = 11;           // bits of a histogram's digit, among collected keys
constexpr int64_t kLeastBins = 1 << 16, kMostBins = 1 << 24;  // of the histogram that takes the place of collected keys

// Index of the rank-th (from 1) key that equals `key`.
template <class Key>
int64_t IndexOfEqual(const Key* keys, int64_t n, Key key, int64_t rank) {
  for (int64_t i = 0; i < n; ++i) {
    if (keys[i] == key && --rank == 0) return i;
  }
  return n - 1;
}

template <class Key>
struct Workspace {
  std::mutex mutex;
  std::array<Arena<Key>, kMaxThreads> arena;
};

template <class Key>
Workspace<Key>& SharedWorkspace() {
  static auto* workspace = new Workspace<Key>;  // never destroyed, like the pool
  return *workspace;
}

// One model's keys of one chunk. No keys although some were collected: they were too many, or are in the histogram.
template <class Key>
struct Counted {
  int32_t above = 0, equal = 0, collected = 0;
  const Key* keys = nullptr;
};

template <class Key>
class Selector final : public StreamedSelection {
 public:
  // `limit`: keys to collect per model, at most. `run`, `runs`: elements in a sampled run, and runs at most; `spread`: half the bracket's
  // width in standard deviations of a sample of independent elements.
  Selector(int64_t n, const std::vector<int64_t>& counts, bool tie_all, int64_t limit, int run, int64_t runs, double spread)
      : kernels_(CurrentKernels()), n_(n), tie_all_(tie_all), limit_(std::max(limit, kSmall)), spread_(spread), result_(counts.size()), strayed_(counts.size()) {
    for (size_t m = 0; m < counts.size(); ++m) {
      if (counts[m] <= 0 || n == 0) {
        result_[m] = {std::numeric_limits<int64_t>::max(), -1};
      } else if (counts[m] >= n) {
        result_[m] = {0, n - 1};
      } else {
        searches_.push_back(std::make_unique<Search>());
        searches_.back()->model = static_cast<int>(m);
        searches_.back()->k = counts[m];
      }
    }
    if (searches_.empty() || n <= kSmall) return;
    runs = std::clamp<int64_t>(n / 64 / run, 16, runs);
    ForEachRun(n, run, runs, [&](int64_t, int64_t begin) { ranges_.push_back({begin, begin + run}); });
  }

  // Collected keys go to a workspace that others may use later, instead of the selector's own.
  void Borrow(Workspace<Key>* workspace) {
    workspace_ = workspace;
    for (auto& arena : workspace_->arena) arena.Reset();
  }

  int Searched() const override { return static_cast<int>(searches_.size()); }
  const std::vector<FlatRange>& SampleRanges() const override { return ranges_; }
  const std::vector<Lookup>& Lookups() const override { return lookups_; }
  const std::vector<int64_t>& Strayed() const override { return strayed_; }
  const std::vector<Selection>& Result() const override { return result_; }

  void Sample(const Deltas& part) override {
    for (size_t s = 0; s < searches_.size(); ++s) SampleOne(s, part, 0, part.n);
  }

  // Elements [begin, end) of a part, for one search; calls for different searches may run at the same time.
  void SampleOne(size_t search, const Deltas& part, int64_t begin, int64_t end) {
    std::vector<Key>& sample = searches_[search]->sample;
    const size_t used = sample.size();
    sample.resize(used + static_cast<size_t>(end - begin));
    kernels_.keys(part, searches_[search]->model, begin, end, sample.data() + used);
  }

  std::vector<Selection> Guesses(int threads) override {
    BeginPass(threads);
    std::vector<Selection> guesses = result_;
    for (const auto& search : searches_) guesses[search->model] = {search->bracket.mid, n_ - 1};
    return guesses;
  }

  void Add(const std::vector<Deltas>& parts, int threads) override {
    if (searches_.empty()) return;
    if (chunks_.empty()) BeginPass(threads);
    const size_t first = chunks_.size(), width = searches_.size();
    int64_t bytes = 0;
    for (size_t t = 0; t < parts.size(); ++t) {
      for (int64_t i = 0; i < parts[t].n; i += kChunk) {
        chunks_.push_back({static_cast<int>(t), i, std::min(i + kChunk, parts[t].n), parts[t].first + i});
      }
      seen_ += parts[t].n;
      bytes += parts[t].n * static_cast<int64_t>(sizeof(Key)) * (parts[t].models + 1);
    }
    rows_.resize(chunks_.size() * width);
    ParallelFor(static_cast<int64_t>(chunks_.size() - first), UsefulThreads(bytes, threads), [&](int64_t c, int slot) {
      const size_t at = first + static_cast<size_t>(c);
      Arena<Key>& arena = workspace_->arena[slot];
      Key* staging = arena.Staging(kChunk + 16).data();
      const ChunkRef& chunk = chunks_[at];
      for (size_t s = 0; s < width; ++s) {
        Search& search = *searches_[s];
        const BracketCount count = kernels_.count(parts[chunk.part], search.model, search.bracket, chunk.begin, chunk.end, staging);
        Counted<Key>& row = rows_[at * width + s];
        row.above = static_cast<int32_t>(count.above);
        row.equal = static_cast<int32_t>(count.equal);
        row.collected = static_cast<int32_t>(count.collected);
        if (!search.histogram.empty()) {
          search.Bin(staging, count.collected);
        } else if (search.collected.fetch_add(count.collected, std::memory_order_relaxed) < limit_) {
          row.keys = arena.Keep(staging, count.collected);
        }
      }
    });
  }

  bool EndPass(int threads) override {
    if (searches_.empty()) return true;
    if (seen_ != n_) throw std::invalid_argument("a selection over " + std::to_string(n_) + " elements was given " + std::to_string(seen_));
    order_.resize(chunks_.size());
    std::iota(order_.begin(), order_.end(), size_t{0});
    auto earlier = [&](size_t a, size_t b) { return chunks_[a].offset < chunks_[b].offset; };
    if (!std::is_sorted(order_.begin(), order_.end(), earlier)) std::sort(order_.begin(), order_.end(), earlier);
    std::vector<uint8_t> found(searches_.size());
    ParallelFor(static_cast<int64_t>(searches_.size()), threads, [&](int64_t s, int) { found[s] = Finish(static_cast<size_t>(s)); });
    std::vector<std::unique_ptr<Search>> missed;
    for (size_t s = 0; s < searches_.size(); ++s) {
      const Search& search = *searches_[s];
      if (!found[s]) {
        strayed_[search.model] = n_;  // the guess was another pass's
        missed.push_back(std::move(searches_[s]));
      } else if (tie_all_) {
        result_[search.model] = {search.key, n_ - 1};
      } else {
        result_[search.model].key = search.key;
        lookups_.push_back(search.lookup);
      }
    }
    searches_ = std::move(missed);
    chunks_.clear();
    rows_.clear();
    for (auto& arena : workspace_->arena) arena.Reset();
    seen_ = 0;
    return searches_.empty();
  }

  void Look(size_t lookup, const Deltas& part) override {
    const Lookup& wanted = lookups_.at(lookup);
    if (wanted.begin < part.first || wanted.end > part.first + part.n) throw std::invalid_argument("a lookup's chunk is not all there");
    std::vector<Key> keys(static_cast<size_t>(wanted.end - wanted.begin));
    kernels_.keys(part, wanted.model, wanted.begin - part.first, wanted.end - part.first, keys.data());
    const Key key = static_cast<Key>(result_[wanted.model].key);
    result_[wanted.model].cut = wanted.begin + IndexOfEqual(keys.data(), static_cast<int64_t>(keys.size()), key, wanted.rank);
  }

 private:
  static constexpr Key kTop = std::numeric_limits<Key>::max();

  struct ChunkRef {
    int part;
    int64_t begin, end;  // within the part
    int64_t offset;      // flat index of begin
  };

  struct Search {
    int model;
    int64_t k;
    std::vector<Key> sample;
    Bracket bracket{0, 0, kTop};
    std::vector<int64_t> histogram;  // of the bracket's keys, instead of collecting them; empty: they are collected
    int shift = 0;                   // keys per bin, as a power of two
    std::mutex mutex;                // of the histogram
    std::atomic<int64_t> collected{0};
    Key key = 0;  // the k-th
    Lookup lookup;

    void Bin(const Key* keys, int64_t count) {
      std::lock_guard<std::mutex> lock(mutex);
      for (int64_t i = 0; i < count; ++i) ++histogram[BinOf(keys[i])];
    }
    size_t BinOf(Key x) const { return static_cast<size_t>((static_cast<uint64_t>(x) - static_cast<uint64_t>(bracket.lo)) >> shift); }

    // How many keys of the histogram, whose bins are single keys, are at least x.
    int64_t Above(Key x) const { return std::accumulate(histogram.begin() + static_cast<ptrdiff_t>(BinOf(x)), histogram.end(), int64_t{0}); }

    // In the memory of `limit` keys.
    void UseHistogram(int64_t limit) {
      const int64_t bins = std::clamp(limit / static_cast<int64_t>(sizeof(int64_t) / sizeof(Key)), kLeastBins, kMostBins);
      const uint64_t range = static_cast<uint64_t>(bracket.hi) - static_cast<uint64_t>(bracket.lo);
      shift = 0;
      while (range >> shift >= static_cast<uint64_t>(bins)) ++shift;
      histogram.assign(static_cast<size_t>(range >> shift) + 1, 0);
    }
  };

  void BeginPass(int threads) {
    if (!workspace_) {
      own_ = std::make_unique<Workspace<Key>>();
      workspace_ = own_.get();
    }
    ParallelFor(static_cast<int64_t>(searches_.size()), threads, [&](int64_t s, int) {
      Search& search = *searches_[s];
      search.collected = 0;
      if (!search.sample.empty()) Guess(&search);
    });
  }

  // A bracket that almost surely holds the k-th largest key, from the sample.
  void Guess(Search* search) const {
    std::vector<Key> sample = std::move(search->sample);
    search->sample.clear();
    const int64_t size = static_cast<int64_t>(sample.size());
    const Bracket& bracket = search->bracket = BracketOfSample(sample.data(), size, static_cast<double>(search->k) / static_cast<double>(n_), spread_);
    const auto inside =
        std::count_if(sample.begin(), sample.end(), [&](Key x) { return x >= bracket.lo && x <= bracket.hi && x != bracket.mid; });
    // Twice as many as expected fit: a sample errs, and its error costs a pass.
    if (2 * static_cast<double>(inside) / static_cast<double>(size) * static_cast<double>(n_) > static_cast<double>(limit_)) search->UseHistogram(limit_);
  }

  // Finds the key and, unless ties are all kept, the chunk where the last one kept lies; or else sets up the next pass.
  bool Finish(size_t s) {
    Search& search = *searches_[s];
    const Bracket bracket = search.bracket;
    const Key lo = static_cast<Key>(bracket.lo), mid = static_cast<Key>(bracket.mid), hi = static_cast<Key>(bracket.hi);
    int64_t above = 0, equal = 0, collected = 0, upper = 0;
    bool complete = true;
    for (size_t c = 0; c < chunks_.size(); ++c) {
      const Counted<Key>& row = rows_[c * searches_.size() + s];
      above += row.above;
      equal += row.equal;
      collected += row.collected;
      complete &= !row.collected || row.keys;
      if (row.keys) upper += std::count_if(row.keys, row.keys + row.collected, [&](Key x) { return x > mid; });
    }
    if (search.k <= above) return Narrow(&search, hi + 1, kTop, n_);
    if (search.k > above + collected + equal) return Narrow(&search, 0, lo - 1, n_);
    int64_t rank;           // of the k-th key among those equal to it, from 1
    int64_t rank_ties = 0;  // how many those are, where it is known already
    if (!search.histogram.empty()) {
      search.histogram[search.BinOf(mid)] += equal;
      rank = search.k - above;
      size_t bin = search.histogram.size() - 1;
      while (rank > search.histogram[bin]) rank -= search.histogram[bin--];
      const Key low = static_cast<Key>(lo + (static_cast<Key>(bin) << search.shift));
      const int64_t inside = search.histogram[bin];
      if (search.shift) return Narrow(&search, low, std::min<Key>(hi, static_cast<Key>(low + ((Key{1} << search.shift) - 1))), inside);
      search.key = low;
      rank_ties = inside;
      if (!tie_all_ && low != mid) return Narrow(&search, low, low, 0);
    } else if (!complete) {
      return Narrow(&search, lo, hi, n_);
    } else if (search.k <= above + upper) {
      search.key = SelectCollected(s, mid + 1, hi, search.k - above, &rank);
    } else if (search.k > above + upper + equal) {
      search.key = SelectCollected(s, lo, mid - 1, search.k - above - upper - equal, &rank);
    } else {
      search.key = mid;
      rank = search.k - above - upper;
    }
    if (!tie_all_) search.lookup = FindTie(s, rank);
    if (search.key != mid && strayed_[search.model] == 0) {
      // Elements between the guess and the k-th key: the ranks of the guess's last element and of the key's.
      const int64_t guessed = search.histogram.empty() ? above + upper + equal : search.Above(mid) + above;
      if (!rank_ties) rank_ties = CountEqual(s, search.key);
      strayed_[search.model] = std::abs(guessed - (search.k - rank + rank_ties));
    }
    return true;
  }

  int64_t CountEqual(size_t s, Key key) const {
    int64_t equal = 0;
    for (size_t c = 0; c < chunks_.size(); ++c) {
      const Counted<Key>& row = rows_[c * searches_.size() + s];
      if (row.keys) equal += std::count(row.keys, row.keys + row.collected, key);
    }
    return equal;
  }

  // The next pass looks in [lo, hi], which is known to hold the k-th key, and `inside` keys at most.
  bool Narrow(Search* search, Key lo, Key hi, int64_t inside) const {
    search->bracket = {lo, lo, hi};
    search->histogram.clear();
    if (inside > limit_ && lo < hi) search->UseHistogram(limit_);
    return false;
  }

  // The k-th largest of the collected keys in [lo, hi], and its rank among those equal to it: narrowing histograms, linear in their number.
  Key SelectCollected(size_t s, Key lo, Key hi, int64_t k, int64_t* rank) const {
    auto for_each = [&](auto&& visit) {
      for (size_t c = 0; c < chunks_.size(); ++c) {
        const Counted<Key>& row = rows_[c * searches_.size() + s];
        for (int64_t i = 0; i < row.collected; ++i) {
          if (row.keys[i] >= lo && row.keys[i] <= hi) visit(row.keys[i]);
        }
      }
    };
    while (lo < hi) {
      const uint64_t range = static_cast<uint64_t>(hi) - static_cast<uint64_t>(lo);
      int shift = 0;
      while (range >> shift >> kDigit) ++shift;
      std::array<int64_t, 1 << kDigit> histogram{};
      for_each([&](Key key) { ++histogram[(static_cast<uint64_t>(key) - static_cast<uint64_t>(lo)) >> shift]; });
      int64_t digit = (1 << kDigit) - 1;
      while (k > histogram[digit]) k -= histogram[digit--];
      lo = static_cast<Key>(lo + (static_cast<Key>(digit) << shift));
      hi = std::min<Key>(hi, static_cast<Key>(lo + ((Key{1} << shift) - 1)));
    }
    *rank = k;
    return lo;
  }

  // The chunk that holds the rank-th element, by flat index, of those at the k-th magnitude: only that is looked at again.
  Lookup FindTie(size_t s, int64_t rank) const {
    const Search& search = *searches_[s];
    for (size_t c : order_) {
      const Counted<Key>& row = rows_[c * searches_.size() + s];
      const int64_t here = search.key == search.bracket.mid ? row.equal : std::count(row.keys, row.keys + row.collected, search.key);
      if (rank <= here) return {search.model, chunks_[c].offset, chunks_[c].offset + chunks_[c].end - chunks_[c].begin, rank};
      rank -= here;
    }
    throw std::logic_error("the elements changed while they were counted");
  }

  const Kernels& kernels_;
  const int64_t n_;
  const bool tie_all_;
  const int64_t limit_;
  const double spread_;
  std::vector<FlatRange> ranges_;
  std::vector<std::unique_ptr<Search>> searches_;
  std::vector<ChunkRef> chunks_;       // of this pass so far
  std::vector<Counted<Key>> rows_;     // per chunk, one for each search
  std::vector<size_t> order_;          // of the chunks by flat index
  int64_t seen_ = 0;
  std::vector<Lookup> lookups_;
  std::vector<Selection> result_;
  std::vector<int64_t> strayed_;
  std::unique_ptr<Workspace<Key>> own_;
  Workspace<Key>* workspace_ = nullptr;
};

template <class Key>
std::vector<Selection> SelectSmall(const std::vector<Deltas>& parts, int64_t n, const std::vector<int64_t>& counts, bool tie_all, int threads) {
  std::vector<Selection> result(counts.size());
  ParallelFor(static_cast<int64_t>(counts.size()), threads, [&](int64_t m, int) {
    const int64_t k = counts[m];
    if (k <= 0 || n == 0) {
      result[m] = {std::numeric_limits<int64_t>::max(), -1};
    } else if (k >= n) {
      result[m] = {0, n - 1};
    } else {
      std::vector<Key> keys(static_cast<size_t>(n));
      for (const Deltas& part : parts) CurrentKernels().keys(part, static_cast<int>(m), 0, part.n, keys.data() + part.first);
      std::vector<Key> sorted = keys;
      std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<Key>());
      const Key key = sorted[k - 1];
      int64_t rank = k;
      for (Key x : keys) rank -= x > key;
      result[m] = {key, tie_all ? n - 1 : IndexOfEqual(keys.data(), n, key, rank)};
    }
  });
  return result;
}

template <class Key>
std::vector<Selection> SelectInMemory(std::vector<Deltas> parts, const std::vector<int64_t>& counts, bool tie_all, int threads) {
  int64_t n = 0;
  for (Deltas& part : parts) {
    part.first = n;
    n += part.n;
  }
  threads = UsefulThreads(n * static_cast<int64_t>(sizeof(Key) * (counts.size() + 1)), threads);
  if (n <= kSmall) return SelectSmall<Key>(parts, n, counts, tie_all, threads);
  // Runs of one or two cache lines.
  Selector<Key> selector(n, counts, tie_all, n / 8 + (1 << 18), 16, 8192, 6.0);
  ParallelFor(selector.Searched(), threads, [&](int64_t s, int) {
    size_t p = 0;
    for (const FlatRange& range : selector.SampleRanges()) {
      for (int64_t at = range.begin; at < range.end;) {
        while (parts[p].first + parts[p].n <= at) ++p;
        const int64_t end = std::min(range.end, parts[p].first + parts[p].n);
        selector.SampleOne(static_cast<size_t>(s), parts[p], at - parts[p].first, end - parts[p].first);
        at = end;
      }
    }
  });
  // Another thread may be using the shared one, or have been when this process was forked.
  std::unique_lock<std::mutex> lock(SharedWorkspace<Key>().mutex, std::try_to_lock);
  if (lock.owns_lock()) selector.Borrow(&SharedWorkspace<Key>());
  do {
    selector.Add(parts, threads);
  } while (!selector.EndPass(threads));
  const std::vector<Lookup>& lookups = selector.Lookups();
  ParallelFor(static_cast<int64_t>(lookups.size()), threads, [&](int64_t i, int) {
    auto holds = [&](const Deltas& part) { return part.first <= lookups[i].begin && lookups[i].begin < part.first + part.n; };
    selector.Look(static_cast<size_t>(i), *std::find_if(parts.begin(), parts.end(), holds));
  });
  return selector.Result();
}

}  // namespace

int UsefulThreads(int64_t bytes, int threads) {
  constexpr int64_t kBytesPerThread = 1 << 19;  // waking a thread costs about as much as moving this much
  return static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::clamp(threads, 1, kMaxThreads)));
}

std::vector<Selection> Select(const std::vector<Deltas>& tensors, const std::vector<int64_t>& counts, bool tie_all, int threads) {
  if (tensors.size() == 1 && tensors[0].n <= kMostCached) {
    const int64_t bytes = tensors[0].n * static_cast<int64_t>(sizeof(int32_t) * (counts.size() + 1));
    return SelectCached(tensors[0], counts, tie_all, UsefulThreads(bytes, threads));
  }
  if (!tensors.empty() && tensors[0].f64) return SelectInMemory<int64_t>(tensors, counts, tie_all, threads);
  return SelectInMemory<int32_t>(tensors, counts, tie_all, threads);
}

std::unique_ptr<StreamedSelection> StreamedSelection::Make(int64_t n, const std::vector<int64_t>& counts, bool tie_all, bool f64,
                                                           int64_t limit) {
  // Longer runs than in memory, since every one is a read of a file, which costs the same up to a page; their elements are less
  // independent, and a missed bracket costs another pass over the files, so it is wider.
  constexpr int kRun = 256, kRuns = 4096;
  constexpr double kSpread = 10.0;
  if (f64) return std::make_unique<Selector<int64_t>>(n, counts, tie_all, limit, kRun, kRuns, kSpread);
  return std::make_unique<Selector<int32_t>>(n, counts, tie_all, limit, kRun, kRuns, kSpread);
}

}  // namespace pymerge
