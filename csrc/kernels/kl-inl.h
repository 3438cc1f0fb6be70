// Divergence between two softmax distributions per row, from raw logits, and its gradient (docs/kl.md has the formulas).
#pragma once

#include "kernels/convert-inl.h"
#include "kernels/exp-inl.h"

namespace pymerge {
namespace PYMERGE_TARGET {

// A block's logits as fp32 stay in the first-level cache while they are looked at twice, for their maximum and for the sums.
constexpr int64_t kKlBlock = 1024;
// Sums go over 32 lanes, however many a register has, so that every target adds the same numbers in the same order; a lane adds
// kKlBlock / 32 terms in fp32, and blocks are added in fp64.
constexpr int kKlLanes = 32;

constexpr float kInf = __builtin_inff();

// The 32 lanes as registers; the loops below unroll.
template <class L>
struct LaneSum {
  static constexpr int kRegisters = kKlLanes / L::kLanes;
  typename L::Vec lane[kRegisters];

  LaneSum() {
    for (auto& l : lane) l = L::Zero();
  }
  void Add(int j, typename L::Vec v) { lane[j] = L::Add(lane[j], v); }
  double Fold() const {
    float each[kKlLanes];
    for (int j = 0; j < kRegisters; ++j) L::Store(each + j * L::kLanes, lane[j]);
    double sum = 0;
    for (float x : each) sum += x;
    return sum;
  }
};

// in[begin..begin+n) as fp32, followed by logits of probability 0 up to a multiple of kKlLanes, which is returned.
inline int64_t LoadBlock(const Input& in, int64_t begin, int64_t n, float* x) {
  const int64_t padded = (n + kKlLanes - 1) / kKlLanes * kKlLanes;
  Widen(in, begin, n, x);
  for (int64_t i = n; i < padded; ++i) x[i] = -kInf;
  return padded;
}

// The largest of n numbers, a multiple of kKlLanes, that are not NaN; -inf if there is none.
template <class L>
inline float LargestOf(const float* x, int64_t n) {
  constexpr int kRegisters = LaneSum<L>::kRegisters;
  typename L::Vec top[kRegisters];
  for (auto& t : top) t = L::Set(-kInf);
  for (int64_t i = 0; i < n; i += kKlLanes) {
    for (int j = 0; j < kRegisters; ++j) top[j] = L::Larger(L::Load(x + i + j * L::kLanes), top[j]);
  }
  float each[kKlLanes];
  for (int j = 0; j < kRegisters; ++j) L::Store(each + j * L::kLanes, top[j]);
  float largest = each[0];
  for (float e : each) largest = e > largest ? e : largest;
  return largest;
}

// The logits of one model in a row, as far as they were read: sum = sum of exp((logit - max) / temperature).
struct RowSum {
  float max = -kInf;
  double sum = 0;

  // What is subtracted from logits: something finite also while there was nothing but -inf.
  float Shift() const { return max == -kInf ? 0.0f : max; }

  // Lets the maximum grow; returns by how much the scaled logits seen so far, as differences to it, change: 0 or negative.
  double Raise(float block_max, double inverse_temperature) {
    const float before = max;
    if (!(block_max > max)) return 0;
    max = block_max;
    if (before == -kInf) return 0;
    const double change = (static_cast<double>(before) - max) * inverse_temperature;
    sum *= __builtin_exp(change);
    return change;
  }

  // Blocks without a probability leave exp(kExpFloor) times their length; only NaN is to be kept of that.
  void Add(double block) {
    sum += block;
    if (max == -kInf && sum == sum) sum = 0;
  }
};

// cross = sum over the row of exp(u) (u - v), u and v the scaled differences of a's and b's logits to their maxima; only if kCross.
// Reads the row once.
template <class L, bool kCross>
inline double SumRow(const Input& a, const Input& b, int64_t begin, int64_t vocab, double inverse_temperature, RowSum* row_a,
                     RowSum* row_b) {
  alignas(64) float x[kKlBlock], y[kKlBlock];
  const auto scale = L::Set(static_cast<float>(inverse_temperature));
  double cross = 0;
  for (int64_t first = 0; first < vocab; first += kKlBlock) {
    const int64_t n = vocab - first < kKlBlock ? vocab - first : kKlBlock;
    const int64_t padded = LoadBlock(a, begin + first, n, x);
    LoadBlock(b, begin + first, n, y);
    const double before = row_a->sum;
    const double change_a = row_a->Raise(LargestOf<L>(x, padded), inverse_temperature);
    const double change_b = row_b->Raise(LargestOf<L>(y, padded), inverse_temperature);
    // An infinite sum stays infinite: a put weight where b has none.
    if (kCross && cross < kInf) cross = (cross + before * (change_a - change_b)) * __builtin_exp(change_a);

    const auto max_a = L::Set(row_a->Shift()), max_b = L::Set(row_b->Shift()), nothing = L::Set(-kInf);
    LaneSum<L> sum_a, sum_b, sum_cross;
    for (int64_t i = 0; i < padded; i += kKlLanes) {
      for (int j = 0; j < LaneSum<L>::kRegisters; ++j) {
        const auto u = L::Mul(L::Sub(L::Load(x + i + j * L::kLanes), max_a), scale);
        const auto v = L::Mul(L::Sub(L::Load(y + i + j * L::kLanes), max_b), scale);
        const auto exp_u = Exp<L>(u);
        sum_a.Add(j, exp_u);
        sum_b.Add(j, Exp<L>(v));
        if (kCross) sum_cross.Add(j, L::Where(L::Below(nothing, u), L::Mul(exp_u, L::Sub(u, v))));
      }
    }
    row_a->Add(sum_a.Fold());
    row_b->Add(sum_b.Fold());
    if (kCross) cross += sum_cross.Fold();
  }
  return cross;
}

// log p of one model's logits.
template <class L>
struct LogSoftmax {
  typename L::Vec max, scale, log;
  LogSoftmax(float max_logit, float log_sum, double inverse_temperature)
      : max(L::Set(max_logit)), scale(L::Set(static_cast<float>(inverse_temperature))), log(L::Set(log_sum)) {}
  typename L::Vec Difference(const float* x) const { return L::Mul(L::Sub(L::Load(x), max), scale); }
  typename L::Vec operator()(const float* x) const { return L::Sub(Difference(x), log); }
};

// log a - log m and log b - log m of an entry with log probabilities a and b and mixture m = w_a a + w_b b.
template <class L>
struct LogRatios {
  typename L::Vec a, b;
};

// With d = log b - log a <= 0, log m = log a + log(1 + w_b (e^d - 1)); where d > 0, the roles are exchanged, so that no exponential
// overflows. Always finite, also where a probability is 0: such an entry's weight is 0, and its factor must not be infinite.
template <class L>
inline LogRatios<L> RatiosToMixture(typename L::Vec log_a, typename L::Vec log_b, typename L::Vec w_a, typename L::Vec w_b) {
  const auto d = L::Sub(log_b, log_a);
  const auto b_larger = L::Positive(d);
  // -|d|, cut where the smaller probability is nothing beside the larger; d is NaN where both are 0, and cut too.
  const auto distance = L::Larger(L::Blend(b_larger, L::Sub(log_a, log_b), d), L::Set(kExpFloor));
  const auto log = Log1p<L>(L::Mul(L::Blend(b_larger, w_a, w_b), ExpM1<L>(distance)));
  return {L::Sub(L::Where(b_larger, distance), log), L::Sub(L::Where(L::Not(b_larger), distance), log)};
}

// E_q[log q - log m] and E_p[log p - log m] of a row whose softmaxes are known.
template <class L>
inline void MixtureSums(const KlJob& job, int64_t begin, const KlStats& s, double* student, double* teacher) {
  alignas(64) float x[kKlBlock], y[kKlBlock];
  const LogSoftmax<L> student_log(s.student_max, s.student_log, 1.0 / job.temperature);
  const LogSoftmax<L> teacher_log(s.teacher_max, s.teacher_log, 1.0 / job.temperature);
  const auto w_student = L::Set(static_cast<float>(1.0 - job.beta)), w_teacher = L::Set(static_cast<float>(job.beta));
  *student = *teacher = 0;
  for (int64_t first = 0; first < job.vocab; first += kKlBlock) {
    const int64_t n = job.vocab - first < kKlBlock ? job.vocab - first : kKlBlock;
    const int64_t padded = LoadBlock(job.student, begin + first, n, x);
    LoadBlock(job.teacher, begin + first, n, y);
    LaneSum<L> sum_student, sum_teacher;
    for (int64_t i = 0; i < padded; i += kKlLanes) {
      for (int j = 0; j < LaneSum<L>::kRegisters; ++j) {
        const auto log_q = student_log(x + i + j * L::kLanes), log_p = teacher_log(y + i + j * L::kLanes);
        const auto to_m = RatiosToMixture<L>(log_q, log_p, w_student, w_teacher);
        sum_student.Add(j, L::Mul(ExpOrZero<L>(log_q), to_m.a));
        sum_teacher.Add(j, L::Mul(ExpOrZero<L>(log_p), to_m.b));
      }
    }
    *student += sum_student.Fold();
    *teacher += sum_teacher.Fold();
  }
}

// Rounding can leave a divergence a little below 0, which it never is. NaN stays.
inline double NotNegative(double x) { return x < 0 ? 0 : x; }

inline double ForwardRow(const KlJob& job, int64_t begin, KlStats* stats) {
  const double inverse_temperature = 1.0 / job.temperature;
  RowSum student, teacher;
  double cross = 0;
  if (job.kind == KlKind::kForward) {
    cross = SumRow<Lanes, true>(job.teacher, job.student, begin, job.vocab, inverse_temperature, &teacher, &student);
  } else if (job.kind == KlKind::kReverse) {
    cross = SumRow<Lanes, true>(job.student, job.teacher, begin, job.vocab, inverse_temperature, &student, &teacher);
  } else {
    SumRow<Lanes, false>(job.student, job.teacher, begin, job.vocab, inverse_temperature, &student, &teacher);
  }
  const double student_log = __builtin_log(student.sum), teacher_log = __builtin_log(teacher.sum);
  *stats = {student.max, static_cast<float>(student_log), teacher.max, static_cast<float>(teacher_log), 0, 0};
  if (job.kind == KlKind::kForward) {
    const double kl = cross / teacher.sum - teacher_log + student_log;
    stats->teacher_mean = static_cast<float>(kl);
    return NotNegative(kl);
  }
  if (job.kind == KlKind::kReverse) {
    const double kl = cross / student.sum - student_log + teacher_log;
    stats->student_mean = static_cast<float>(kl);
    return NotNegative(kl);
  }
  // The mixture needs both normalisers, so it takes the row, now in the second-level cache, a second time.
  double kl_student, kl_teacher;
  MixtureSums<Lanes>(job, begin, *stats, &kl_student, &kl_teacher);
  const double jsd = job.beta * kl_teacher + (1.0 - job.beta) * kl_student;
  // NaN in one model's logits spoils both gradients, though RatiosToMixture, finite as it is, shows it in one sum only.
  stats->student_mean = static_cast<float>(jsd == jsd ? kl_student : jsd);
  stats->teacher_mean = static_cast<float>(jsd == jsd ? kl_teacher : jsd);
  return NotNegative(jsd);
}

void KlForward(const KlJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float weight = job.weight ? job.weight[row] : 1.0f;
    if (weight == 0.0f) {
      job.stats[row] = {};
      job.loss[row] = 0.0f;
    } else {
      job.loss[row] = static_cast<float>(weight * ForwardRow(job, row * job.vocab, &job.stats[row]));
    }
  }
}

// The three shapes that a gradient has, seen from the model that it belongs to ("own").
enum class Gradient { kDifference, kCentred, kMixture };  // own - other; own (log own - log other - mean); own (log own - log m - mean)

template <class L, Gradient kShape>
inline void BackwardRow(const KlJob& job, int64_t begin, const KlStats& s, double grad) {
  alignas(64) float x[kKlBlock], y[kKlBlock];
  const double inverse_temperature = 1.0 / job.temperature;
  const Input& own = job.of_teacher ? job.teacher : job.student;
  const Input& other = job.of_teacher ? job.student : job.teacher;
  const LogSoftmax<L> student_log(s.student_max, s.student_log, inverse_temperature);
  const LogSoftmax<L> teacher_log(s.teacher_max, s.teacher_log, inverse_temperature);
  const LogSoftmax<L>& own_log = job.of_teacher ? teacher_log : student_log;
  const LogSoftmax<L>& other_log = job.of_teacher ? student_log : teacher_log;
  const double own_weight = job.of_teacher ? job.beta : 1.0 - job.beta;
  const auto w_own = L::Set(static_cast<float>(own_weight)), w_other = L::Set(static_cast<float>(1.0 - own_weight));
  // An infinite divergence has no such gradient: NaN, where the own probability is not 0.
  const float own_mean = job.of_teacher ? s.teacher_mean : s.student_mean;
  const auto mean = L::Set(own_mean == kInf ? __builtin_nanf("") : own_mean);
  const auto factor = L::Set(static_cast<float>(grad * inverse_temperature * (kShape == Gradient::kMixture ? own_weight : 1.0)));
  for (int64_t first = 0; first < job.vocab; first += kKlBlock) {
    const int64_t n = job.vocab - first < kKlBlock ? job.vocab - first : kKlBlock;
    const int64_t padded = LoadBlock(own, begin + first, n, x);
    LoadBlock(other, begin + first, n, y);
    for (int64_t i = 0; i < padded; i += L::kLanes) {
      const auto log_a = own_log(x + i), log_b = other_log(y + i);
      const auto a = ExpOrZero<L>(log_a);
      auto g = L::Zero();
      if (kShape == Gradient::kDifference) {
        g = L::Mul(L::Sub(a, ExpOrZero<L>(log_b)), factor);
      } else {
        const auto ratio = kShape == Gradient::kMixture ? RatiosToMixture<L>(log_a, log_b, w_own, w_other).a : L::Sub(log_a, log_b);
        // Where the probability is 0 the ratio may be infinite or NaN, and the gradient is 0.
        g = L::Blend(L::IsZero(a), L::Zero(), L::Mul(L::Mul(a, L::Sub(ratio, mean)), factor));
      }
      L::Store(x + i, g);
    }
    Narrow(x, begin + first, n, job.out);  // this block's logits were read, so `out` may be where they were
  }
}

void KlBackward(const KlJob& job, int64_t begin, int64_t end) {
  const bool centred = (job.kind == KlKind::kReverse) != job.of_teacher;
  for (int64_t row = begin; row < end; ++row) {
    const double weight = job.weight ? job.weight[row] : 1.0;
    const int64_t first = row * job.vocab;
    if (weight == 0) {
      const size_t size = job.out.dtype == DType::kF32 ? 4 : 2;
      memset(static_cast<char*>(job.out.data) + static_cast<size_t>(first) * size, 0, static_cast<size_t>(job.vocab) * size);
      continue;
    }
    const double grad = weight * job.grad[row];
    if (job.kind == KlKind::kJsd) {
      BackwardRow<Lanes, Gradient::kMixture>(job, first, job.stats[row], grad);
    } else if (centred) {
      BackwardRow<Lanes, Gradient::kCentred>(job, first, job.stats[row], grad);
    } else {
      BackwardRow<Lanes, Gradient::kDifference>(job, first, job.stats[row], grad);
    }
  }
}

}  // namespace PYMERGE_TARGET
}  // namespace pymerge
