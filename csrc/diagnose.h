// Statistics of how the models of a merge differ, with the pieces of a tensor shared out among threads.
#pragma once

#include "types.h"

namespace pymerge {

constexpr int64_t kDiagnosePiece = 1 << 19;  // elements per piece; sums of pieces are added in order, so it is part of the arithmetic

// How many sums and counts there are of so many models.
int DiagnoseSums(int models);
int DiagnoseCounts(int models);

// Adds one tensor's sums and counts to those given; job.sums is filled in. types.h has their order.
void DiagnoseTensor(DiagnoseJob job, int threads, double* sums, int64_t* counts);

}  // namespace pymerge
