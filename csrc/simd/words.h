// One 64-bit lane for Philox, for targets without a vector version.
#pragma once

#include "simd/scalar.h"

namespace pymerge {
namespace PYMERGE_TARGET {

// Bit i: digits[i] equals `digit`.
inline uint64_t EqualBits64(const int16_t* digits, int16_t digit) {
  uint16_t any = 0;  // this the compiler makes vectors of
  for (int i = 0; i < 64; ++i) any = static_cast<uint16_t>(any | (digits[i] == digit));
  uint64_t bits = 0;
  for (int i = 0; any && i < 64; ++i) bits |= static_cast<uint64_t>(digits[i] == digit) << i;
  return bits;
}

struct Words {
  using Vec = uint64_t;
  static constexpr int kLanes = 1, kTogether = 1;
  static Vec Set(uint64_t x) { return x; }
  static Vec Counters(uint64_t first) { return first; }
  static Vec MulLow(Vec a, Vec b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
  static Vec High(Vec a) { return a >> 32; }
  static Vec Xor(Vec a, Vec b, Vec c) { return a ^ b ^ c; }
  static Vec Xor(Vec a, Vec b) { return a ^ b; }
  static uint64_t Below(Vec c0, Vec c1, Vec c2, Vec c3, Vec bound) {
    const uint32_t below = static_cast<uint32_t>(bound);
    const auto bit = [&](Vec word, int at) { return uint64_t{static_cast<uint32_t>(word) < below} << at; };
    return bit(c0, 0) | bit(c1, 1) | bit(c2, 2) | bit(c3, 3);
  }
};

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
