// Every target of this build gives the scalar target's bytes, on random jobs. Needs neither Python nor torch, so that the arm64 target can
// be checked on any machine: `make arm64` compiles it with a cross compiler and runs it under emulation.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "diagnose.h"
#include "dispatch.h"
#include "kl.h"
#include "merge.h"
#include "merge_many.h"
#include "select.h"

using namespace pymerge;

namespace {

std::mt19937_64 rng(1);
int64_t Pick(int64_t lo, int64_t hi) { return lo + static_cast<int64_t>(rng() % static_cast<uint64_t>(hi - lo + 1)); }

int64_t SizeOf(DType d) { return d == DType::kF64 ? 8 : d == DType::kF32 ? 4 : 2; }

// Random bits with small exponents (so that few are infinite), ties and zeros among them.
std::vector<unsigned char> RandomTensor(int64_t n, DType d) {
  std::vector<unsigned char> bytes(static_cast<size_t>(n * SizeOf(d)) + 1);
  const int kind = static_cast<int>(Pick(0, 2));
  for (int64_t i = 0; i < n; ++i) {
    const double x = kind == 0 ? static_cast<double>(Pick(-4, 4)) : std::normal_distribution<double>()(rng) * (kind == 1 ? 1 : 1e-39);
    const float f = static_cast<float>(x);
    uint32_t u;
    memcpy(&u, &f, 4);
    const uint16_t bf16 = static_cast<uint16_t>(u >> 16), f16 = static_cast<uint16_t>(rng() & 0xBFFF);
    const void* from = d == DType::kF64 ? static_cast<const void*>(&x) : d == DType::kF32 ? static_cast<const void*>(&f)
                       : d == DType::kBF16 ? static_cast<const void*>(&bf16) : static_cast<const void*>(&f16);
    memcpy(bytes.data() + i * SizeOf(d), from, static_cast<size_t>(SizeOf(d)));
  }
  return bytes;
}

DType AnyDType() { return static_cast<DType>(Pick(0, 3)); }

// The bytes of everything that one random job computes; the same job for the same seed.
std::vector<unsigned char> RunJob(uint64_t seed, const std::string& target) {
  SelectTarget(target);
  rng.seed(seed);
  MergePlan plan;
  MergeJob& job = plan.job;
  job.in.n = Pick(0, 3) ? Pick(0, 2500) : Pick(60000, 140000);
  job.in.models = static_cast<int>(Pick(1, 5));
  const bool uniform = Pick(0, 1);
  const DType shared = AnyDType();
  std::vector<std::vector<unsigned char>> data;
  auto input = [&] {
    const DType d = uniform ? shared : AnyDType();
    data.push_back(RandomTensor(job.in.n, d));
    job.in.f64 |= d == DType::kF64;
    return Input{data.back().data(), d};
  };
  data.reserve(8);
  if (Pick(0, 3)) job.in.base = input();
  for (int m = 0; m < job.in.models; ++m) job.in.model[m] = input();
  job.out.dtype = uniform ? shared : AnyDType();
  std::vector<unsigned char> result(static_cast<size_t>(job.in.n * SizeOf(job.out.dtype)) + 64);
  job.out.data = result.data();
  job.sparsify = static_cast<Sparsify>(Pick(0, 2));
  job.vote = static_cast<Vote>(Pick(0, 2));
  job.vote_weighted = Pick(0, 1);
  job.zero_vote = static_cast<ZeroVote>(Pick(0, 2));
  job.divisor = static_cast<Divisor>(Pick(0, 2));
  job.seed = rng();
  job.tensor_id = static_cast<uint32_t>(rng());
  job.scale = Pick(0, 1) ? 1.0 : -0.37;
  plan.tie_all = Pick(0, 1);
  plan.majority = Pick(0, 1);
  plan.rescale = static_cast<Rescale>(Pick(0, 2));
  for (int m = 0; m < job.in.models; ++m) {
    job.weight[m] = static_cast<double>(Pick(-2, 5)) / 3;
    plan.density[m] = static_cast<double>(Pick(0, 10)) / 10;
    plan.counts[m] = Pick(0, job.in.n);
    job.keep_below[m] = static_cast<uint64_t>(plan.density[m] * 4294967296.0);
  }
  auto append = [&](const void* p, size_t n) {
    result.insert(result.end(), static_cast<const unsigned char*>(p), static_cast<const unsigned char*>(p) + n);
  };
  const bool finite = MergeTensor(&plan, 2);
  append(&finite, 1);
  append(job.selection, sizeof(Selection) * static_cast<size_t>(job.sparsify == Sparsify::kMagnitude ? job.in.models : 0));
  if (job.vote != Vote::kNone) {
    const int64_t balance = VoteBalance(&plan, 2);
    append(&balance, sizeof(balance));
  }
  const Input &a = job.in.model[0], &b = job.in.model[job.in.models - 1];
  double sums[3] = {};
  DotProducts(job.in.n, a, b, a.dtype == DType::kF64 || b.dtype == DType::kF64, 2, sums);
  append(sums, sizeof(sums));
  std::vector<unsigned char> between(static_cast<size_t>(job.in.n * 8) + 1);
  LerpJob lerp;
  lerp.n = job.in.n;
  lerp.f64 = a.dtype == DType::kF64 || b.dtype == DType::kF64;
  lerp.a = a;
  lerp.b = b;
  lerp.out = {between.data(), job.out.dtype};
  lerp.near_a = Pick(0, 1);
  lerp.weight = 0.3;
  const bool lerp_finite = LerpTensor(lerp, 2);
  append(&lerp_finite, 1);
  for (int64_t bad : FindNonFinite({{job.in.n, a}, {job.in.n, b}}, 2)) append(&bad, sizeof(bad));
  append(between.data(), between.size());
  return result;
}

// The same of a random divergence: losses, statistics, and a gradient.
std::vector<unsigned char> RunKlJob(uint64_t seed, const std::string& target) {
  SelectTarget(target);
  rng.seed(seed);
  KlJob job;
  job.rows = Pick(1, 4);
  job.vocab = Pick(0, 3) ? Pick(1, 2500) : Pick(1, 40);
  const int64_t n = job.rows * job.vocab;
  job.student.dtype = static_cast<DType>(Pick(0, 2));
  job.teacher.dtype = static_cast<DType>(Pick(0, 2));
  const std::vector<unsigned char> student = RandomTensor(n, job.student.dtype), teacher = RandomTensor(n, job.teacher.dtype);
  job.student.data = student.data();
  job.teacher.data = teacher.data();
  job.kind = static_cast<KlKind>(Pick(0, 2));
  job.beta = 0.3;
  job.temperature = static_cast<double>(Pick(1, 9)) / 3;
  const float weight[] = {1.0f, 0.0f, 0.5f, 2.0f}, grad[] = {1.0f, -1.0f, 0.3f, 3.0f};
  KlStats stats[4] = {};
  float loss[4] = {};
  if (Pick(0, 1)) job.weight = weight;
  job.stats = stats;
  job.loss = loss;
  KlForwardRows(job, 2);
  job.grad = grad;
  job.of_teacher = Pick(0, 1);
  job.out.dtype = job.of_teacher ? job.teacher.dtype : job.student.dtype;
  std::vector<unsigned char> result(static_cast<size_t>(n * SizeOf(job.out.dtype)));
  job.out.data = result.data();
  KlBackwardRows(job, 2);
  for (const auto& [p, size] : {std::pair<const void*, size_t>{stats, sizeof(stats)}, {loss, sizeof(loss)}}) {
    result.insert(result.end(), static_cast<const unsigned char*>(p), static_cast<const unsigned char*>(p) + size);
  }
  return result;
}

// The same of random statistics: sums and counts, of a few models or many, twice over.
std::vector<unsigned char> RunDiagnoseJob(uint64_t seed, const std::string& target) {
  SelectTarget(target);
  rng.seed(seed);
  DiagnoseJob job;
  job.in.n = Pick(0, 3) ? Pick(0, 2500) : Pick(8000, 20000);
  job.in.models = static_cast<int>(Pick(0, 3) ? Pick(1, 4) : Pick(5, 11));
  const bool uniform = Pick(0, 1);
  const DType shared = AnyDType();
  std::vector<std::vector<unsigned char>> data;
  auto input = [&] {
    const DType d = uniform ? shared : AnyDType();
    data.push_back(RandomTensor(job.in.n, d));
    job.in.f64 |= d == DType::kF64;
    return Input{data.back().data(), d};
  };
  if (Pick(0, 3)) job.in.base = input();
  for (int m = 0; m < job.in.models; ++m) job.in.model[m] = input();
  for (int m = 0; m < job.in.models; ++m) {
    const float threshold = static_cast<float>(Pick(0, 5)) / 2;
    const double wide = threshold;
    int32_t key;
    memcpy(&key, &threshold, sizeof(key));
    job.selection[m].key = key;
    if (job.in.f64) memcpy(&job.selection[m].key, &wide, sizeof(wide));
    job.selection[m].cut = Pick(-1, job.in.n);
  }
  std::vector<double> sums(static_cast<size_t>(DiagnoseSums(job.in.models)));
  std::vector<int64_t> counts(static_cast<size_t>(DiagnoseCounts(job.in.models)));
  for (int i = 0; i < 2; ++i) DiagnoseTensor(job, 2, sums.data(), counts.data());
  std::vector<unsigned char> result(sums.size() * sizeof(double) + counts.size() * sizeof(int64_t));
  memcpy(result.data(), sums.data(), sums.size() * sizeof(double));
  memcpy(result.data() + sums.size() * sizeof(double), counts.data(), counts.size() * sizeof(int64_t));
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  const int jobs = argc > 1 ? atoi(argv[1]) : 500;
  int failed = 0;
  for (const std::string& target : AvailableTargets()) {
    int wrong = 0;
    for (int seed = 0; seed < jobs; ++seed) {
      const bool same = RunJob(seed, target) == RunJob(seed, "scalar") && RunKlJob(seed, target) == RunKlJob(seed, "scalar") &&
                        RunDiagnoseJob(seed, target) == RunDiagnoseJob(seed, "scalar");
      wrong += !same;
    }
    printf("%s: %d jobs, %d differ from scalar\n", target.c_str(), jobs, wrong);
    failed += wrong;
  }
  return failed ? 1 : 0;
}
