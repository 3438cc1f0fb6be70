// 8 fp32 lanes: AVX2, F16C, BMI2.
#pragma once

#include <immintrin.h>

#include "simd/pair.h"
#include "simd/scalar.h"

namespace pymerge {
namespace PYMERGE_TARGET {

// For each 8-bit mask, the lane numbers under it, packed to the front.
struct CompressTable {
  uint8_t lane[256][8];
  constexpr CompressTable() : lane() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int i = 0; i < 8; ++i) {
        if (mask >> i & 1) lane[mask][count++] = static_cast<uint8_t>(i);
      }
    }
  }
};
static constexpr CompressTable kCompress;

struct Lanes {
  using Real = float;
  using Key = int32_t;
  using Vec = __m256;
  using Keys = __m256i;
  using Mask = __m256;  // all bits of a lane set or clear
  static constexpr int kLanes = 8;

  static Vec Load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec Load(const Bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static Vec Load(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

  static void Store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static void Store(Bf16* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), Pack(p, v)); }
  static void Store(F16* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), Pack(p, v)); }
  static void Stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
  template <class T>
  static void Stream(T* p, Vec v) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), Pack(p, v));
  }

  static Vec Set(float x) { return _mm256_set1_ps(x); }
  static Vec Zero() { return _mm256_setzero_ps(); }
  static Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec Sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec Mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec Div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec Larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Mask Below(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static Vec PowerOfTwo(Vec shifted) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23), _mm256_set1_epi32(0x3F800000)));
  }
  static Vec SplitPower(Vec v, Vec* exponent) {
    const Keys u = _mm256_castps_si256(v), k = _mm256_srai_epi32(_mm256_sub_epi32(u, _mm256_set1_epi32(0x3F3504F3)), 23);
    *exponent = _mm256_cvtepi32_ps(k);
    return _mm256_castsi256_ps(_mm256_sub_epi32(u, _mm256_slli_epi32(k, 23)));
  }
  static Keys KeysOf(Vec v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF)); }
  static Vec ValuesOf(Keys k) { return _mm256_castsi256_ps(k); }
  static Keys SetKey(Key k) { return _mm256_set1_epi32(k); }
  static Keys Max(Keys a, Keys b) { return _mm256_max_epi32(a, b); }
  static Key ReduceMax(Keys k) {
    // Not by way of memory, here and below: GCC 12 would then keep k there, in the loop that makes it too.
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(k), _mm256_extracti128_si256(k, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
  }
  static Mask Greater(Keys a, Keys b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)); }
  static Mask Equal(Keys a, Keys b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
  static Mask Within(Keys k, Keys lo, Keys width) {
    const __m256i above = _mm256_sub_epi32(k, lo);
    return Equal(_mm256_min_epu32(above, width), above);
  }
  static Keys CountIf(Keys n, Mask m) { return _mm256_sub_epi32(n, _mm256_castps_si256(m)); }
  static int64_t ReduceAdd(Keys k) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(k), _mm256_extracti128_si256(k, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
  }
  static Mask Positive(Vec v) { return _mm256_cmp_ps(v, Zero(), _CMP_GT_OQ); }
  static Mask Negative(Vec v) { return _mm256_cmp_ps(v, Zero(), _CMP_LT_OQ); }
  static Vec ToReal(Keys k) { return _mm256_cvtepi32_ps(k); }
  static Mask NotFinite(Vec v) { return Greater(KeysOf(v), SetKey(0x7F7FFFFF)); }
  static Vec XorBits(Vec a, Vec b) { return _mm256_xor_ps(a, b); }
  static Vec SignWhere(Mask m) { return _mm256_and_ps(m, Set(-0.0f)); }
  static Mask IsZero(Vec v) { return _mm256_cmp_ps(v, Zero(), _CMP_EQ_OQ); }
  static Mask Not(Mask m) { return _mm256_xor_ps(m, _mm256_castsi256_ps(_mm256_set1_epi32(-1))); }
  static Mask Or(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static Mask AndNot(Mask a, Mask b) { return _mm256_andnot_ps(b, a); }
  static Vec Where(Mask m, Vec v) { return _mm256_and_ps(m, v); }
  static Vec Blend(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, m); }
  static Vec AddIf(Mask m, Vec sum, Vec v) { return _mm256_blendv_ps(sum, _mm256_add_ps(sum, v), m); }
  static Mask FromBits(uint64_t bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return Equal(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit), bit);
  }
  static uint64_t Bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
  static int Count(Mask m) { return _mm_popcnt_u32(static_cast<uint32_t>(_mm256_movemask_ps(m))); }
  static void StoreKeys(Key* p, Keys k) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), k); }
  static void StoreUpper(int16_t* p, Keys k) {
    const __m256i high = _mm256_srli_epi32(k, 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }
  static int Compress(Key* p, Mask m, Keys k) {
    const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_ps(m));
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lane[bits])));
    StoreKeys(p, _mm256_permutevar8x32_epi32(k, lanes));
    return _mm_popcnt_u32(bits);
  }
  // Rounded to bf16, in the high half of each word; not for NaN.
  static __m256i RoundToHigh(Vec v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7FFF));
  }
  static void Fence() { _mm_sfence(); }

 private:
  static __m128i Pack(const Bf16*, Vec v) {
    const __m256i rounded = _mm256_srli_epi32(RoundToHigh(v), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
  static __m128i Pack(const F16*, Vec v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

// The first half has the even elements and the second the odd ones, which are the low and high halves of 32-bit words. No NaN is stored.
template <>
struct Pair<Lanes, Bf16> {
  using Vec = Lanes::Vec;
  Lanes::Keys words;

  static Pair Load(const Bf16* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  Vec Half(int i) const {
    return _mm256_castsi256_ps(i ? _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))) : _mm256_slli_epi32(words, 16));
  }
  static void Store(Bf16* p, Vec even, Vec odd) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), Pack(even, odd)); }
  static void Stream(Bf16* p, Vec even, Vec odd) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), Pack(even, odd)); }
  static void StoreUpper(int16_t* p, Lanes::Keys even, Lanes::Keys odd) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xAA));
  }
  static int ElementOfBit(int bit) { return 2 * (bit % Lanes::kLanes) + bit / Lanes::kLanes; }

 private:
  static Lanes::Keys Pack(Vec even, Vec odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(Lanes::RoundToHigh(even), 16), Lanes::RoundToHigh(odd), 0xAA);
  }
};

// Bit i: digits[i] equals `digit`.
inline uint64_t EqualBits64(const int16_t* digits, int16_t digit) {
  const __m256i wanted = _mm256_set1_epi16(digit);
  const auto equal = [&](int i) { return _mm256_cmpeq_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(digits + i)), wanted); };
  const auto bits = [&](int i) {  // packing takes the 128-bit halves by turns
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(equal(i), equal(i + 16)), 0xD8);
    return static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(bytes)));
  };
  return bits(0) | bits(32) << 32;
}

// Four 64-bit lanes for Philox: 32-bit words in the low halves, rubbish in the high ones.
struct Words {
  using Vec = __m256i;
  static constexpr int kLanes = 4, kTogether = 2;
  static Vec Set(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
  // first, first + 1, ...: lane 2 l has the l-th, lane 2 l + 1 the one two after it, as Below unpacks them.
  static Vec Counters(uint64_t first) { return _mm256_add_epi64(Set(first), _mm256_setr_epi64x(0, 2, 1, 3)); }
  static Vec MulLow(Vec a, Vec b) { return _mm256_mul_epu32(a, b); }
  static Vec High(Vec a) { return _mm256_srli_epi64(a, 32); }
  static Vec Xor(Vec a, Vec b, Vec c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  static Vec Xor(Vec a, Vec b) { return _mm256_xor_si256(a, b); }
  // Bit 4 l + j: word j of the l-th counter is below every word of `bound`.
  static uint64_t Below(Vec c0, Vec c1, Vec c2, Vec c3, Vec bound) {
    const Vec c01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA), c23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    return LessMask(_mm256_unpacklo_epi64(c01, c23), bound) | LessMask(_mm256_unpackhi_epi64(c01, c23), bound) << 8;
  }

 private:
  static uint32_t LessMask(Vec a, Vec b) {
    const __m256i sign = _mm256_set1_epi32(static_cast<int>(0x80000000u));  // signed compare of flipped words is an unsigned one
    const __m256i less = _mm256_cmpgt_epi32(_mm256_xor_si256(b, sign), _mm256_xor_si256(a, sign));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(less)));
  }
};

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
