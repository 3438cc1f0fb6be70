// Compiled with this instruction set's flags (setup.py); reached only through dispatch, after the CPU was found to have it.
#define PYMERGE_TARGET avx2
#include "simd/avx2.h"

#include "kernels/table-inl.h"

namespace pymerge {
extern const Kernels kAvx2Kernels = avx2::MakeTable("avx2");
}  // namespace pymerge
