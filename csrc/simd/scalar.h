// One lane: the portable vector type, used for fp64 and for tails on every target, and for everything on the scalar target.
// Included once per target, inside that target's namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace pymerge {
namespace PYMERGE_TARGET {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class To, class From>
inline To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline float ToFloat(Bf16 x) { return BitCast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline Bf16 ToBf16(float x) {
  if (x != x) return {0x7FC0};
  const uint32_t u = BitCast<uint32_t>(x);
  return {static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}

inline float ToFloat(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return BitCast<float>(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
  // Normal numbers need their exponent rebiased by 112; multiplying by 2^112 does that and makes subnormals normal, exactly.
  return BitCast<float>(BitCast<uint32_t>(BitCast<float>(magnitude << 13) * 0x1p112f) | sign);
}

inline F16 ToF16(float x) {
  const uint32_t u = BitCast<uint32_t>(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // 2^16 and up
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 2^-1 leaves the subnormal half's bits, rounded to nearest even by the addition itself, in the low bits.
    const float shifted = BitCast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (BitCast<uint32_t>(shifted) - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// fp64 to fp32 rounded to odd, so that a second rounding to a half type is correct.
inline float ToOdd(double x) {
  const float f = static_cast<float>(x);
  if (f != f || static_cast<double>(f) == x) return f;
  uint32_t u = BitCast<uint32_t>(f);
  const double magnitude = x < 0 ? -x : x, rounded = f < 0 ? -static_cast<double>(f) : static_cast<double>(f);
  if (rounded > magnitude) --u;
  return BitCast<float>(u | 1u);
}

inline void Convert(float x, float* out) { *out = x; }
inline void Convert(float x, double* out) { *out = x; }
inline void Convert(float x, Bf16* out) { *out = ToBf16(x); }
inline void Convert(float x, F16* out) { *out = ToF16(x); }
inline void Convert(double x, double* out) { *out = x; }
inline void Convert(double x, float* out) { *out = static_cast<float>(x); }
inline void Convert(double x, Bf16* out) { *out = ToBf16(ToOdd(x)); }
inline void Convert(double x, F16* out) { *out = ToF16(ToOdd(x)); }
inline void Convert(Bf16 x, float* out) { *out = ToFloat(x); }
inline void Convert(F16 x, float* out) { *out = ToFloat(x); }
inline void Convert(Bf16 x, double* out) { *out = ToFloat(x); }
inline void Convert(F16 x, double* out) { *out = ToFloat(x); }

template <class R>
struct KeyOf;
template <>
struct KeyOf<float> {
  using Type = int32_t;
  static constexpr int32_t kMax = 0x7FFFFFFF;
  static constexpr int32_t kInfinity = 0x7F800000;
};
template <>
struct KeyOf<double> {
  using Type = int64_t;
  static constexpr int64_t kMax = 0x7FFFFFFFFFFFFFFF;
  static constexpr int64_t kInfinity = 0x7FF0000000000000;
};

template <class R>
struct ScalarLanes {
  using Real = R;
  using Key = typename KeyOf<R>::Type;
  using Vec = R;
  using Keys = Key;
  using Mask = bool;
  static constexpr int kLanes = 1;

  template <class T>
  static Vec Load(const T* p) {
    Vec v;
    Convert(*p, &v);
    return v;
  }
  template <class T>
  static void Store(T* p, Vec v) {
    Convert(v, p);
  }
  template <class T>
  static void Stream(T* p, Vec v) {
    Convert(v, p);
  }
  static Vec Set(R x) { return x; }
  static Vec Zero() { return R(0); }
  static Vec Add(Vec a, Vec b) { return a + b; }
  static Vec Sub(Vec a, Vec b) { return a - b; }
  static Vec Mul(Vec a, Vec b) { return a * b; }
  static Vec Div(Vec a, Vec b) { return a / b; }
  // b where either is NaN.
  static Vec Larger(Vec a, Vec b) { return a > b ? a : b; }
  static Mask Below(Vec a, Vec b) { return a < b; }
  // fp32 only: 2^n, -126 <= n <= 127, from n + 1.5 * 2^23, whose low bits are n.
  static Vec PowerOfTwo(Vec shifted) { return BitCast<Vec>((BitCast<uint32_t>(shifted) << 23) + 0x3F800000u); }
  // fp32 only: v = result * 2^exponent, sqrt(1/2) <= result < sqrt(2); v is positive, normal and finite, any result otherwise.
  static Vec SplitPower(Vec v, Vec* exponent) {
    const uint32_t u = BitCast<uint32_t>(v);
    const int32_t k = static_cast<int32_t>(u - 0x3F3504F3u) >> 23;
    *exponent = static_cast<Vec>(k);
    return BitCast<Vec>(u - (static_cast<uint32_t>(k) << 23));
  }
  static Keys KeysOf(Vec v) { return BitCast<Key>(v) & KeyOf<R>::kMax; }
  static Vec ValuesOf(Keys k) { return BitCast<Vec>(k); }
  static Keys SetKey(Key k) { return k; }
  static Keys Max(Keys a, Keys b) { return a > b ? a : b; }
  static Key ReduceMax(Keys k) { return k; }
  static Mask Greater(Keys a, Keys b) { return a > b; }
  static Mask Equal(Keys a, Keys b) { return a == b; }
  static Mask Within(Keys k, Keys lo, Keys width) { return k >= lo && k - lo <= width; }  // lo <= k <= lo + width, lo and width not negative
  static Keys CountIf(Keys n, Mask m) { return n + m; }
  static int64_t ReduceAdd(Keys k) { return k; }
  static Mask Positive(Vec v) { return v > R(0); }
  static Mask Negative(Vec v) { return v < R(0); }
  static Vec ToReal(Keys k) { return static_cast<R>(k); }
  static Mask NotFinite(Vec v) { return KeysOf(v) >= KeyOf<R>::kInfinity; }
  static Vec XorBits(Vec a, Vec b) { return BitCast<Vec>(BitCast<Key>(a) ^ BitCast<Key>(b)); }
  static Vec SignWhere(Mask m) { return m ? R(-0.0) : R(0); }
  static Mask IsZero(Vec v) { return v == R(0); }
  static Mask Not(Mask m) { return !m; }
  static Mask Or(Mask a, Mask b) { return a || b; }
  static Mask AndNot(Mask a, Mask b) { return a && !b; }
  static Vec Where(Mask m, Vec v) { return m ? v : R(0); }
  static Vec Blend(Mask m, Vec yes, Vec no) { return m ? yes : no; }
  static Vec AddIf(Mask m, Vec sum, Vec v) { return m ? sum + v : sum; }
  static Mask FromBits(uint64_t bits) { return bits & 1; }
  static uint64_t Bits(Mask m) { return m; }
  static int Count(Mask m) { return m; }
  static void StoreKeys(Key* p, Keys k) { *p = k; }
  // The upper 16 bits of each key.
  static void StoreUpper(int16_t* p, Keys k) { *p = static_cast<int16_t>(k >> (8 * sizeof(Key) - 16)); }
  // Stores the keys under the mask side by side; may write kLanes keys. Returns how many.
  static int Compress(Key* p, Mask m, Keys k) {
    *p = k;
    return m;
  }
  static void Fence() {}
};

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
