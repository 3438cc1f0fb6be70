// Compiled with this instruction set's flags (setup.py); reached only through dispatch, after the CPU was found to have it.
#define PYMERGE_TARGET avx512
#include "simd/avx512.h"

#include "kernels/table-inl.h"

namespace pymerge {
extern const Kernels kAvx512Kernels = avx512::MakeTable("avx512");
}  // namespace pymerge
