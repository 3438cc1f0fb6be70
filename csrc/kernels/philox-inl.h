// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), as keep masks.
#pragma once

#include "types.h"

namespace pymerge {
namespace PYMERGE_TARGET {

// Keep bits of the 64 elements from `first`, a multiple of 64: bit e is set iff the draw of element first + e is below `keep_below`.
template <class W = Words>
inline uint64_t KeepBits(uint64_t seed, uint32_t tensor_id, uint32_t model, uint64_t keep_below, int64_t first) {
  if (keep_below >> 32) return ~uint64_t{0};
  const uint64_t group = static_cast<uint64_t>(first) >> 2;
  const auto bound = W::Set(keep_below);
  const auto m0 = W::Set(0xD2511F53u), m1 = W::Set(0xCD9E8D57u);
  // Two vectors of counters at a time: a round is a chain of about five cycles' latency, which one vector alone would wait for.
  constexpr int kTogether = 16 / W::kLanes < 2 ? 1 : 2;
  uint64_t bits = 0;
  for (int g = 0; g < 16; g += W::kLanes * kTogether) {  // 16 counters of 4 words
    typename W::Vec c0[kTogether], c1[kTogether], c2[kTogether], c3[kTogether];
    for (int i = 0; i < kTogether; ++i) {
      c0[i] = W::Iota(group + static_cast<uint64_t>(g + i * W::kLanes));
      c1[i] = W::High(c0[i]);
      c2[i] = W::Set(tensor_id);
      c3[i] = W::Set(model);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < kTogether; ++i) {
        const auto p0 = W::MulLow(c0[i], m0), p1 = W::MulLow(c2[i], m1);
        c0[i] = W::Xor(W::High(p1), c1[i], W::Set(k0));
        c2[i] = W::Xor(W::High(p0), c3[i], W::Set(k1));
        c1[i] = p1;
        c3[i] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < kTogether; ++i) {
      const uint32_t below[4] = {W::Below(c0[i], bound), W::Below(c1[i], bound), W::Below(c2[i], bound), W::Below(c3[i], bound)};
      bits |= W::Interleave(below) << (4 * (g + i * W::kLanes));
    }
  }
  return bits;
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
