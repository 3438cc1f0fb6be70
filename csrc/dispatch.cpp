#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pymerge {

#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif
extern const Kernels kScalarKernels;

namespace {

#if defined(__x86_64__)
// Asked of the CPU itself: Clang's __builtin_cpu_supports does not know the name.
bool HasF16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Slowest first. The checks include what the operating system saves on a context switch.
std::vector<const Kernels*> Usable() {
  std::vector<const Kernels*> usable = {&kScalarKernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt") && HasF16c();
  if (avx2) usable.push_back(&kAvx2Kernels);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    usable.push_back(&kAvx512Kernels);
  }
#elif defined(__aarch64__)
  usable.push_back(&kNeonKernels);
#endif
  return usable;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

std::vector<std::string> AvailableTargets() {
  std::vector<std::string> names;
  for (const Kernels* k : Usable()) names.emplace_back(k->name);
  return names;
}

const Kernels& CurrentKernels() {
  const Kernels* kernels = current.load(std::memory_order_relaxed);
  if (!kernels) {
    kernels = Usable().back();
    current.store(kernels, std::memory_order_relaxed);
  }
  return *kernels;
}

void SelectTarget(const std::string& name) {
  const auto usable = Usable();
  if (name.empty()) {
    current.store(usable.back());
    return;
  }
  std::string have;
  for (const Kernels* k : usable) {
    if (name == k->name) {
      current.store(k);
      return;
    }
    have += (have.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available: this CPU and this build have " + have);
}

}  // namespace pymerge
