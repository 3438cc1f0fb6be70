// Plain data shared by the dispatcher and every target. No code, so that no function compiled for a newer CPU can end up in a common path.
#pragma once

#include <cstdint>

namespace pymerge {

constexpr int kMaxModels = 64;
constexpr int64_t kChunk = 1 << 16;  // elements a thread takes at a time; a multiple of kSumBlock
constexpr int64_t kSumBlock = 4096;  // elements per block of the summation tree (docs/arithmetic.md)
constexpr int kDigitOffset = 1 << 15;  // of a lower digit, which takes all of 16 bits, so that it is a signed number
constexpr int kFoundMore = 2;  // indices that find_equal may write beyond those it has found
constexpr int64_t kDiagnoseRun = 4096;  // bytes of one tensor in the compute dtype that are worked on at a time: a handful fit the first cache

enum class DType : int { kF32, kBF16, kF16, kF64 };
enum class Sparsify : int { kNone, kMagnitude, kBernoulli, kBand };
enum class Vote : int { kNone, kMass, kCount };
enum class ZeroVote : int { kPositive, kNegative, kDrop };
enum class Divisor : int { kNone, kWeights, kCount };

struct Input {
  const void* data = nullptr;  // nullptr: all zeros
  DType dtype = DType::kF32;
};

struct Output {
  void* data = nullptr;
  DType dtype = DType::kF32;
};

// Element e of a tensor is kept iff key_e > key, or key_e == key and e <= cut; key_e is the bit pattern of |delta_e|.
struct Selection {
  int64_t key = 0;
  int64_t cut = -1;
};

// One tensor: base and models, or base and some of the models.
// The data may be a part of them.
struct Deltas {
  int64_t n = 0;
  int64_t first = 0;  // index of the data's first element in the whole tensor; a multiple of kSumBlock where indices matter
  int models = 0;
  bool f64 = false;  // compute in fp64
  Input base;
  Input model[kMaxModels];
};

struct MergeJob {
  Deltas in;
  Output out;
  Sparsify sparsify = Sparsify::kNone;
  Vote vote = Vote::kNone;
  bool vote_weighted = true;
  ZeroVote zero_vote = ZeroVote::kPositive;
  Divisor divisor = Divisor::kNone;
  double weight[kMaxModels];
  double rescale[kMaxModels];
  double scale = 1.0;
  Selection selection[kMaxModels];  // cuts count from in.first
  Selection larger[kMaxModels];  // of a band: the part of `selection` that is left out
  uint64_t keep_below[kMaxModels];  // a 32-bit draw below it keeps the element
  uint64_t seed = 0;
  uint32_t tensor_id = 0;
  bool stream = false;  // store past the cache: the result is larger than the caches
};

// Keys in [lo, hi] other than mid are collected; keys above hi and equal to mid are counted.
struct Bracket {
  int64_t lo = 0, mid = 0, hi = 0;
};

struct BracketCount {
  int64_t above = 0;
  int64_t equal = 0;
  int64_t collected = 0;
};

// What a chunk says of one model, next to its merge. `count` keys are inside the bracket and not its mid; the first `room` of them, and
// their places in the chunk, are written down.
struct Collected {
  int64_t kept, equal, count;
  int64_t room;
  int32_t* keys;
  uint16_t* index;
};

struct LerpJob {
  int64_t n = 0;
  bool f64 = false;
  Input a, b;
  Output out;
  bool near_a = true;  // a + weight * (b - a), else b - weight * (b - a)
  double weight = 0.0;
  bool stream = false;
};

// x + scale * left @ right in fp32. `left` is (rows, rank), `right` (rank, columns), row-major.
struct LowRankJob {
  Output x;           // elements first, first + 1, ... of a row-major (rows, columns) matrix
  int64_t first = 0;
  int64_t columns = 0;
  int64_t rank = 0;
  const float* left = nullptr;
  const float* right = nullptr;
  float scale = 0.0f;
};

enum class KlKind : int { kForward, kReverse, kJsd };

// What a backward pass has to know about a row: softmax = exp((logit - max) / temperature - log).
struct KlStats {
  float student_max, student_log;
  float teacher_max, teacher_log;
  float student_mean, teacher_mean;  // E_q of log q - log p or log m, and E_p of log p - log q or log m, where a gradient needs it, else 0
};

// Rows of `vocab` logits; q is the student's distribution, p the teacher's (docs/kl.md).
struct KlJob {
  int64_t rows = 0, vocab = 0;
  Input student, teacher;  // not fp64
  KlKind kind = KlKind::kForward;
  double beta = 0.5;
  double temperature = 1.0;
  const float* weight = nullptr;  // of each row; nullptr: ones. Rows of weight 0 are not read
  KlStats* stats = nullptr;       // written by the forward pass, read by the backward one
  float* loss = nullptr;          // forward: a number per row
  const float* grad = nullptr;    // backward: the derivative with respect to each row's loss
  bool of_teacher = false;        // backward: the teacher's gradient, not the student's
  Output out;                     // backward: may be the logits that the gradient belongs to
};

// Statistics of base and deltas. Sums: the dot products of (base, delta 0, delta 1, ...) with each other, upper triangle by rows; the L1 norm
// of each delta; the sum over elements of |sum of the deltas|. Counts: non-zero deltas of each model; kept ones of each; the largest key of
// each; elements that at least k models keep, k = 2, 3, ...; elements kept with both signs; then for each pair of models (0,1), (0,2), ...
// elements that both keep; and for each pair, those with opposite signs.
struct DiagnoseJob {
  Deltas in;
  Selection selection[kMaxModels];  // which deltas are kept; zeros never are
  int sums = 0;                     // how many
};

// Entry points of one target. Ranges [begin, end) are element indices, unless rows; begin is a multiple of kChunk.
struct Kernels {
  const char* name;
  // Merges a range; false if some delta of it is not finite.
  bool (*merge)(const MergeJob&, int64_t begin, int64_t end);
  // Elections won by the positive side minus those won by the negative one.
  int64_t (*balance)(const MergeJob&, int64_t begin, int64_t end);
  // Keys of one model's deltas, any range, as int32 (int64 when in.f64).
  void (*keys)(const Deltas&, int model, int64_t begin, int64_t end, void* keys);
  // Counts one model's keys against a bracket. `collected` has room for end - begin + 16 keys.
  BracketCount (*count)(const Deltas&, int model, const Bracket&, int64_t begin, int64_t end, void* collected);
  // Keys as digits of 16 bits. The upper ones of one model's keys; those at index[0], index[1], ... from bit `shift` up, less kDigitOffset;
  // how many digits are above a bound; and where those equal to one are, in order: `index` has room for kFoundMore more.
  void (*upper_digits)(const Deltas&, int model, int64_t begin, int64_t end, int16_t* digits);
  void (*digits_at)(const Deltas&, int model, const int32_t* index, int64_t count, int shift, int16_t* digits);
  int64_t (*count_above)(const int16_t* digits, int64_t n, int bound);
  int64_t (*find_equal)(const int16_t* digits, int64_t n, int digit, int32_t* index);
  // Merges a range of at most kChunk elements, keeping those above each bracket's mid, and equal to it where keep_equal has the model's bit;
  // and counts keys against the brackets. For elections by mass of unrescaled fp32 computations whose tensors share one dtype. False if some
  // delta may not be finite.
  bool (*merge_counting)(const MergeJob&, const Bracket*, uint64_t keep_equal, int64_t begin, int64_t end, Collected*);
  // Merges elements begin + index[0], ... again; for the same jobs, if no selection's key is 0.
  void (*merge_elements)(const MergeJob&, int64_t begin, const uint16_t* index, int64_t count);
  // L1 norms of one model's delta and of its kept part, per block of kSumBlock elements.
  void (*abs_sums)(const MergeJob&, int model, int64_t begin, int64_t end, double* full, double* kept);
  // a·a, b·b and a·b per block of kSumBlock elements: sums[3 * block + i].
  void (*dots)(const Input& a, const Input& b, bool f64, int64_t begin, int64_t end, double* sums);
  // Interpolates a range; false if some difference of it is not finite.
  bool (*lerp)(const LerpJob&, int64_t begin, int64_t end);
  // Whether a range, which begins anywhere, has no NaN and no infinity.
  bool (*finite)(const Input&, int64_t begin, int64_t end);
  // Divergences, or their gradients, of rows [begin, end).
  void (*kl_forward)(const KlJob&, int64_t begin, int64_t end);
  void (*kl_backward)(const KlJob&, int64_t begin, int64_t end);
  // Adds a low-rank product to elements [begin, end) of x, any range.
  void (*low_rank)(const LowRankJob&, int64_t begin, int64_t end);
  // Adds a range's sums and counts to those given; begin is a multiple of kSumBlock. `memory`: 64 fp64 numbers for each sum and
  // kDiagnoseRun bytes for each model and for three more, aligned to a vector for speed.
  void (*diagnose)(const DiagnoseJob&, int64_t begin, int64_t end, void* memory, double* sums, int64_t* counts);
};

}  // namespace pymerge
