// Between storage dtypes and the compute dtype, element by element.
#pragma once

#include "simd/pair.h"
#include "types.h"

namespace pymerge {
namespace PYMERGE_TARGET {

template <class T>
inline const T* At(const Input& in, int64_t index) {
  return in.data ? static_cast<const T*>(in.data) + index : nullptr;
}

// The lanes that compute in R: the target's vectors for float, one lane for double.
template <class R>
struct LanesFor;
template <>
struct LanesFor<float> {
  using Type = Lanes;
};
template <>
struct LanesFor<double> {
  using Type = ScalarLanes<double>;
};

// dst[0..n) = src[0..n) by way of R; one of the two is R.
template <class R, class From, class To>
inline void ConvertEach(const From* src, int64_t n, To* dst) {
  using L = typename LanesFor<R>::Type;
  using S = ScalarLanes<R>;
  int64_t i = 0;
  for (; i + L::kLanes <= n; i += L::kLanes) L::Store(dst + i, L::Load(src + i));
  for (; i < n; ++i) S::Store(dst + i, S::Load(src + i));
}

// dst[0..n) = in[begin..begin+n) in the compute dtype; zeros where there is no tensor.
template <class R>
inline void Widen(const Input& in, int64_t begin, int64_t n, R* dst) {
  if (!in.data) {
    memset(dst, 0, static_cast<size_t>(n) * sizeof(R));
  } else if (in.dtype == DType::kBF16) {
    ConvertEach<R>(At<Bf16>(in, begin), n, dst);
  } else if (in.dtype == DType::kF16) {
    ConvertEach<R>(At<F16>(in, begin), n, dst);
  } else if (in.dtype == DType::kF32) {
    ConvertEach<R>(At<float>(in, begin), n, dst);
  } else if constexpr (sizeof(R) == sizeof(double)) {
    ConvertEach<R>(At<double>(in, begin), n, dst);
  }
}

template <class R>
inline void Narrow(const R* src, int64_t begin, int64_t n, const Output& out) {
  switch (out.dtype) {
    case DType::kF32: return ConvertEach<R>(src, n, static_cast<float*>(out.data) + begin);
    case DType::kBF16: return ConvertEach<R>(src, n, static_cast<Bf16*>(out.data) + begin);
    case DType::kF16: return ConvertEach<R>(src, n, static_cast<F16*>(out.data) + begin);
    case DType::kF64: break;
  }
  for (int64_t i = 0; i < n; ++i) Convert(src[i], static_cast<double*>(out.data) + begin + i);
}

// Storing past the cache needs whole aligned vectors of the storage type, or pairs of them.
template <class L, int kVectors = 1, class T>
inline bool Streamable(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (kVectors * L::kLanes * sizeof(T)) == 0;
}

template <class T>
struct Storage {
  using Type = T;
};

// Calls f with the storage type that all tensors of an fp32 computation share, or with float when they differ.
template <class F>
inline auto WithStorage(DType shared, bool uniform, F&& f) {
  if (uniform && shared == DType::kBF16) return f(Storage<Bf16>());
  if (uniform && shared == DType::kF16) return f(Storage<F16>());
  return f(Storage<float>());
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
