// TIES of one tensor with a single pass over it.
#pragma once

#include "merge.h"

namespace pymerge {

// Does what MergeTensor does, in its half of the time, for plans that trim by magnitude and elect by mass, if all tensors share a dtype.
// False if it could not: then nothing of the plan has been completed, and the result is undefined.
bool MergeInOnePass(MergePlan* plan, int threads, bool* finite);

}  // namespace pymerge
