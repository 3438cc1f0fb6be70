// Compiled with the architecture's baseline flags only.
#define PYMERGE_TARGET scalar
#include "simd/scalar.h"
#include "simd/words.h"

namespace pymerge {
namespace scalar {
using Lanes = ScalarLanes<float>;
}  // namespace scalar
}  // namespace pymerge

#include "kernels/table-inl.h"

namespace pymerge {
extern const Kernels kScalarKernels = scalar::MakeTable("scalar");
}  // namespace pymerge
