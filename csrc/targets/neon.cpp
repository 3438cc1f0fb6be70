// Compiled with this instruction set's flags (setup.py); reached only through dispatch, after the CPU was found to have it.
#define PYMERGE_TARGET neon
#include "simd/neon.h"

#include "kernels/table-inl.h"

namespace pymerge {
extern const Kernels kNeonKernels = neon::MakeTable("neon");
}  // namespace pymerge
