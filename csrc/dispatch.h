// Picks the kernels for this CPU at run time.
#pragma once

#include <string>
#include <vector>

#include "types.h"

namespace pymerge {

// Names of the targets that this build has and this CPU can run, slowest first.
std::vector<std::string> AvailableTargets();

// Kernels in use: the fastest available ones, unless SelectTarget chose others.
const Kernels& CurrentKernels();

// Uses the named target from now on; an empty name means the fastest. Throws std::invalid_argument when the build or the CPU lacks it.
void SelectTarget(const std::string& name);

}  // namespace pymerge
