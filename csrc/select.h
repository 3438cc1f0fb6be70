// Exact selection of the k largest magnitudes, over one tensor or over many taken together.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "types.h"

namespace pymerge {

// For each model m, what its counts[m] largest deltas are. `tensors` all have the same models and compute dtype; flat indices run through
// them in order. tie_all keeps everything at the k-th magnitude instead of the lowest indices.
std::vector<Selection> Select(const std::vector<Deltas>& tensors, const std::vector<int64_t>& counts, bool tie_all, int threads);

// Flat indices [begin, end).
struct FlatRange {
  int64_t begin, end;
};

// A chunk that has to be looked at again: the last element kept of `model` is the rank-th one at the k-th magnitude there.
struct Lookup {
  int model = 0;
  int64_t begin = 0, end = 0;  // flat indices
  int64_t rank = 0;
};

// Select for elements that do not lie in memory: they pass by in parts, in any order, as often as EndPass asks for (once, nearly always).
//   Sample(...) for the elements of SampleRanges(), if any; then Add(...) for all elements, until EndPass() says that it was the last
//   pass; then Look(i, ...) for each of Lookups(); then Result().
// Deltas::first is the flat index of a part's first element, among all the elements of the selection. Not for several threads at once.
class StreamedSelection {
 public:
  // For elements in files. n: elements in all; limit: of keys to collect per model.
  static std::unique_ptr<StreamedSelection> Make(int64_t n, const std::vector<int64_t>& counts, bool tie_all, bool f64, int64_t limit);
  // For elements in memory after all.
  static std::unique_ptr<StreamedSelection> MakeInMemory(int64_t n, const std::vector<int64_t>& counts, bool tie_all, bool f64);
  virtual ~StreamedSelection() = default;

  // Models whose k-th magnitude has to be searched for still: not those of which none or all elements are kept.
  virtual int Searched() const = 0;
  virtual const std::vector<FlatRange>& SampleRanges() const = 0;
  void Sample(const Deltas& part) {
    for (int s = 0; s < Searched(); ++s) SampleOne(s, part, 0, part.n);
  }
  // Elements [begin, end) of a part, for one of the models searched for; those of different models at the same time, if need be.
  virtual void SampleOne(int search, const Deltas& part, int64_t begin, int64_t end) = 0;
  // After the sample: what will be kept, most likely, ties all included.
  virtual std::vector<Selection> Guesses(int threads) = 0;
  virtual void Add(const std::vector<Deltas>& parts, int threads) = 0;
  virtual bool EndPass(int threads) = 0;
  virtual const std::vector<Lookup>& Lookups() const = 0;
  virtual void Look(size_t lookup, const Deltas& part) = 0;
  virtual const std::vector<Selection>& Result() const = 0;
  // Per model: how many elements the guess and the result, if all ties are kept, do not have in common, or more.
  virtual const std::vector<int64_t>& Strayed() const = 0;
};

}  // namespace pymerge
