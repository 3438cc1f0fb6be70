// How fast memory moves when nothing is computed: n streams read, xor'd, and one written past the caches. Compiled when the suite runs.
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLine = 64;
typedef uint64_t Line __attribute__((vector_size(kLine)));

inline Line Load(const char* p) {
  Line x;
  memcpy(&x, p, kLine);
  return x;
}

// Without this the line that is written would be read first.
inline void Stream(char* p, Line x) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(x));
#elif defined(__SSE2__)
  __m128i parts[4];
  memcpy(parts, &x, kLine);
  for (int i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, parts[i]);
#else
  memcpy(p, &x, kLine);
#endif
}

template <int N>
void Xor(char* const* in, char* out, int64_t begin, int64_t end, bool past) {
  for (int64_t i = begin; i < end; i += kLine) {
    Line x = Load(in[0] + i);
    for (int s = 1; s < N; ++s) x ^= Load(in[s] + i);
    if (past) Stream(out + i, x); else memcpy(out + i, &x, kLine);
  }
}

uint64_t Read(char* const* in, int n, int64_t begin, int64_t end) {
  Line x[4] = {};
  for (int s = 0; s < n; ++s) {
    int64_t i = begin;
    for (; i + 4 * kLine <= end; i += 4 * kLine) {
      for (int j = 0; j < 4; ++j) x[j] ^= Load(in[s] + i + j * kLine);
    }
    for (; i < end; i += kLine) x[0] ^= Load(in[s] + i);
  }
  x[0] ^= x[1] ^ x[2] ^ x[3];
  return x[0][0] ^ x[0][1] ^ x[0][2] ^ x[0][3] ^ x[0][4] ^ x[0][5] ^ x[0][6] ^ x[0][7];
}

void Part(char* const* in, int n, char* out, int64_t begin, int64_t end, bool past, volatile uint64_t* sink) {
  if (!out) *sink = Read(in, n, begin, end);
  else switch (n) {
    case 0: {
      const Line x = {};
      for (int64_t i = begin; i < end; i += kLine) {
        if (past) Stream(out + i, x); else memcpy(out + i, &x, kLine);
      }
      break;
    }
    case 1: Xor<1>(in, out, begin, end, past); break;
    case 2: Xor<2>(in, out, begin, end, past); break;
    case 3: Xor<3>(in, out, begin, end, past); break;
    case 4: Xor<4>(in, out, begin, end, past); break;
    case 5: Xor<5>(in, out, begin, end, past); break;
    case 6: Xor<6>(in, out, begin, end, past); break;
    case 7: Xor<7>(in, out, begin, end, past); break;
    case 8: Xor<8>(in, out, begin, end, past); break;
    default: Xor<9>(in, out, begin, end, past); break;
  }
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace

// Reads in[0..n), n <= 9, and writes out (null: only reads; n = 0: only writes). `bytes` of each, a multiple of 64, all aligned to 64.
extern "C" void streams(char* const* in, int n, char* out, int64_t bytes, int past, int threads) {
  std::vector<std::thread> others;
  std::vector<uint64_t> sinks(8 * threads);
  const int64_t share = (bytes / kLine + threads - 1) / threads * kLine;
  const auto part = [&](int t) {
    const int64_t begin = t * share, end = begin + share < bytes ? begin + share : bytes;
    if (begin < end) Part(in, n, out, begin, end, past != 0, &sinks[8 * t]);
  };
  for (int t = 1; t < threads; ++t) others.emplace_back(part, t);
  part(0);
  for (std::thread& other : others) other.join();
}
