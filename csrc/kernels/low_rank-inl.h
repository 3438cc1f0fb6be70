// x + scale * left @ right: a LoRA added to its base. Every element is one fixed sequence of operations: products over the rank, each
// rounded, added in the order of the rank; times the scale; plus x. So blocking, threads and the vector's width change nothing.
#pragma once

#include <vector>

#include "kernels/convert-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

constexpr int kLowRankRows = 4;        // 4 rows of 2 vectors: 8 sums to hide the latency of an addition, 2 loads for 16 operations
constexpr int64_t kLowRankPiece = 512;  // columns: rank 64 of them are 128 KiB, which stays in the second-level cache over all rows
constexpr int64_t kLowRankStride = kLowRankPiece + 16;  // of their copy: rows a power of two apart would share one set of the first level

// scale * left @ right for R rows and V vectors of columns; rows of `out` are kLowRankPiece apart.
template <class L, int R, int V>
inline void LowRankStrip(const LowRankJob& job, int64_t row, const float* right, float* out) {
  const float* left = job.left + row * job.rank;
  typename L::Vec sum[R][V], b[V];
  for (int v = 0; v < V; ++v) b[v] = L::Load(right + v * L::kLanes);
  for (int r = 0; r < R; ++r) {
    const auto a = L::Set(left[r * job.rank]);
    for (int v = 0; v < V; ++v) sum[r][v] = L::Mul(a, b[v]);
  }
  for (int64_t k = 1; k < job.rank; ++k) {
    right += kLowRankStride;
    for (int v = 0; v < V; ++v) b[v] = L::Load(right + v * L::kLanes);
    for (int r = 0; r < R; ++r) {
      const auto a = L::Set(left[r * job.rank + k]);
      for (int v = 0; v < V; ++v) sum[r][v] = L::Add(sum[r][v], L::Mul(a, b[v]));
    }
  }
  const auto scale = L::Set(job.scale);
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) L::Store(out + r * kLowRankPiece + v * L::kLanes, L::Mul(sum[r][v], scale));
  }
}

// Adds to `count` <= kLowRankPiece columns of R rows; `right` is those columns of it, `position` that of their first element in x.
template <int R>
inline void LowRankTile(const LowRankJob& job, int64_t row, const float* right, int64_t count, int64_t position) {
  alignas(64) float sums[R * kLowRankPiece], x[kLowRankPiece];
  int64_t c = 0;
  for (; c + 2 * Lanes::kLanes <= count; c += 2 * Lanes::kLanes) LowRankStrip<Lanes, R, 2>(job, row, right + c, sums + c);
  for (; c + Lanes::kLanes <= count; c += Lanes::kLanes) LowRankStrip<Lanes, R, 1>(job, row, right + c, sums + c);
  for (; c < count; ++c) LowRankStrip<ScalarLanes<float>, R, 1>(job, row, right + c, sums + c);
  const Input in{job.x.data, job.x.dtype};
  for (int r = 0; r < R; ++r) {
    const int64_t begin = position + r * job.columns;
    Widen(in, begin, count, x);
    for (int64_t i = 0; i < count; ++i) x[i] += sums[r * kLowRankPiece + i];
    Narrow(x, begin, count, job.x);
  }
}

void LowRank(const LowRankJob& job, int64_t begin, int64_t end) {
  std::vector<float> right(static_cast<size_t>(job.rank * kLowRankStride));
  while (begin < end) {
    const int64_t row = (job.first + begin) / job.columns, column = (job.first + begin) % job.columns;
    const bool whole = column == 0 && end - begin >= job.columns;
    const int64_t rows = whole ? (end - begin) / job.columns : 1;
    const int64_t width = whole ? job.columns : (end - begin < job.columns - column ? end - begin : job.columns - column);
    for (int64_t c = 0; c < width; c += kLowRankPiece) {
      const int64_t count = width - c < kLowRankPiece ? width - c : kLowRankPiece;
      for (int64_t k = 0; k < job.rank; ++k) {
        memcpy(right.data() + k * kLowRankStride, job.right + k * job.columns + column + c, static_cast<size_t>(count) * sizeof(float));
      }
      int64_t r = 0;
      for (; r + kLowRankRows <= rows; r += kLowRankRows) {
        LowRankTile<kLowRankRows>(job, row + r, right.data(), count, begin + r * job.columns + c);
      }
      for (; r < rows; ++r) LowRankTile<1>(job, row + r, right.data(), count, begin + r * job.columns + c);
    }
    begin += rows * width;
  }
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
