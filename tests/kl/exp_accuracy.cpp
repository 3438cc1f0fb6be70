// Largest errors in ulp of Exp, ExpM1 and Log1p against long double, over every `step`-th fp32 argument.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#define PYMERGE_TARGET scalar
#include "kernels/exp-inl.h"

using namespace pymerge::scalar;
using L = ScalarLanes<float>;

static double Ulps(float got, long double want) {
  int exponent;
  frexpl(want, &exponent);
  return static_cast<double>(fabsl(got - want) / ldexpl(1.0L, exponent - 24));
}

int main(int, char** argv) {
  const uint32_t step = static_cast<uint32_t>(atoi(argv[1]));
  double exp_error = 0, expm1_error = 0, log1p_error = 0;
  for (uint32_t bits = BitCast<uint32_t>(-1e-30f); bits <= BitCast<uint32_t>(kExpFloor); bits += step) {
    const float x = BitCast<float>(bits);
    exp_error = fmax(exp_error, Ulps(Exp<L>(x), expl(x)));
    expm1_error = fmax(expm1_error, Ulps(ExpM1<L>(x), expm1l(x)));
    if (x > -1.0f) log1p_error = fmax(log1p_error, Ulps(Log1p<L>(x), log1pl(x)));
  }
  printf("%.2f %.2f %.2f\n", exp_error, expm1_error, log1p_error);
  return 0;
}
