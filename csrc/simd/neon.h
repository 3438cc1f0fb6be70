// 4 fp32 lanes: NEON as every arm64 CPU has it.
#pragma once

#include <arm_neon.h>

#include "simd/scalar.h"

namespace pymerge {
namespace PYMERGE_TARGET {

struct Lanes {
  using Real = float;
  using Key = int32_t;
  using Vec = float32x4_t;
  using Keys = int32x4_t;
  using Mask = uint32x4_t;  // all bits of a lane set or clear
  static constexpr int kLanes = 4;

  static Vec Load(const float* p) { return vld1q_f32(p); }
  static Vec Load(const Bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
  static Vec Load(const F16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }

  static void Store(float* p, Vec v) { vst1q_f32(p, v); }
  static void Store(Bf16* p, Vec v) {
    const uint32x4_t u = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(u, odd), vdupq_n_u32(0x7FFF)), 16);
    vst1_u16(&p->bits, vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7FC0))));
  }
  static void Store(F16* p, Vec v) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  template <class T>
  static void Stream(T* p, Vec v) {
    Store(p, v);
  }

  static Vec Set(float x) { return vdupq_n_f32(x); }
  static Vec Zero() { return vdupq_n_f32(0); }
  static Vec Add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static Vec Sub(Vec a, Vec b) { return vsubq_f32(a, b); }
  static Vec Mul(Vec a, Vec b) { return vmulq_f32(a, b); }
  static Vec Div(Vec a, Vec b) { return vdivq_f32(a, b); }
  static Vec Larger(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static Mask Below(Vec a, Vec b) { return vcltq_f32(a, b); }
  static Vec PowerOfTwo(Vec shifted) {
    return vreinterpretq_f32_s32(vaddq_s32(vshlq_n_s32(vreinterpretq_s32_f32(shifted), 23), vdupq_n_s32(0x3F800000)));
  }
  static Vec SplitPower(Vec v, Vec* exponent) {
    const Keys u = vreinterpretq_s32_f32(v), k = vshrq_n_s32(vsubq_s32(u, vdupq_n_s32(0x3F3504F3)), 23);
    *exponent = vcvtq_f32_s32(k);
    return vreinterpretq_f32_s32(vsubq_s32(u, vshlq_n_s32(k, 23)));
  }
  static Keys KeysOf(Vec v) { return vandq_s32(vreinterpretq_s32_f32(v), vdupq_n_s32(0x7FFFFFFF)); }
  static Vec ValuesOf(Keys k) { return vreinterpretq_f32_s32(k); }
  static Keys SetKey(Key k) { return vdupq_n_s32(k); }
  static Keys Max(Keys a, Keys b) { return vmaxq_s32(a, b); }
  static Key ReduceMax(Keys k) { return vmaxvq_s32(k); }
  static Mask Greater(Keys a, Keys b) { return vcgtq_s32(a, b); }
  static Mask Equal(Keys a, Keys b) { return vceqq_s32(a, b); }
  static Mask Within(Keys k, Keys lo, Keys width) { return vcleq_u32(vreinterpretq_u32_s32(vsubq_s32(k, lo)), vreinterpretq_u32_s32(width)); }
  static Keys CountIf(Keys n, Mask m) { return vsubq_s32(n, vreinterpretq_s32_u32(m)); }
  static int64_t ReduceAdd(Keys k) { return vaddlvq_s32(k); }
  static Mask Positive(Vec v) { return vcgtq_f32(v, Zero()); }
  static Mask Negative(Vec v) { return vcltq_f32(v, Zero()); }
  static Vec ToReal(Keys k) { return vcvtq_f32_s32(k); }
  static Mask NotFinite(Vec v) { return Greater(KeysOf(v), SetKey(0x7F7FFFFF)); }
  static Vec XorBits(Vec a, Vec b) { return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b))); }
  static Vec SignWhere(Mask m) { return vreinterpretq_f32_u32(vandq_u32(m, vdupq_n_u32(0x80000000u))); }
  static Mask IsZero(Vec v) { return vceqq_f32(v, Zero()); }
  static Mask Not(Mask m) { return vmvnq_u32(m); }
  static Mask Or(Mask a, Mask b) { return vorrq_u32(a, b); }
  static Mask AndNot(Mask a, Mask b) { return vbicq_u32(a, b); }
  static Vec Where(Mask m, Vec v) { return vreinterpretq_f32_u32(vandq_u32(m, vreinterpretq_u32_f32(v))); }
  static Vec Blend(Mask m, Vec yes, Vec no) { return vbslq_f32(m, yes, no); }
  static Vec AddIf(Mask m, Vec sum, Vec v) { return vbslq_f32(m, vaddq_f32(sum, v), sum); }
  static Mask FromBits(uint64_t bits) {
    const uint32_t each[4] = {1, 2, 4, 8};
    const uint32x4_t bit = vld1q_u32(each);
    return vceqq_u32(vandq_u32(vdupq_n_u32(static_cast<uint32_t>(bits)), bit), bit);
  }
  static uint64_t Bits(Mask m) {
    const uint32_t each[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(m, vld1q_u32(each)));
  }
  static int Count(Mask m) { return static_cast<int>(vaddvq_u32(vshrq_n_u32(m, 31))); }
  static void StoreKeys(Key* p, Keys k) { vst1q_s32(p, k); }
  static void StoreUpper(int16_t* p, Keys k) { vst1_s16(p, vshrn_n_s32(k, 16)); }
  static int Compress(Key* p, Mask m, Keys k) {
    int32_t lane[4];
    uint32_t set[4];
    vst1q_s32(lane, k);
    vst1q_u32(set, m);
    int count = 0;
    for (int i = 0; i < 4; ++i) {
      p[count] = lane[i];
      count += set[i] & 1;
    }
    return count;
  }
  static void Fence() {}
};

}  // namespace PYMERGE_TARGET
}  // namespace pymerge

#include "simd/words.h"
