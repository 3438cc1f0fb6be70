// The k-th magnitude in one pass over the data (facts: sample, bracket, one counting pass):
//   1. sort a sample of the keys; take a guess at the k-th and a bracket around it that holds it almost surely;
//   2. one pass counts the keys above the bracket and equal to the guess, and collects those inside, about 1 %;
//   3. the counts prove that the k-th lies inside, and it is selected among the collected ones.
// The guess is counted and never collected: on bf16 deltas percents of all elements share one magnitude. When the counts do not prove it
// (adversarial data), or too much would be collected, histograms over the whole data find the k-th digit by digit, always exactly.
#include "select.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>

#include "dispatch.h"
#include "thread_pool.h"

namespace pymerge {
namespace {

constexpr int64_t kSmall = 1 << 12;  // up to here all keys are sorted out, without a sample
constexpr int kRun = 16;             // sampled elements come in runs of one or two cache lines
constexpr int kDigit = 11;           // bits of a histogram's digit

struct ChunkRef {
  int tensor;
  int64_t begin, end;  // within the tensor
  int64_t offset;      // flat index of begin
};

// Collected keys of all chunks, in blocks that are allocated as needed and kept for the next call: page faults of fresh memory cost more
// than the selection itself.
template <class Key>
class Arena {
 public:
  // Copies n keys in; nullptr when there is no memory.
  const Key* Keep(const Key* keys, int64_t n) {
    constexpr int64_t kBlockKeys = 1 << 18;
    static_assert(kBlockKeys >= kChunk, "a chunk's keys must fit a block");
    if (used_ + n > kBlockKeys || blocks_.empty()) {
      if (!blocks_.empty()) ++current_;
      used_ = 0;
      if (current_ == blocks_.size()) {
        std::unique_ptr<Key[]> block(new (std::nothrow) Key[kBlockKeys]);
        if (!block) return nullptr;
        blocks_.push_back(std::move(block));
      }
    }
    Key* kept = blocks_[current_].get() + used_;
    memcpy(kept, keys, static_cast<size_t>(n) * sizeof(Key));
    used_ += n;
    return kept;
  }

  void Reset() {
    constexpr size_t kCachedBlocks = 64;
    if (blocks_.size() > kCachedBlocks) blocks_.resize(kCachedBlocks);
    current_ = 0;
    used_ = 0;
  }

  Key* Staging() {
    if (!staging_) staging_.reset(new (std::nothrow) Key[kChunk + 16]);
    return staging_.get();
  }

 private:
  std::vector<std::unique_ptr<Key[]>> blocks_;
  std::unique_ptr<Key[]> staging_;
  size_t current_ = 0;
  int64_t used_ = 0;
};

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

template <class Key>
struct Counted {
  int64_t above = 0, equal = 0, collected = 0;
  const Key* keys = nullptr;
};

template <class Key>
class Selector {
 public:
  Selector(const std::vector<Deltas>& tensors, const std::vector<int64_t>& counts, bool tie_all, int threads)
      : tensors_(tensors), kernels_(CurrentKernels()), counts_(counts), tie_all_(tie_all) {
    int64_t bytes = 0;
    for (size_t t = 0; t < tensors.size(); ++t) {
      for (int64_t i = 0; i < tensors[t].n; i += kChunk) {
        const int64_t end = std::min(i + kChunk, tensors[t].n);
        chunks_.push_back({static_cast<int>(t), i, end, n_ + i});
      }
      n_ += tensors[t].n;
      bytes += tensors[t].n * static_cast<int64_t>(sizeof(Key)) * (tensors[t].models + 1);
    }
    threads_ = UsefulThreads(bytes, threads);
  }

  std::vector<Selection> Run() {
    std::vector<Selection> result(counts_.size());
    std::vector<int> pending;
    for (size_t m = 0; m < counts_.size(); ++m) {
      if (counts_[m] <= 0 || n_ == 0) {
        result[m] = {std::numeric_limits<int64_t>::max(), -1};
      } else if (counts_[m] >= n_) {
        result[m] = {0, n_ - 1};
      } else {
        pending.push_back(static_cast<int>(m));
      }
    }
    if (pending.empty()) return result;
    if (n_ <= kSmall) {
      ParallelFor(static_cast<int64_t>(pending.size()), threads_, [&](int64_t i, int) { result[pending[i]] = SelectSmall(pending[i]); });
      return result;
    }
    std::vector<Bracket> brackets(pending.size());
    ParallelFor(static_cast<int64_t>(pending.size()), threads_, [&](int64_t i, int) { brackets[i] = Guess(pending[i]); });
    Resolve(pending, brackets, &result);
    return result;
  }

 private:
  static constexpr Key kTop = std::numeric_limits<Key>::max();

  std::vector<Key> AllKeys(int model) const {
    std::vector<Key> keys(static_cast<size_t>(n_));
    for (const ChunkRef& c : chunks_) kernels_.keys(tensors_[c.tensor], model, c.begin, c.end, keys.data() + c.offset);
    return keys;
  }

  Selection SelectSmall(int model) const {
    const std::vector<Key> keys = AllKeys(model);
    std::vector<Key> sorted = keys;
    const int64_t k = counts_[model];
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<Key>());
    const Key key = sorted[k - 1];
    if (tie_all_) return {key, n_ - 1};
    int64_t rank = k;
    for (Key x : keys) rank -= x > key;
    return {key, IndexOfEqual(keys.data(), n_, key, rank)};
  }

  // Index of the rank-th (from 1) key that equals `key`.
  static int64_t IndexOfEqual(const Key* keys, int64_t n, Key key, int64_t rank) {
    for (int64_t i = 0; i < n; ++i) {
      if (keys[i] == key && --rank == 0) return i;
    }
    return n - 1;
  }

  // A bracket that almost surely holds the k-th largest key, from a sample in runs at hashed positions.
  Bracket Guess(int model) const {
    const int64_t runs = std::clamp<int64_t>(n_ / 64 / kRun, 32, 8192), stride = n_ / runs;
    std::vector<Key> sample(static_cast<size_t>(runs * kRun));
    size_t c = 0, used = 0;
    uint64_t hash = 0x9E3779B97F4A7C15u;
    for (int64_t r = 0; r < runs; ++r) {
      hash ^= hash << 13, hash ^= hash >> 7, hash ^= hash << 17;
      const int64_t at = r * stride + static_cast<int64_t>(hash % static_cast<uint64_t>(stride));
      while (c + 1 < chunks_.size() && chunks_[c + 1].offset <= at) ++c;
      const Deltas& tensor = tensors_[chunks_[c].tensor];
      const int64_t begin = std::max<int64_t>(0, std::min(chunks_[c].begin + at - chunks_[c].offset, tensor.n - kRun));
      const int64_t end = std::min<int64_t>(begin + kRun, tensor.n);
      kernels_.keys(tensor, model, begin, end, sample.data() + used);
      used += static_cast<size_t>(end - begin);
    }
    const double size = static_cast<double>(used), p = static_cast<double>(counts_[model]) / static_cast<double>(n_);
    const double rank = p * size, spread = 6 * std::sqrt(size * p * (1 - p)) + 2;
    auto nth = [&](double r, auto first, auto last) {
      const auto it = sample.begin() + std::clamp<int64_t>(static_cast<int64_t>(r), 0, static_cast<int64_t>(used) - 1);
      std::nth_element(first, it, last, std::greater<Key>());
      return it;
    };
    const auto end = sample.begin() + static_cast<int64_t>(used);
    const auto mid = nth(rank, sample.begin(), end);
    Bracket bracket{0, *mid, kTop};
    if (rank - spread > 0) bracket.hi = *nth(rank - spread, sample.begin(), mid + 1);
    if (rank + spread < size - 1) bracket.lo = *nth(rank + spread, mid, end);
    return bracket;
  }

  void Resolve(const std::vector<int>& models, std::vector<Bracket> brackets, std::vector<Selection>* result) {
    // Another thread may be using the shared one, or have been when this process was forked.
    std::unique_lock<std::mutex> lock(SharedWorkspace<Key>().mutex, std::try_to_lock);
    std::unique_ptr<Workspace<Key>> own;
    if (!lock.owns_lock()) own = std::make_unique<Workspace<Key>>();
    Workspace<Key>* workspace = own ? own.get() : &SharedWorkspace<Key>();
    std::vector<Counted<Key>> counted = CountPass(models, brackets, workspace);
    std::vector<uint8_t> found(models.size());
    ParallelFor(static_cast<int64_t>(models.size()), threads_, [&](int64_t i, int) {
      found[i] = Finish(models[i], brackets[i], counted.data() + i, models.size(), &(*result)[models[i]]);
    });
    std::vector<int> missed;
    for (size_t i = 0; i < models.size(); ++i) {
      if (!found[i]) missed.push_back(models[i]);
    }
    if (missed.empty()) return;
    // The slow way: find the key digit by digit, then count it to find the cut.
    brackets.resize(missed.size());
    for (size_t i = 0; i < missed.size(); ++i) {
      const Key key = KeyByDigits(missed[i]);
      brackets[i] = {key, key, key};
    }
    counted = CountPass(missed, brackets, workspace);
    ParallelFor(static_cast<int64_t>(missed.size()), threads_, [&](int64_t i, int) {
      // A one-key bracket collects nothing and is right: only a lack of memory can be in the way.
      if (!Finish(missed[i], brackets[i], counted.data() + i, missed.size(), &(*result)[missed[i]])) throw std::bad_alloc();
    });
  }

  // Per chunk and model, row by row. A model of which too much would be collected gets null keys from there on.
  std::vector<Counted<Key>> CountPass(const std::vector<int>& models, const std::vector<Bracket>& brackets, Workspace<Key>* workspace) {
    const size_t width = models.size();
    std::vector<Counted<Key>> counted(chunks_.size() * width);
    const int64_t limit = n_ / 8 + (1 << 18);
    std::unique_ptr<std::atomic<int64_t>[]> total(new std::atomic<int64_t>[width]);
    for (size_t i = 0; i < width; ++i) total[i] = 0;
    for (auto& arena : workspace->arena) arena.Reset();
    ParallelFor(static_cast<int64_t>(chunks_.size()), threads_, [&](int64_t c, int slot) {
      Arena<Key>& arena = workspace->arena[slot];
      Key* staging = arena.Staging();
      const ChunkRef& chunk = chunks_[c];
      for (size_t i = 0; i < width && staging; ++i) {
        const BracketCount count = kernels_.count(tensors_[chunk.tensor], models[i], brackets[i], chunk.begin, chunk.end, staging);
        Counted<Key>& row = counted[static_cast<size_t>(c) * width + i];
        row.above = count.above;
        row.equal = count.equal;
        row.collected = count.collected;
        if (total[i].fetch_add(count.collected, std::memory_order_relaxed) < limit) row.keys = arena.Keep(staging, count.collected);
      }
    });
    return counted;
  }

  // Selects among what a pass counted and collected; false when that does not contain the k-th key. `rows` has one row per chunk.
  bool Finish(int model, const Bracket& bracket, const Counted<Key>* rows, size_t width, Selection* result) const {
    const int64_t k = counts_[model];
    const Key mid = static_cast<Key>(bracket.mid);
    int64_t above = 0, equal = 0, upper = 0, collected = 0;
    for (size_t c = 0; c < chunks_.size(); ++c) {
      const Counted<Key>& row = rows[c * width];
      if (row.collected && !row.keys) return false;
      above += row.above;
      equal += row.equal;
      collected += row.collected;
      for (int64_t i = 0; i < row.collected; ++i) upper += row.keys[i] > mid;
    }
    if (k <= above || k > above + collected + equal) return false;
    int64_t rank;  // of the k-th key among those equal to it, from 1
    Key key = mid;
    if (k <= above + upper) {
      key = SelectCollected(rows, width, mid + 1, static_cast<Key>(bracket.hi), k - above, &rank);
    } else if (k > above + upper + equal) {
      key = SelectCollected(rows, width, static_cast<Key>(bracket.lo), mid - 1, k - above - upper - equal, &rank);
    } else {
      rank = k - above - upper;
    }
    *result = {key, tie_all_ ? n_ - 1 : Cut(model, rows, width, mid, key, rank)};
    return true;
  }

  // The k-th largest of the collected keys in [lo, hi], and its rank among those equal to it: narrowing histograms, linear in their number.
  Key SelectCollected(const Counted<Key>* rows, size_t width, Key lo, Key hi, int64_t k, int64_t* rank) const {
    auto for_each = [&](auto&& visit) {
      for (size_t c = 0; c < chunks_.size(); ++c) {
        const Counted<Key>& row = rows[c * width];
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

  // Flat index of the rank-th element whose key is `key`: counts lead to its chunk, and only that is looked at again.
  int64_t Cut(int model, const Counted<Key>* rows, size_t width, Key mid, Key key, int64_t rank) const {
    for (size_t c = 0; c < chunks_.size(); ++c) {
      const Counted<Key>& row = rows[c * width];
      const int64_t here = key == mid ? row.equal : std::count(row.keys, row.keys + row.collected, key);
      if (rank <= here) {
        const ChunkRef& chunk = chunks_[c];
        std::vector<Key> keys(static_cast<size_t>(chunk.end - chunk.begin));
        kernels_.keys(tensors_[chunk.tensor], model, chunk.begin, chunk.end, keys.data());
        return chunk.offset + IndexOfEqual(keys.data(), static_cast<int64_t>(keys.size()), key, rank);
      }
      rank -= here;
    }
    return n_ - 1;
  }

  Key KeyByDigits(int model) const {
    using Histogram = std::array<int64_t, 1 << kDigit>;
    constexpr int kBits = std::numeric_limits<Key>::digits;
    int64_t k = counts_[model];
    Key prefix = 0;
    for (int shift = (kBits - 1) / kDigit * kDigit; shift >= 0; shift -= kDigit) {
      std::vector<Histogram> histogram(static_cast<size_t>(threads_), Histogram{});
      std::vector<std::vector<Key>> keys(static_cast<size_t>(threads_), std::vector<Key>(kChunk));
      ParallelFor(static_cast<int64_t>(chunks_.size()), threads_, [&](int64_t c, int slot) {
        const ChunkRef& chunk = chunks_[c];
        kernels_.keys(tensors_[chunk.tensor], model, chunk.begin, chunk.end, keys[slot].data());
        for (int64_t i = 0; i < chunk.end - chunk.begin; ++i) {
          const Key key = keys[slot][i];
          // Two shifts: the first alone may be by the whole width of the key.
          if (key >> shift >> (kDigit - 1) >> 1 == prefix >> shift >> (kDigit - 1) >> 1) ++histogram[slot][key >> shift & ((1 << kDigit) - 1)];
        }
      });
      int64_t digit = (1 << kDigit) - 1;
      for (;; --digit) {
        int64_t here = 0;
        for (const Histogram& h : histogram) here += h[digit];
        if (k <= here || digit == 0) break;
        k -= here;
      }
      prefix |= static_cast<Key>(digit) << shift;
    }
    return prefix;
  }

  const std::vector<Deltas>& tensors_;
  const Kernels& kernels_;
  const std::vector<int64_t>& counts_;
  const bool tie_all_;
  int threads_ = 1;
  int64_t n_ = 0;
  std::vector<ChunkRef> chunks_;
};

}  // namespace

int UsefulThreads(int64_t bytes, int threads) {
  constexpr int64_t kBytesPerThread = 1 << 19;  // waking a thread costs about as much as moving this much
  return static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::clamp(threads, 1, kMaxThreads)));
}

std::vector<Selection> Select(const std::vector<Deltas>& tensors, const std::vector<int64_t>& counts, bool tie_all, int threads) {
  if (!tensors.empty() && tensors[0].f64) return Selector<int64_t>(tensors, counts, tie_all, threads).Run();
  return Selector<int32_t>(tensors, counts, tie_all, threads).Run();
}

}  // namespace pymerge
