// Digits of 16 bits that keys are made of, the upper one first: 32 of them are compared at a time (csrc/digits.h).
#pragma once

#include "kernels/bits-inl.h"
#include "kernels/select-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

template <class L>
void UpperDigitsRange(const Deltas& in, int model, int64_t begin, int64_t end, int16_t* digits) {
  ForEachPiece<L>(
      in, model, begin, end,
      [&](const auto* base, const auto* x, int64_t n) {
        using P = Pair<L, std::decay_t<decltype(*x)>>;
        int64_t i = 0;
        for (; i + 2 * L::kLanes <= n; i += 2 * L::kLanes) {
          const P b = base ? P::Load(base + i) : P{}, v = P::Load(x + i);
          P::StoreUpper(digits + i, L::KeysOf(L::Sub(v.Half(0), b.Half(0))), L::KeysOf(L::Sub(v.Half(1), b.Half(1))));
        }
        if (i < n) L::StoreUpper(digits + i, DeltaKeys<L>(base, x, i));
        digits += n;
      },
      [&](const typename L::Key* tail, int64_t n) {
        for (int64_t i = 0; i < n; ++i) ScalarLanes<typename L::Real>::StoreUpper(digits + i, tail[i]);
      });
}

void UpperDigits(const Deltas& in, int model, int64_t begin, int64_t end, int16_t* digits) {
  if (in.f64) {
    UpperDigitsRange<ScalarLanes<double>>(in, model, begin, end, digits);
  } else {
    UpperDigitsRange<Lanes>(in, model, begin, end, digits);
  }
}

// dst[i] = in[index[i]] in the compute dtype; zeros where there is no tensor.
template <class R>
inline void WidenAt(const Input& in, const int32_t* index, int64_t n, R* dst) {
  const auto load = [&](const auto* from) {
    for (int64_t i = 0; i < n; ++i) dst[i] = ScalarLanes<R>::Load(from + index[i]);
  };
  if (!in.data) {
    memset(dst, 0, static_cast<size_t>(n) * sizeof(R));
  } else if (in.dtype == DType::kBF16) {
    load(static_cast<const Bf16*>(in.data));
  } else if (in.dtype == DType::kF16) {
    load(static_cast<const F16*>(in.data));
  } else if (in.dtype == DType::kF32) {
    load(static_cast<const float*>(in.data));
  } else if constexpr (sizeof(R) == sizeof(double)) {
    load(static_cast<const double*>(in.data));
  }
}

template <class R>
void DigitsAtOf(const Deltas& in, int model, const int32_t* index, int64_t count, int shift, int16_t* digits) {
  using S = ScalarLanes<R>;
  R base[kKeyPiece], x[kKeyPiece];
  for (int64_t i = 0; i < count; i += kKeyPiece) {
    const int64_t n = count - i < kKeyPiece ? count - i : kKeyPiece;
    WidenAt(in.base, index + i, n, base);
    WidenAt(in.model[model], index + i, n, x);
    for (int64_t j = 0; j < n; ++j) digits[i + j] = static_cast<int16_t>((S::KeysOf(S::Sub(x[j], base[j])) >> shift) - kDigitOffset);
  }
}

void DigitsAt(const Deltas& in, int model, const int32_t* index, int64_t count, int shift, int16_t* digits) {
  if (in.f64) {
    DigitsAtOf<double>(in, model, index, count, shift, digits);
  } else {
    DigitsAtOf<float>(in, model, index, count, shift, digits);
  }
}

int64_t CountAbove(const int16_t* digits, int64_t n, int bound) {
  constexpr int64_t kFits = 1 << 14;  // a counter of 16 bits, of which the compiler makes vectors
  const int16_t least = static_cast<int16_t>(bound);
  int64_t total = 0;
  for (int64_t i = 0; i < n; i += kFits) {
    const int64_t end = n - i < kFits ? n : i + kFits;
    int16_t count = 0;
    for (int64_t j = i; j < end; ++j) count = static_cast<int16_t>(count + (digits[j] > least));
    total += count;
  }
  return total;
}

int64_t FindEqual(const int16_t* digits, int64_t n, int digit, int32_t* index) {
  const int16_t wanted = static_cast<int16_t>(digit);
  int64_t found = 0, i = 0;
  for (; i + 64 <= n; i += 64) {
    found += ForEachBit(EqualBits64(digits + i, wanted), [&](int n_th, int bit) { index[found + n_th] = static_cast<int32_t>(i + bit); });
  }
  for (; i < n; ++i) {
    index[found] = static_cast<int32_t>(i);
    found += digits[i] == wanted;
  }
  return found;
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
