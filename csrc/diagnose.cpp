#include "diagnose.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "dispatch.h"
#include "merge.h"
#include "thread_pool.h"

namespace pymerge {
namespace {

constexpr size_t kLine = 64;

// Bytes that the kernel needs, and to align them.
size_t ScratchBytes(const DiagnoseJob& job) {
  return (static_cast<size_t>(job.sums) * 64 * sizeof(double) + static_cast<size_t>(job.in.models + 3) * kDiagnoseRun + kLine) / kLine * kLine;
}

unsigned char* Aligned(std::vector<unsigned char>* memory, size_t bytes) {
  if (memory->size() < bytes + kLine) memory->resize(bytes + kLine);
  return memory->data() + (kLine - reinterpret_cast<uintptr_t>(memory->data()) % kLine) % kLine;
}

// Adds what was found of a piece.
void AddPiece(const DiagnoseJob& job, const double* piece_sums, const int64_t* piece_counts, double* sums, int64_t* counts) {
  const int models = job.in.models;
  for (int s = 0; s < job.sums; ++s) sums[s] += piece_sums[s];
  for (int c = 0; c < DiagnoseCounts(models); ++c) {
    const bool largest = c >= 2 * models && c < 3 * models;
    counts[c] = largest ? std::max(counts[c], piece_counts[c]) : counts[c] + piece_counts[c];
  }
}

bool ReadAll(int file, int64_t offset, unsigned char* target, size_t bytes) {
  while (bytes > 0) {
    const ssize_t got = pread(file, target, bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    target += got;
    offset += got;
    bytes -= static_cast<size_t>(got);
  }
  return true;
}

}  // namespace

int DiagnoseSums(int models) { return (models + 1) * (models + 2) / 2 + models + 1; }
int DiagnoseCounts(int models) { return 4 * models + models * (models - 1); }

void DiagnoseTensor(DiagnoseJob job, int threads, double* sums, int64_t* counts) {
  job.sums = DiagnoseSums(job.in.models);
  const size_t own_sums = static_cast<size_t>(job.sums), own_counts = static_cast<size_t>(DiagnoseCounts(job.in.models));
  const int64_t pieces = (job.in.n + kDiagnosePiece - 1) / kDiagnosePiece;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, pieces, kMaxThreads})));
  std::vector<double> piece_sums(static_cast<size_t>(pieces) * own_sums);
  std::vector<int64_t> piece_counts(static_cast<size_t>(pieces) * own_counts);
  std::vector<unsigned char> memory;
  unsigned char* scratch = Aligned(&memory, ScratchBytes(job) * static_cast<size_t>(threads));
  ParallelFor(pieces, threads, [&](int64_t i, int slot) {
    CurrentKernels().diagnose(job, i * kDiagnosePiece, std::min((i + 1) * kDiagnosePiece, job.in.n),
                              scratch + ScratchBytes(job) * static_cast<size_t>(slot), piece_sums.data() + static_cast<size_t>(i) * own_sums,
                              piece_counts.data() + static_cast<size_t>(i) * own_counts);
  });
  for (size_t i = 0; i < static_cast<size_t>(pieces); ++i) {
    AddPiece(job, piece_sums.data() + i * own_sums, piece_counts.data() + i * own_counts, sums, counts);
  }
}

int DiagnoseFiles(DiagnoseJob job, bool has_base, const FilePart* parts, double* sums, int64_t* counts) {
  thread_local std::vector<unsigned char> memory;  // mapped once: faulting its pages in anew would cost as much as reading
  job.sums = DiagnoseSums(job.in.models);
  const int64_t n = job.in.n;
  const int vectors = job.in.models + has_base;
  const size_t scratch_bytes = ScratchBytes(job), buffer_bytes = static_cast<size_t>(kChunk) * (job.in.f64 ? 8 : 4);
  unsigned char* scratch = Aligned(&memory, scratch_bytes + static_cast<size_t>(vectors) * buffer_bytes);
  Selection selection[kMaxModels];
  std::copy(job.selection, job.selection + job.in.models, selection);
  std::vector<double> piece_sums;
  std::vector<int64_t> piece_counts;
  int failed = -1;
  const auto read_and_add = [&](int64_t piece, int) {
    const int64_t end = std::min((piece + 1) * kDiagnosePiece, n);
    piece_sums.assign(static_cast<size_t>(job.sums), 0.0);
    piece_counts.assign(static_cast<size_t>(DiagnoseCounts(job.in.models)), 0);
    for (int64_t begin = piece * kDiagnosePiece; begin < end && failed < 0; begin += kChunk) {
      job.in.n = std::min(kChunk, end - begin);
      for (int v = 0; v < vectors; ++v) {
        unsigned char* buffer = scratch + scratch_bytes + static_cast<size_t>(v) * buffer_bytes;
        const int64_t size = BytesOf(parts[v].dtype);
        if (!ReadAll(parts[v].file, parts[v].offset + begin * size, buffer, static_cast<size_t>(job.in.n * size))) failed = v;
        (has_base && v == 0 ? job.in.base : job.in.model[v - has_base]) = {buffer, parts[v].dtype};
      }
      for (int m = 0; m < job.in.models; ++m) job.selection[m].cut = selection[m].cut - begin;
      if (failed < 0) CurrentKernels().diagnose(job, 0, job.in.n, scratch, piece_sums.data(), piece_counts.data());
    }
    AddPiece(job, piece_sums.data(), piece_counts.data(), sums, counts);
  };
  ParallelFor((n + kDiagnosePiece - 1) / kDiagnosePiece, 1, read_and_add);
  return failed;
}

}  // namespace pymerge
