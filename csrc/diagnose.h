// Statistics of how the models of a merge differ, with the pieces of a tensor shared out among threads.
#pragma once

#include "types.h"

namespace pymerge {

constexpr int64_t kDiagnosePiece = 1 << 20;  // elements per piece; sums of pieces are added in order, so it is part of the arithmetic

// How many sums and counts there are of so many models.
int DiagnoseSums(int models);
int DiagnoseCounts(int models);

// Adds one tensor's sums and counts to those given; job.sums is filled in. types.h has their order.
void DiagnoseTensor(DiagnoseJob job, int threads, double* sums, int64_t* counts);

// Where the elements of a tensor lie in an open file.
struct FilePart {
  int file = -1;  // descriptor
  int64_t offset = 0;
  DType dtype = DType::kF32;
};

// The same of tensors in files, on the calling thread: job.in says how many models and elements, `parts` has the base, where there is one,
// and the models. They are read a few elements at a time into memory that stays in the second cache and is used again. Returns the index
// of a part that could not be read, sums and counts being without meaning then, or -1.
int DiagnoseFiles(DiagnoseJob job, bool has_base, const FilePart* parts, double* sums, int64_t* counts);

}  // namespace pymerge
