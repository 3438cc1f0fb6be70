// exp, expm1 and log1p of fp32 vectors: no tables, no fused multiply-add, the same bytes on every target.
// Largest errors, over all fp32 arguments that occur: Exp 1.0 ulp, ExpM1 0.95 ulp, Log1p 2.7 ulp (tests/kl/test_exp.py).
#pragma once

#include "simd/scalar.h"

namespace pymerge {
namespace PYMERGE_TARGET {

// Arguments below this count as this: exp there is far below anything that an fp32 sum of probabilities can notice, and still normal.
constexpr float kExpFloor = -86.0f;

// e^x - 1 = power * rest + (power - 1): x = n ln 2 + r, |r| <= ln 2 / 2, power = 2^n, rest = e^r - 1.
template <class L>
struct ExpParts {
  typename L::Vec power, rest;
};

// x <= 0 (up to 88 would do); NaN stays NaN. ln 2 is split so that n times its high part is exact. The polynomial is minimax for
// (e^r - 1 - r) / r^2: relative error 3.1e-9 in e^r.
template <class L>
inline ExpParts<L> SplitExp(typename L::Vec x) {
  x = L::Larger(L::Set(kExpFloor), x);
  const auto magic = L::Set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
  const auto shifted = L::Add(L::Mul(x, L::Set(1.44269502f)), magic);
  const auto n = L::Sub(shifted, magic);
  const auto r = L::Sub(L::Sub(x, L::Mul(n, L::Set(0.693359375f))), L::Mul(n, L::Set(-2.12194442e-4f)));
  auto poly = L::Set(1.38144672e-3f);
  poly = L::Add(L::Mul(poly, r), L::Set(8.36878084e-3f));
  poly = L::Add(L::Mul(poly, r), L::Set(4.16683927e-2f));
  poly = L::Add(L::Mul(poly, r), L::Set(1.66665196e-1f));
  poly = L::Add(L::Mul(poly, r), L::Set(4.99999940e-1f));
  return {L::PowerOfTwo(shifted), L::Add(L::Mul(L::Mul(r, r), poly), r)};
}

// exp(x) for x <= 0; exp(kExpFloor) for everything below it.
template <class L>
inline typename L::Vec Exp(typename L::Vec x) {
  const auto e = SplitExp<L>(x);
  return L::Add(L::Mul(e.power, e.rest), e.power);
}

// exp(x) for x <= 0; 0 below kExpFloor.
template <class L>
inline typename L::Vec ExpOrZero(typename L::Vec x) {
  return L::Blend(L::Below(x, L::Set(kExpFloor)), L::Zero(), Exp<L>(x));
}

// exp(x) - 1 for x <= 0.
template <class L>
inline typename L::Vec ExpM1(typename L::Vec x) {
  const auto e = SplitExp<L>(x);
  return L::Add(L::Mul(e.power, e.rest), L::Sub(e.power, L::Set(1.0f)));
}

// log(1 + y) for -1 < y <= 0. 1 + y = f 2^k; log f = 2 atanh(s / (2 + s)) with s = f - 1, and where k = 0, s is y itself, so that nothing
// is lost for small y. Minimax in z^2: relative error 8.2e-10 in log f.
template <class L>
inline typename L::Vec Log1p(typename L::Vec y) {
  typename L::Vec k;
  const auto f = L::SplitPower(L::Add(y, L::Set(1.0f)), &k);
  const auto s = L::Blend(L::IsZero(k), y, L::Sub(f, L::Set(1.0f)));
  const auto z = L::Div(s, L::Add(s, L::Set(2.0f)));
  const auto u = L::Mul(z, z);
  auto poly = L::Set(2.98738271e-1f);
  poly = L::Add(L::Mul(poly, u), L::Set(3.99774700e-1f));
  poly = L::Add(L::Mul(poly, u), L::Set(6.66667759e-1f));
  const auto log_f = L::Add(L::Mul(L::Mul(z, u), poly), L::Add(z, z));
  return L::Add(L::Add(L::Mul(k, L::Set(-2.12194442e-4f)), log_f), L::Mul(k, L::Set(0.693359375f)));
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
