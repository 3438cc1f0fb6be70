// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), as keep masks.
#pragma once

#include "types.h"

namespace pymerge {
namespace PYMERGE_TARGET {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;

// The key of each round, 64 bits wide so that a vector instruction can broadcast it from memory.
struct PhiloxKeys {
  uint64_t k0[kPhiloxRounds], k1[kPhiloxRounds];

  explicit PhiloxKeys(uint64_t seed) {
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      k0[round] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
      k1[round] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
    }
  }
};

// Keep bits of the 128 elements from `first`, a multiple of 128: bit e of the two words is set iff the draw of element first + e is below
// `keep_below`.
template <class W = Words>
inline void KeepBits(const PhiloxKeys& key, uint32_t tensor_id, uint32_t model, uint64_t keep_below, int64_t first, uint64_t* words) {
  words[0] = words[1] = keep_below >> 32 ? ~uint64_t{0} : 0;
  if (keep_below >> 32) return;
  const uint64_t group = static_cast<uint64_t>(first) >> 2;
  const auto bound = W::Set(keep_below | keep_below << 32), m0 = W::Set(kPhiloxM0), m1 = W::Set(kPhiloxM1);
  // The counters' other words are the same for all 32, and so is half of what the first two rounds make of them.
  const uint64_t id_product = uint64_t{tensor_id} * kPhiloxM1;
  const uint32_t first_c0 = static_cast<uint32_t>(id_product >> 32) ^ static_cast<uint32_t>(group >> 32) ^ static_cast<uint32_t>(key.k0[0]);
  const uint64_t c0_product = uint64_t{first_c0} * kPhiloxM0;
  const auto first_c2 = W::Set(model ^ key.k1[0]);
  const auto second_c0 = W::Set((id_product & 0xFFFFFFFFu) ^ key.k0[1]), second_c2 = W::Set(c0_product >> 32 ^ key.k1[1]);
  // A round is a chain of five or six cycles' latency. So many vectors of counters at a time fill it, and the registers.
  constexpr int kTogether = W::kTogether;
  for (int g = 0; g < 32; g += W::kLanes * kTogether) {  // 32 counters of 4 words
    typename W::Vec c0[kTogether], c1[kTogether], c2[kTogether], c3[kTogether];
    for (int i = 0; i < kTogether; ++i) {
      const auto p0 = W::MulLow(W::Counters(group + static_cast<uint64_t>(g + i * W::kLanes)), m0);
      const auto p1 = W::MulLow(W::Xor(W::High(p0), first_c2), m1);
      c0[i] = W::Xor(W::High(p1), second_c0);
      c1[i] = p1;
      c2[i] = W::Xor(p0, second_c2);
      c3[i] = W::Set(c0_product);
    }
    for (int round = 2; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < kTogether; ++i) {
        const auto p0 = W::MulLow(c0[i], m0), p1 = W::MulLow(c2[i], m1);
        c0[i] = W::Xor(W::High(p1), c1[i], W::Set(key.k0[round]));
        c2[i] = W::Xor(W::High(p0), c3[i], W::Set(key.k1[round]));
        c1[i] = p1;
        c3[i] = p0;
      }
    }
    for (int i = 0; i < kTogether; ++i) {
      const int at = g + i * W::kLanes;
      words[at / 16] |= W::Below(c0[i], c1[i], c2[i], c3[i], bound) << (4 * (at % 16));
    }
  }
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
