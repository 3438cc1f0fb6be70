#include "select.h"

#include <algorithm>

#include "select_cached.h"
#include "thread_pool.h"

namespace pymerge {

std::vector<Selection> Select(const std::vector<Deltas>& tensors, const std::vector<int64_t>& counts, bool tie_all, int threads) {
  const bool f64 = !tensors.empty() && tensors[0].f64;
  int64_t n = 0;
  for (const Deltas& tensor : tensors) n += tensor.n;
  threads = UsefulThreads(n * (f64 ? 8 : 4) * static_cast<int64_t>(counts.size() + 1), threads);
  if (tensors.size() == 1 && n <= kMostCached) return SelectCached(tensors[0], counts, tie_all, threads);
  std::vector<Deltas> parts = tensors;
  for (size_t i = 0; i < parts.size(); ++i) parts[i].first = i ? parts[i - 1].first + parts[i - 1].n : 0;
  const auto selection = StreamedSelection::MakeInMemory(n, counts, tie_all, f64);
  ParallelFor(selection->Searched(), threads, [&](int64_t s, int) {
    size_t p = 0;
    for (const FlatRange& range : selection->SampleRanges()) {
      for (int64_t at = range.begin; at < range.end;) {
        while (parts[p].first + parts[p].n <= at) ++p;
        const int64_t end = std::min(range.end, parts[p].first + parts[p].n);
        selection->SampleOne(static_cast<int>(s), parts[p], at - parts[p].first, end - parts[p].first);
        at = end;
      }
    }
  });
  do {
    selection->Add(parts, threads);
  } while (!selection->EndPass(threads));
  const std::vector<Lookup>& lookups = selection->Lookups();
  ParallelFor(static_cast<int64_t>(lookups.size()), threads, [&](int64_t i, int) {
    const auto holds = [&](const Deltas& part) { return part.first <= lookups[i].begin && lookups[i].begin < part.first + part.n; };
    selection->Look(static_cast<size_t>(i), *std::find_if(parts.begin(), parts.end(), holds));
  });
  return selection->Result();
}

}  // namespace pymerge
