// 16 fp32 lanes: AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include "simd/pair.h"
#include "simd/scalar.h"

namespace pymerge {
namespace PYMERGE_TARGET {

struct Lanes {
  using Real = float;
  using Key = int32_t;
  using Vec = __m512;
  using Keys = __m512i;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;

  static Vec Load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec Load(const Bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static Vec Load(const F16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

  static void Store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static void Store(Bf16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), Pack(p, v)); }
  static void Store(F16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), Pack(p, v)); }
  static void Stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
  template <class T>
  static void Stream(T* p, Vec v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), Pack(p, v));
  }

  static Vec Set(float x) { return _mm512_set1_ps(x); }
  static Vec Zero() { return _mm512_setzero_ps(); }
  static Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec Sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec Mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec Div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec Larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Mask Below(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Vec PowerOfTwo(Vec shifted) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23), _mm512_set1_epi32(0x3F800000)));
  }
  static Vec SplitPower(Vec v, Vec* exponent) {
    const Keys u = _mm512_castps_si512(v), k = _mm512_srai_epi32(_mm512_sub_epi32(u, _mm512_set1_epi32(0x3F3504F3)), 23);
    *exponent = _mm512_cvtepi32_ps(k);
    return _mm512_castsi512_ps(_mm512_sub_epi32(u, _mm512_slli_epi32(k, 23)));
  }
  static Keys KeysOf(Vec v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)); }
  static Vec ValuesOf(Keys k) { return _mm512_castsi512_ps(k); }
  static Keys SetKey(Key k) { return _mm512_set1_epi32(k); }
  static Keys Max(Keys a, Keys b) { return _mm512_max_epi32(a, b); }
  static Key ReduceMax(Keys k) { return _mm512_reduce_max_epi32(k); }
  static Mask Greater(Keys a, Keys b) { return _mm512_cmpgt_epi32_mask(a, b); }
  static Mask Equal(Keys a, Keys b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static Mask Within(Keys k, Keys lo, Keys width) { return _mm512_cmple_epu32_mask(_mm512_sub_epi32(k, lo), width); }
  static Keys CountIf(Keys n, Mask m) { return _mm512_mask_sub_epi32(n, m, n, _mm512_set1_epi32(-1)); }
  static int64_t ReduceAdd(Keys k) { return _mm512_reduce_add_epi32(k); }
  static Mask Positive(Vec v) { return _mm512_cmp_ps_mask(v, Zero(), _CMP_GT_OQ); }
  static Mask Negative(Vec v) { return _mm512_cmp_ps_mask(v, Zero(), _CMP_LT_OQ); }
  static Vec ToReal(Keys k) { return _mm512_cvtepi32_ps(k); }
  static Mask NotFinite(Vec v) { return _mm512_fpclass_ps_mask(v, 0x99); }
  static Vec XorBits(Vec a, Vec b) { return _mm512_xor_ps(a, b); }
  static Vec SignWhere(Mask m) { return _mm512_maskz_mov_ps(m, Set(-0.0f)); }
  static Mask IsZero(Vec v) { return _mm512_cmp_ps_mask(v, Zero(), _CMP_EQ_OQ); }
  static Mask Not(Mask m) { return static_cast<Mask>(~m); }
  static Mask Or(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static Mask AndNot(Mask a, Mask b) { return static_cast<Mask>(a & ~b); }
  static Vec Where(Mask m, Vec v) { return _mm512_maskz_mov_ps(m, v); }
  static Vec Blend(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m, no, yes); }
  static Vec AddIf(Mask m, Vec sum, Vec v) { return _mm512_mask_add_ps(sum, m, sum, v); }
  static Mask FromBits(uint64_t bits) { return static_cast<Mask>(bits); }
  static uint64_t Bits(Mask m) { return m; }
  static int Count(Mask m) { return _mm_popcnt_u32(m); }
  static void StoreKeys(Key* p, Keys k) { _mm512_storeu_si512(p, k); }
  static void StoreUpper(int16_t* p, Keys k) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(k, 16)));
  }
  static int Compress(Key* p, Mask m, Keys k) {
    // To a register first: compressing straight to memory is microcoded on Zen 4.
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m, k));
    return _mm_popcnt_u32(m);
  }
  // Rounded to bf16, in the high half of each word; not for NaN.
  static __m512i RoundToHigh(Vec v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7FFF));
  }
  static void Fence() { _mm_sfence(); }

 private:
  // vcvtneps2bf16 would flush subnormals, so bf16 is rounded in integers.
  static __m256i Pack(const Bf16*, Vec v) {
    const __m512i rounded = _mm512_srli_epi32(RoundToHigh(v), 16);
    const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0)));
  }
  static __m256i Pack(const F16*, Vec v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

// The first half has the even elements and the second the odd ones, which are the low and high halves of 32-bit words. No NaN is stored.
template <>
struct Pair<Lanes, Bf16> {
  using Vec = Lanes::Vec;
  Lanes::Keys words;

  static Pair Load(const Bf16* p) { return {_mm512_loadu_si512(p)}; }
  Vec Half(int i) const {
    return _mm512_castsi512_ps(i ? _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))) : _mm512_slli_epi32(words, 16));
  }
  static void Store(Bf16* p, Vec even, Vec odd) { _mm512_storeu_si512(p, Pack(even, odd)); }
  static void Stream(Bf16* p, Vec even, Vec odd) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), Pack(even, odd)); }
  static void StoreUpper(int16_t* p, Lanes::Keys even, Lanes::Keys odd) {
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(even, 16), odd));
  }
  static int ElementOfBit(int bit) { return 2 * (bit % Lanes::kLanes) + bit / Lanes::kLanes; }

 private:
  static Lanes::Keys Pack(Vec even, Vec odd) {
    return _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(Lanes::RoundToHigh(even), 16), Lanes::RoundToHigh(odd));
  }
};

// Bit i: digits[i] equals `digit`.
inline uint64_t EqualBits64(const int16_t* digits, int16_t digit) {
  const __m512i wanted = _mm512_set1_epi16(digit);
  const uint64_t low = _mm512_cmpeq_epi16_mask(_mm512_loadu_si512(digits), wanted);
  return low | static_cast<uint64_t>(_mm512_cmpeq_epi16_mask(_mm512_loadu_si512(digits + 32), wanted)) << 32;
}

// Eight 64-bit lanes for Philox: 32-bit words in the low halves, rubbish in the high ones.
struct Words {
  using Vec = __m512i;
  static constexpr int kLanes = 8, kTogether = 4;
  static Vec Set(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
  // first, first + 1, ...: lane 2 l has the l-th, lane 2 l + 1 the one four after it, as Below unpacks them.
  static Vec Counters(uint64_t first) { return _mm512_add_epi64(Set(first), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7)); }
  static Vec MulLow(Vec a, Vec b) { return _mm512_mul_epu32(a, b); }
  static Vec High(Vec a) { return _mm512_srli_epi64(a, 32); }
  static Vec Xor(Vec a, Vec b, Vec c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  static Vec Xor(Vec a, Vec b) { return _mm512_xor_si512(a, b); }
  // Bit 4 l + j: word j of the l-th counter is below every word of `bound`.
  static uint64_t Below(Vec c0, Vec c1, Vec c2, Vec c3, Vec bound) {
    const Vec c01 = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA), c23 = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, _MM_PERM_CCAA);
    const uint32_t low = _mm512_cmplt_epu32_mask(_mm512_unpacklo_epi64(c01, c23), bound);
    const uint32_t high = _mm512_cmplt_epu32_mask(_mm512_unpackhi_epi64(c01, c23), bound);
    return low | high << 16;
  }
};

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
