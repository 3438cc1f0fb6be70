// Magnitude keys of one model's deltas: written out, or counted against a bracket with what lies inside collected.
#pragma once

#include "kernels/convert-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

constexpr int kKeyPiece = 1024;

// Calls visit(base, x, n) on pieces of [begin, end) whose length is a multiple of kLanes, straight from the tensors when base and model
// share a storage type; and visit_tail(keys, n) with the keys of the rest, through scratch.
template <class L, class Visit, class VisitTail>
inline void ForEachPiece(const Deltas& in, int model, int64_t begin, int64_t end, Visit&& visit, VisitTail&& visit_tail) {
  using R = typename L::Real;
  using Key = typename L::Key;
  using S = ScalarLanes<R>;
  const Input &base = in.base, &x = in.model[model];
  const bool uniform = !base.data || base.dtype == x.dtype;
  alignas(64) R wide_base[kKeyPiece], wide_x[kKeyPiece];
  auto tail = [&](int64_t first, int64_t n) {
    Key keys[kKeyPiece];
    Widen(base, first, n, wide_base);
    Widen(x, first, n, wide_x);
    for (int64_t i = 0; i < n; ++i) keys[i] = S::KeysOf(S::Sub(wide_x[i], wide_base[i]));
    visit_tail(keys, n);
  };
  const int64_t whole = (end - begin) / L::kLanes * L::kLanes;
  if (uniform && (sizeof(R) == sizeof(float) || x.dtype == DType::kF64)) {
    if constexpr (sizeof(R) == sizeof(double)) {
      visit(At<double>(base, begin), At<double>(x, begin), whole);
    } else {
      WithStorage(x.dtype, true, [&](auto storage) {
        using T = typename decltype(storage)::Type;
        visit(At<T>(base, begin), At<T>(x, begin), whole);
        return 0;
      });
    }
  } else {
    for (int64_t i = 0; i < whole; i += kKeyPiece) {
      const int64_t n = whole - i < kKeyPiece ? whole - i : kKeyPiece;
      Widen(base, begin + i, n, wide_base);
      Widen(x, begin + i, n, wide_x);
      visit(static_cast<const R*>(wide_base), static_cast<const R*>(wide_x), n);
    }
  }
  if (begin + whole < end) tail(begin + whole, end - begin - whole);
}

template <class L, class T>
inline typename L::Keys DeltaKeys(const T* base, const T* x, int64_t i) {
  return L::KeysOf(L::Sub(L::Load(x + i), base ? L::Load(base + i) : L::Zero()));
}

template <class L>
void KeysRange(const Deltas& in, int model, int64_t begin, int64_t end, typename L::Key* keys) {
  ForEachPiece<L>(
      in, model, begin, end,
      [&](const auto* base, const auto* x, int64_t n) {
        for (int64_t i = 0; i < n; i += L::kLanes) L::StoreKeys(keys + i, DeltaKeys<L>(base, x, i));
        keys += n;
      },
      [&](const typename L::Key* tail, int64_t n) { memcpy(keys, tail, static_cast<size_t>(n) * sizeof(*keys)); });
}

template <class L>
BracketCount CountRange(const Deltas& in, int model, const Bracket& bracket, int64_t begin, int64_t end, typename L::Key* collected) {
  using Key = typename L::Key;
  const Key lo = static_cast<Key>(bracket.lo), mid = static_cast<Key>(bracket.mid), hi = static_cast<Key>(bracket.hi);
  BracketCount total;
  Key* next = collected;
  ForEachPiece<L>(
      in, model, begin, end,
      [&](const auto* base, const auto* x, int64_t n) {
        const auto below = L::SetKey(lo - 1), middle = L::SetKey(mid), top = L::SetKey(hi);
        auto above = L::SetKey(0), equal = L::SetKey(0);  // per lane: at most kChunk each
        Key* to = next;  // a local, so that the compiler need not write it back at every store
        for (int64_t i = 0; i < n; i += L::kLanes) {
          const auto key = DeltaKeys<L>(base, x, i);
          const auto is_above = L::Greater(key, top), is_equal = L::Equal(key, middle);
          above = L::CountIf(above, is_above);
          equal = L::CountIf(equal, is_equal);
          // No branch on "anything inside?": mispredicted, it costs more than always storing a vector.
          to += L::Compress(to, L::AndNot(L::Greater(key, below), L::Or(is_above, is_equal)), key);
        }
        next = to;
        total.above += L::ReduceAdd(above);
        total.equal += L::ReduceAdd(equal);
      },
      [&](const Key* tail, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
          total.above += tail[i] > hi;
          total.equal += tail[i] == mid;
          if (tail[i] >= lo && tail[i] <= hi && tail[i] != mid) *next++ = tail[i];
        }
      });
  total.collected = next - collected;
  return total;
}

void Keys(const Deltas& in, int model, int64_t begin, int64_t end, void* keys) {
  if (in.f64) {
    KeysRange<ScalarLanes<double>>(in, model, begin, end, static_cast<int64_t*>(keys));
  } else {
    KeysRange<Lanes>(in, model, begin, end, static_cast<int32_t*>(keys));
  }
}

BracketCount Count(const Deltas& in, int model, const Bracket& bracket, int64_t begin, int64_t end, void* collected) {
  if (in.f64) return CountRange<ScalarLanes<double>>(in, model, bracket, begin, end, static_cast<int64_t*>(collected));
  return CountRange<Lanes>(in, model, bracket, begin, end, static_cast<int32_t*>(collected));
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
