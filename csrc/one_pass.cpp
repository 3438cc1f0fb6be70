// Selecting and merging take a pass over the data each, and the passes are all that they cost. Here the tensor is merged by guessed thresholds
// while the same pass counts what proves them; what the guess got wrong is merged again:
//   1. A sample gives each model a guess at its k-th magnitude and a bracket around it.
//   2. Every 32nd chunk is merged by that. Keys are counted against the guess, and those inside the bracket are written down. This is a
//      sample a hundred times as large, of exact counts: it gives a narrow bracket, which for bf16 deltas, percents of which share one
//      magnitude, is often that magnitude alone.
//   3. The other chunks are merged by the narrow bracket.
//   4. The counts prove that the k-th magnitude lies inside, and it is selected among the keys that were written down.
//   5. Those of them on the wrong side are merged again, one by one; so are whole chunks where elements equal to the guess were kept and
//      should not have been, or the other way round. Which of those are kept is a question of the index, up to a cut; where it lies is
//      estimated while the counts come in, so that it is off by a few chunks of thousands.
// When a guess is useless (adversarial data: not proven, or too much to write down), two passes do it.
#include "one_pass.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "arena.h"
#include "digits.h"
#include "dispatch.h"
#include "rank.h"
#include "sample.h"
#include "select_cached.h"
#include "thread_pool.h"

namespace pymerge {
namespace {

using Key = int32_t;
constexpr int64_t kRoom = 1 << 13;   // keys written down per chunk and model
constexpr Key kInfinity = 0x7F800000;
// Half a bracket's width in standard deviations: missing the sample's costs a part of a pass, missing the narrow one two passes more.
constexpr double kSampleSpread = 4.0, kSpread = 4.5;

// Of one chunk and model: keys above the guess and equal to it, and all others inside the bracket with their places.
struct Row {
  int32_t greater = 0, equal = 0, noted = 0;
  const Key* keys = nullptr;
  const uint16_t* index = nullptr;
};

int64_t Power(int64_t x) {
  int64_t power = 1;
  while (power <= x / 2) power *= 2;
  return power;
}

int64_t CountBetween(const Row& row, Key above, Key up_to) {
  return std::count_if(row.keys, row.keys + row.noted, [&](Key x) { return x > above && x <= up_to; });
}

// Keys above t, which is inside the bracket or just below it.
int64_t Greater(const Row& row, const Bracket& bracket, Key t) {
  const Key mid = static_cast<Key>(bracket.mid);
  return t >= mid ? row.greater - CountBetween(row, mid, t) : row.greater + row.equal + CountBetween(row, t, mid - 1);
}

int64_t Equal(const Row& row, const Bracket& bracket, Key x) { return x == bracket.mid ? row.equal : CountBetween(row, x - 1, x); }

// What some chunks say of one model's keys inside a bracket.
class Inside {
 public:
  Inside(Key lo, Key hi) : lo_(lo), hi_(hi) {}

  void Add(const Row& row, const Bracket& bracket) {
    above_ += Greater(row, bracket, hi_);
    size_t count = keys_.size();
    keys_.resize(count + static_cast<size_t>(row.noted));
    for (int32_t i = 0; i < row.noted; ++i) {
      keys_[count] = row.keys[i];
      count += row.keys[i] >= lo_ && row.keys[i] <= hi_;
    }
    keys_.resize(count);
    const Key mid = static_cast<Key>(bracket.mid);
    if (mid < lo_ || mid > hi_) return;
    const size_t g = groups_.empty() || groups_[0].key == mid ? 0 : 1;  // two brackets, so two guesses at most
    if (g == groups_.size()) groups_.push_back({mid, 0});
    groups_[g].count += row.equal;
  }

  // The rank-th largest key of all, from 1; -1 when it is below the bracket, the largest possible one when it is above. `equal_rank`: its
  // rank among those equal to it.
  Key AtRank(int64_t rank, int64_t* equal_rank) {
    rank -= above_;
    if (rank <= 0) return std::numeric_limits<Key>::max();
    std::sort(groups_.begin(), groups_.end(), [](const Group& a, const Group& b) { return a.key > b.key; });
    const int64_t n = static_cast<int64_t>(keys_.size());
    for (const Group& group : groups_) {
      const int64_t above = std::count_if(keys_.begin(), keys_.end(), [&](Key x) { return x > group.key; });
      if (rank <= above) break;
      // A guess of one bracket is a key written down in the other.
      *equal_rank = rank - above;
      if (*equal_rank <= group.count + std::count(keys_.begin(), keys_.end(), group.key)) return group.key;
      rank -= group.count;
    }
    if (rank > n) return -1;
    *equal_rank = rank;
    return KthKey(keys_.data(), n, equal_rank);
  }

 private:
  struct Group {
    Key key;
    int64_t count;
  };

  const Key lo_, hi_;
  int64_t above_ = 0;
  std::vector<Key> keys_;
  std::vector<Group> groups_;
};

class OnePass {
 public:
  OnePass(MergePlan* plan, int threads)
      : plan_(*plan),
        job_(plan->job),
        threads_(threads),
        kernels_(CurrentKernels()),
        n_(job_.in.n),
        chunk_(std::min(Power(n_ / 128), kChunk)),
        chunks_((n_ + chunk_ - 1) / chunk_),
        stride_(std::min<int64_t>(chunks_ / 16, 32)),
        rows_(static_cast<size_t>(chunks_ * job_.in.models)),
        kept_ties_(static_cast<size_t>(chunks_)),
        model_(static_cast<size_t>(job_.in.models)),
        arenas_(static_cast<size_t>(kMaxThreads)) {}

  // False if two passes have to do it.
  bool Merge(bool* finite) {
    ForEachModel([&](int m) { return Sample(&model_[m], m); });
    if (!all_well_ || !MergeStage(0)) return false;
    ForEachModel([&](int m) { return Refine(&model_[m], m); });
    if (!all_well_ || !MergeStage(1)) return false;
    ForEachModel([&](int m) { return Choose(&model_[m], m); });
    if (!all_well_) return false;
    *finite = Correct();
    return true;
  }

 private:
  struct Model {
    Bracket bracket[2];    // of each stage
    int64_t ties_end = 0;  // where, in a sample, elements equal to the guess end to be kept
    // After the first stage: what its chunks before each of them have above the second guess and equal to it.
    std::vector<int64_t> greater_before, equal_before;
    std::atomic<int64_t> greater{0}, equal{0};  // of the second stage's chunks so far
  };

  template <class F>
  void ForEachModel(F&& f) {
    ParallelFor(job_.in.models, threads_, [&](int64_t m, int) {
      if (!f(static_cast<int>(m))) all_well_ = false;
    });
  }

  int Stage(int64_t chunk) const { return chunk % stride_ ? 1 : 0; }
  const Row& RowOf(int64_t chunk, int m) const { return rows_[static_cast<size_t>(chunk * job_.in.models + m)]; }
  const Bracket& BracketOf(int64_t chunk, int m) const { return model_[static_cast<size_t>(m)].bracket[Stage(chunk)]; }

  bool Sample(Model* model, int m) {
    constexpr int kRun = 16;  // a line of the cache or two
    const int64_t runs = std::min<int64_t>(n_ / 256 / kRun, 2048);
    std::vector<Key> ordered(static_cast<size_t>(runs * kRun));
    ForEachRun(n_, kRun, runs, [&](int64_t r, int64_t begin) { kernels_.keys(job_.in, m, begin, begin + kRun, ordered.data() + r * kRun); });
    const int64_t size = runs * kRun;
    const double share = static_cast<double>(plan_.counts[m]) / static_cast<double>(n_);
    const Bracket& bracket = model->bracket[0] = BracketOfSample(ordered.data(), size, share, kSampleSpread);
    int64_t kept_ties = static_cast<int64_t>(share * static_cast<double>(size)), at = 0;
    for (Key x : ordered) kept_ties -= x > bracket.mid;
    while (at < size && (ordered[at] != bracket.mid || --kept_ties >= 0)) ++at;
    model->ties_end = static_cast<int64_t>(static_cast<double>(at) / static_cast<double>(size) * static_cast<double>(n_));
    return bracket.mid < kInfinity;
  }

  // Merges a stage's chunks by its guesses. False if that is of no use.
  bool MergeStage(int stage) {
    const int models = job_.in.models;
    std::vector<Bracket> brackets;
    for (const Model& model : model_) brackets.push_back(model.bracket[stage]);
    const int64_t firsts = (chunks_ + stride_ - 1) / stride_;
    ParallelFor(stage ? chunks_ - firsts : firsts, threads_, [&](int64_t i, int slot) {
      if (!all_well_) return;
      const int64_t c = stage ? i / (stride_ - 1) * stride_ + i % (stride_ - 1) + 1 : i * stride_;
      const int64_t begin = c * chunk_, end = std::min(begin + chunk_, n_);
      Collected collected[kMaxModels];
      Arena<Key>& arena = arenas_[static_cast<size_t>(slot)];
      Key* const room = arena.Staging(models * (kRoom + kRoom / 2));
      uint64_t kept = 0;
      for (int m = 0; m < models; ++m) {
        const bool keep = plan_.tie_all || (stage ? KeepsTies(model_[m], c, m) : begin < model_[m].ties_end);
        kept |= uint64_t{keep} << m;
        collected[m].room = kRoom;
        collected[m].keys = room + m * (kRoom + kRoom / 2);
        collected[m].index = reinterpret_cast<uint16_t*>(collected[m].keys + kRoom);
      }
      kept_ties_[static_cast<size_t>(c)] = kept;
      if (!kernels_.merge_counting(job_, brackets.data(), kept, begin, end, collected)) all_well_ = false;
      for (int m = 0; m < models; ++m) {
        const Collected& found = collected[m];
        Row& row = rows_[static_cast<size_t>(c * models + m)];
        row.greater = static_cast<int32_t>(found.kept - (kept >> m & 1 ? found.equal : 0));
        row.equal = static_cast<int32_t>(found.equal);
        if (found.count > kRoom) {
          all_well_ = false;
        } else if (found.count) {
          row.noted = static_cast<int32_t>(found.count);
          row.keys = arena.Keep(found.keys, found.count);
          row.index = reinterpret_cast<const uint16_t*>(arena.Keep(reinterpret_cast<const Key*>(found.index), (found.count + 1) / 2));
          if (!row.keys || !row.index) all_well_ = false;
        }
        model_[m].greater.fetch_add(row.greater, std::memory_order_relaxed);
        model_[m].equal.fetch_add(row.equal, std::memory_order_relaxed);
      }
    });
    return all_well_;
  }

  // Whether elements of a chunk that equal the second guess are kept: whether those before it are fewer than there is room for beside the
  // greater ones of the whole tensor, of which chunks to come have as many as the first stage's chunks among them say.
  bool KeepsTies(const Model& model, int64_t chunk, int m) const {
    const size_t before = static_cast<size_t>(chunk / stride_ + 1);
    const int64_t nearest = model.greater_before[before] - model.greater_before[before - 1];
    const int64_t to_come = (model.greater_before.back() - model.greater_before[before]) * stride_ + nearest * (stride_ - chunk % stride_);
    const int64_t greater = model.greater.load(std::memory_order_relaxed) + model.greater_before[before] + to_come;
    return model.equal.load(std::memory_order_relaxed) + model.equal_before[before] < plan_.counts[m] - greater;
  }

  // The narrow bracket, from the exact counts of the first stage.
  bool Refine(Model* model, int m) {
    const Bracket& wide = model->bracket[0];
    Inside inside(static_cast<Key>(wide.lo), static_cast<Key>(wide.hi));
    double chunks = 0, sum = 0, squares = 0, elements = 0;
    for (int64_t c = 0; c < chunks_; c += stride_) {
      const Row& row = RowOf(c, m);
      inside.Add(row, wide);
      const double size = static_cast<double>(std::min(chunk_, n_ - c * chunk_)), share = row.greater / size;
      chunks += 1, sum += share, squares += share * share, elements += size;
    }
    // Chunks of a real tensor differ more than samples of independent elements would.
    const double p = static_cast<double>(plan_.counts[m]) / static_cast<double>(n_), mean = sum / chunks;
    const double variance = std::max(elements * p * (1 - p), (squares / chunks - mean * mean) * elements * elements / chunks);
    const int64_t rank = static_cast<int64_t>(p * elements), spread = static_cast<int64_t>(kSpread * std::sqrt(variance)) + 2;
    int64_t unused;
    Bracket& narrow = model->bracket[1] = wide;
    const Key hi = inside.AtRank(rank - spread, &unused), mid = inside.AtRank(rank, &unused), lo = inside.AtRank(rank + spread, &unused);
    if (mid < 0 || mid >= kInfinity) return false;  // the sample was a bad one
    if (hi < wide.hi) narrow.hi = hi;
    if (lo > wide.lo) narrow.lo = lo;
    narrow.mid = mid;
    for (int64_t c = 0; c < chunks_; c += stride_) {
      model->greater_before.push_back(c ? model->greater_before.back() + Greater(RowOf(c - stride_, m), wide, mid) : 0);
      model->equal_before.push_back(c ? model->equal_before.back() + Equal(RowOf(c - stride_, m), wide, mid) : 0);
    }
    const int64_t last = (chunks_ - 1) / stride_ * stride_;
    model->greater_before.push_back(model->greater_before.back() + Greater(RowOf(last, m), wide, mid));
    model->equal_before.push_back(model->equal_before.back() + Equal(RowOf(last, m), wide, mid));
    model->greater = model->equal = 0;
    return true;
  }

  // The k-th magnitude and its last element kept.
  bool Choose(Model* model, int m) {
    const Bracket& narrow = model->bracket[1];
    Inside inside(static_cast<Key>(narrow.lo), static_cast<Key>(narrow.hi));
    for (int64_t c = 0; c < chunks_; ++c) inside.Add(RowOf(c, m), BracketOf(c, m));
    int64_t rank = 0;
    const Key key = inside.AtRank(plan_.counts[m], &rank);
    if (key < 0 || key >= kInfinity) return false;
    job_.selection[m] = {key, n_ - 1};
    if (plan_.tie_all) return true;
    for (int64_t c = 0; c < chunks_; ++c) {
      const int64_t here = Equal(RowOf(c, m), BracketOf(c, m), key);
      if (rank <= here) {
        job_.selection[m].cut = ElementOfEqual(c, m, key, rank);
        return true;
      }
      rank -= here;
    }
    return false;
  }

  // Which element the rank-th of a chunk with that key is.
  int64_t ElementOfEqual(int64_t chunk, int m, Key key, int64_t rank) const {
    const int64_t begin = chunk * chunk_, end = std::min(begin + chunk_, n_);
    std::vector<Key> keys(static_cast<size_t>(end - begin));
    kernels_.keys(job_.in, m, begin, end, keys.data());
    return begin + IndexOfEqual(keys.data(), end - begin, key, rank);
  }

  // False if some delta is not finite.
  bool Correct() {
    bool elements = true;
    for (int m = 0; m < job_.in.models; ++m) elements &= job_.selection[m].key > 0;
    std::atomic<bool> finite{true};
    ParallelFor(chunks_, threads_, [&](int64_t c, int) {
      const int64_t begin = c * chunk_, end = std::min(begin + chunk_, n_);
      if (elements && !TiesWrong(c, begin, end)) {
        CorrectElements(c, begin);
      } else if (!kernels_.merge(job_, begin, end)) {
        finite = false;
      }
    });
    return finite;
  }

  bool TiesWrong(int64_t chunk, int64_t begin, int64_t end) const {
    for (int m = 0; m < job_.in.models; ++m) {
      if (!RowOf(chunk, m).equal) continue;
      const Selection& chosen = job_.selection[m];
      const int64_t mid = BracketOf(chunk, m).mid;
      const bool all = mid > chosen.key || (mid == chosen.key && chosen.cut >= end - 1);
      const bool none = mid < chosen.key || (mid == chosen.key && chosen.cut < begin);
      const bool kept = kept_ties_[static_cast<size_t>(chunk)] >> m & 1;
      if (kept ? !all : !none) return true;
    }
    return false;
  }

  // Merges again those written down whose side of the guess is not their side of the k-th magnitude.
  void CorrectElements(int64_t chunk, int64_t begin) const {
    constexpr int kBatch = 256;
    for (int m = 0; m < job_.in.models; ++m) {
      const Row& row = RowOf(chunk, m);
      const Selection& chosen = job_.selection[m];
      const Key mid = static_cast<Key>(BracketOf(chunk, m).mid);
      if (mid == chosen.key) continue;
      uint16_t wrong[kBatch];
      int count = 0;
      for (int32_t i = 0; i < row.noted; ++i) {
        const Key key = row.keys[i];
        const bool kept = key > chosen.key || (key == chosen.key && begin + row.index[i] <= chosen.cut);
        wrong[count] = row.index[i];
        count += kept != (key > mid);
        if (count == kBatch) {
          kernels_.merge_elements(job_, begin, wrong, count);
          count = 0;
        }
      }
      if (count) kernels_.merge_elements(job_, begin, wrong, count);
    }
  }

  const MergePlan& plan_;
  MergeJob& job_;
  const int threads_;
  const Kernels& kernels_;
  const int64_t n_, chunk_, chunks_;
  const int64_t stride_;  // of the first stage's chunks
  std::vector<Row> rows_;            // by chunk, then model
  std::vector<uint64_t> kept_ties_;  // per chunk, a bit for each model: elements equal to its guess were kept
  std::vector<Model> model_;
  std::vector<Arena<Key>> arenas_;   // per thread
  std::atomic<bool> all_well_{true};
};

bool Overlap(const void* a, const void* b, int64_t bytes) {
  const auto x = reinterpret_cast<uintptr_t>(a), y = reinterpret_cast<uintptr_t>(b);
  return x < y + static_cast<uintptr_t>(bytes) && y < x + static_cast<uintptr_t>(bytes);
}

bool CanMerge(const MergePlan& plan) {
  const MergeJob& job = plan.job;
  const int64_t n = job.in.n;
  if (job.sparsify != Sparsify::kMagnitude || job.vote != Vote::kMass || plan.selected || plan.majority || plan.rescaled) return false;
  if (plan.rescale != Rescale::kNone || job.in.f64 || n < kMostCached || job.out.dtype == DType::kF64) return false;
  const int64_t bytes = n * BytesOf(job.out.dtype);
  const auto alike = [&](const Input& in) { return in.dtype == job.out.dtype && !Overlap(in.data, job.out.data, bytes); };
  if (job.in.base.data && !alike(job.in.base)) return false;
  for (int m = 0; m < job.in.models; ++m) {
    if (!alike(job.in.model[m]) || plan.counts[m] <= 0 || plan.counts[m] >= n) return false;
  }
  return true;
}

}  // namespace

bool MergeInOnePass(MergePlan* plan, int threads, bool* finite) {
  if (!CanMerge(*plan)) return false;
  for (int m = 0; m < plan->job.in.models; ++m) plan->job.rescale[m] = 1.0;
  return OnePass(plan, threads).Merge(finite);
}

}  // namespace pymerge
