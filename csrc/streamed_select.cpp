// The k-th magnitude in one pass over the data (facts: sample, bracket, one counting pass):
//   1. sort a sample of the keys; take a guess at the k-th and a bracket around it that holds it almost surely;
//   2. one pass counts the keys above the bracket and equal to the guess, and collects those inside, about 1 %;
//   3. the counts prove that the k-th lies inside, and it is selected among the collected ones.
// The guess is counted and never collected: on bf16 deltas percents of all elements share one magnitude. When the counts do not prove it
// (adversarial data), the next pass looks where they say that it lies. Where more would be collected than there is room for, a histogram of
// the bracket takes its place: exact when a bin is one key, else the next pass looks inside one bin. Always exact, and rarely two passes.
#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

#include "arena.h"
#include "search.h"
#include "select.h"
#include "thread_pool.h"

namespace pymerge {
namespace {

constexpr int64_t kSmall = 1 << 12;  // up to here all keys are collected, without a sample

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

// How to sample: elements in a run, runs at most; the width of the bracket.
struct Sampling {
  int run;
  int64_t runs;
  double width;
};
// Runs of one or two cache lines. Of independent elements a bracket is missed in one selection of a billion, and holds about 1 %.
constexpr Sampling kInMemory{16, 8192, 6.0};
// Longer runs, since every one is a read of a file, which costs the same up to a page; their elements are less independent, and a missed
// bracket costs another pass over the files, so it is wider.
constexpr Sampling kInFiles{256, 4096, 10.0};

template <class Key>
class Selector final : public StreamedSelection {
 public:
  // `share`: collected keys go to a workspace that later calls use too.
  Selector(int64_t n, const std::vector<int64_t>& counts, bool tie_all, int64_t limit, const Sampling& sampling, bool share)
      : n_(n), tie_all_(tie_all), result_(counts.size()), strayed_(counts.size()) {
    for (size_t m = 0; m < counts.size(); ++m) {
      if (counts[m] <= 0 || n == 0) {
        result_[m] = {std::numeric_limits<int64_t>::max(), -1};
      } else if (counts[m] >= n) {
        result_[m] = {0, n - 1};
      } else {
        const int64_t most = std::max(limit, kSmall);
        searches_.push_back(std::make_unique<Search<Key>>(static_cast<int>(m), counts[m], n, most, sampling.width));
      }
    }
    if (searches_.empty()) return;
    // Another thread may be using the shared one, or have been when this process was forked.
    if (share) borrowed_ = std::unique_lock<std::mutex>(SharedWorkspace<Key>().mutex, std::try_to_lock);
    if (!borrowed_) own_ = std::make_unique<Workspace<Key>>();
    workspace_ = own_ ? own_.get() : &SharedWorkspace<Key>();
    ResetArenas();
    if (n <= kSmall) return;
    const int64_t runs = std::clamp<int64_t>(n / 64 / sampling.run, 16, sampling.runs);
    ForEachRun(n, sampling.run, runs, [&](int64_t, int64_t begin) { ranges_.push_back({begin, begin + sampling.run}); });
  }

  int Searched() const override { return static_cast<int>(searches_.size()); }
  const std::vector<FlatRange>& SampleRanges() const override { return ranges_; }
  const std::vector<Lookup>& Lookups() const override { return lookups_; }
  const std::vector<int64_t>& Strayed() const override { return strayed_; }
  const std::vector<Selection>& Result() const override { return result_; }

  void SampleOne(int search, const Deltas& part, int64_t begin, int64_t end) override {
    searches_[static_cast<size_t>(search)]->Sample(part, begin, end);
  }

  std::vector<Selection> Guesses(int threads) override {
    BeginPass(threads);
    std::vector<Selection> guesses = result_;
    for (const auto& search : searches_) guesses[search->Model()] = {search->Guess(), n_ - 1};
    return guesses;
  }

  void Add(const std::vector<Deltas>& parts, int threads) override {
    if (searches_.empty()) return;
    if (chunks_.empty()) BeginPass(threads);
    const size_t first = chunks_.size();
    int64_t bytes = 0;
    for (size_t t = 0; t < parts.size(); ++t) {
      for (int64_t i = 0; i < parts[t].n; i += kChunk) {
        chunks_.push_back({static_cast<int>(t), i, std::min(i + kChunk, parts[t].n), parts[t].first + i});
      }
      seen_ += parts[t].n;
      bytes += parts[t].n * static_cast<int64_t>(sizeof(Key)) * (parts[t].models + 1);
    }
    for (const auto& search : searches_) search->SetChunks(chunks_.size());
    ParallelFor(static_cast<int64_t>(chunks_.size() - first), UsefulThreads(bytes, threads), [&](int64_t c, int slot) {
      const size_t at = first + static_cast<size_t>(c);
      const Chunk& chunk = chunks_[at];
      for (const auto& search : searches_) search->Count(at, parts[chunk.part], chunk.begin, chunk.end, &workspace_->arena[slot]);
    });
  }

  bool EndPass(int threads) override {
    if (searches_.empty()) return true;
    if (seen_ != n_) throw std::invalid_argument("a selection over " + std::to_string(n_) + " elements was given " + std::to_string(seen_));
    std::vector<size_t> order(chunks_.size());  // by flat index
    std::iota(order.begin(), order.end(), size_t{0});
    const auto earlier = [&](size_t a, size_t b) { return chunks_[a].offset < chunks_[b].offset; };
    if (!std::is_sorted(order.begin(), order.end(), earlier)) std::sort(order.begin(), order.end(), earlier);
    std::vector<uint8_t> found(searches_.size());
    std::vector<Lookup> ties(searches_.size());
    ParallelFor(static_cast<int64_t>(searches_.size()), threads, [&](int64_t s, int) {
      Search<Key>& search = *searches_[s];
      found[s] = search.Finish(tie_all_);
      if (!found[s] || tie_all_) return;
      int64_t rank;
      const Chunk& chunk = chunks_[search.FindTie(order, &rank)];
      ties[s] = {search.Model(), chunk.offset, chunk.offset + chunk.end - chunk.begin, rank};
    });
    std::vector<std::unique_ptr<Search<Key>>> missed;
    for (size_t s = 0; s < searches_.size(); ++s) {
      const int model = searches_[s]->Model();
      strayed_[model] = searches_[s]->Strayed();
      if (found[s]) {
        result_[model] = {searches_[s]->Kth(), tie_all_ ? n_ - 1 : -1};
        if (!tie_all_) lookups_.push_back(ties[s]);
      } else {
        missed.push_back(std::move(searches_[s]));
      }
    }
    searches_ = std::move(missed);
    chunks_.clear();
    ResetArenas();
    seen_ = 0;
    return searches_.empty();
  }

  void Look(size_t lookup, const Deltas& part) override {
    const Lookup& wanted = lookups_.at(lookup);
    if (wanted.begin < part.first || wanted.end > part.first + part.n) throw std::invalid_argument("a lookup's chunk is not all there");
    std::vector<Key> keys(static_cast<size_t>(wanted.end - wanted.begin));
    CurrentKernels().keys(part, wanted.model, wanted.begin - part.first, wanted.end - part.first, keys.data());
    const Key key = static_cast<Key>(result_[wanted.model].key);
    result_[wanted.model].cut = wanted.begin + IndexOfEqual(keys.data(), static_cast<int64_t>(keys.size()), key, wanted.rank);
  }

 private:
  struct Chunk {
    int part;
    int64_t begin, end;  // within the part
    int64_t offset;      // flat index of begin
  };

  void BeginPass(int threads) {
    ParallelFor(static_cast<int64_t>(searches_.size()), threads, [&](int64_t s, int) { searches_[s]->Begin(); });
  }

  void ResetArenas() {
    for (auto& arena : workspace_->arena) arena.Reset();
  }

  const int64_t n_;
  const bool tie_all_;
  std::vector<FlatRange> ranges_;
  std::vector<std::unique_ptr<Search<Key>>> searches_;
  std::vector<Chunk> chunks_;  // of this pass so far
  int64_t seen_ = 0;
  std::vector<Lookup> lookups_;
  std::vector<Selection> result_;
  std::vector<int64_t> strayed_;
  std::unique_lock<std::mutex> borrowed_;
  std::unique_ptr<Workspace<Key>> own_;
  Workspace<Key>* workspace_ = nullptr;
};

std::unique_ptr<StreamedSelection> MakeSelector(int64_t n, const std::vector<int64_t>& counts, bool tie_all, bool f64, int64_t limit,
                                                const Sampling& sampling, bool share) {
  if (f64) return std::make_unique<Selector<int64_t>>(n, counts, tie_all, limit, sampling, share);
  return std::make_unique<Selector<int32_t>>(n, counts, tie_all, limit, sampling, share);
}

}  // namespace

std::unique_ptr<StreamedSelection> StreamedSelection::Make(int64_t n, const std::vector<int64_t>& counts, bool tie_all, bool f64,
                                                           int64_t limit) {
  return MakeSelector(n, counts, tie_all, f64, limit, kInFiles, false);
}

std::unique_ptr<StreamedSelection> StreamedSelection::MakeInMemory(int64_t n, const std::vector<int64_t>& counts, bool tie_all, bool f64) {
  return MakeSelector(n, counts, tie_all, f64, n / 8 + (1 << 18), kInMemory, true);
}

}  // namespace pymerge
