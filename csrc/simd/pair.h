// Two vectors' worth of elements of one storage type, in the order that costs least. Included once per target, inside that target's namespace.
#pragma once

#include <cstdint>

namespace pymerge {
namespace PYMERGE_TARGET {

// In order. A target that has something better for a storage type specialises it.
template <class L, class T>
struct Pair {
  using Vec = typename L::Vec;
  Vec half[2];

  static Pair Load(const T* p) { return {{L::Load(p), L::Load(p + L::kLanes)}}; }
  Vec Half(int i) const { return half[i]; }
  static void Store(T* p, Vec first, Vec second) {
    L::Store(p, first);
    L::Store(p + L::kLanes, second);
  }
  static void Stream(T* p, Vec first, Vec second) {
    L::Stream(p, first);
    L::Stream(p + L::kLanes, second);
  }
  static void StoreUpper(int16_t* p, typename L::Keys first, typename L::Keys second) {
    L::StoreUpper(p, first);
    L::StoreUpper(p + L::kLanes, second);
  }
  // Which element lane l of a half is, for bit half * kLanes + l.
  static int ElementOfBit(int bit) { return bit; }
};

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
