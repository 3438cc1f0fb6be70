// One 64-bit lane for Philox, for targets without a vector version.
#pragma once

#include "simd/scalar.h"

namespace pymerge {
namespace PYMERGE_TARGET {

struct Words {
  using Vec = uint64_t;
  static constexpr int kLanes = 1;
  static Vec Set(uint64_t x) { return x; }
  static Vec Iota(uint64_t first) { return first; }
  static Vec MulLow(Vec a, Vec b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
  static Vec High(Vec a) { return a >> 32; }
  static Vec Xor(Vec a, Vec b, Vec c) { return a ^ b ^ c; }
  static uint32_t Below(Vec a, Vec bound) { return static_cast<uint32_t>(a) < static_cast<uint32_t>(bound); }
  static uint64_t Interleave(const uint32_t masks[4]) { return masks[0] | masks[1] << 1 | masks[2] << 2 | masks[3] << 3; }
};

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
