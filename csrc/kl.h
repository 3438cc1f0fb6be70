// Divergences between rows of logits, and their gradients, with the rows shared out among threads.
#pragma once

#include "types.h"

namespace pymerge {

// job.loss and job.stats from the logits.
void KlForwardRows(const KlJob& job, int threads);

// job.out from the logits, job.stats and job.grad.
void KlBackwardRows(const KlJob& job, int threads);

}  // namespace pymerge
