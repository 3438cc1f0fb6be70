#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace pymerge {
namespace {

// Default rounding, no flush-to-zero, no denormals-are-zero while it lives; exceptions stay masked.
class DefaultFloatingPoint {
 public:
#if defined(__x86_64__)
  DefaultFloatingPoint() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultFloatingPoint() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatingPoint() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~DefaultFloatingPoint() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
  DefaultFloatingPoint() { fegetenv(&saved_); fesetenv(FE_DFL_ENV); }
  ~DefaultFloatingPoint() { fesetenv(&saved_); }

 private:
  fenv_t saved_;
#endif
};

constexpr int kSpins = 1000;  // pauses: 10 to 50 us

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  // False, without having done anything, when another thread is using the pool.
  bool TryRun(int64_t count, int threads, const std::function<void(int64_t, int)>& task) {
    std::unique_lock<std::mutex> in_use(run_mutex_, std::try_to_lock);
    if (!in_use.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = std::min<int>(threads - 1, Grow(threads - 1));
      ++generation_;
    }
    wake_.notify_all();
    Work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // who has not come by now need not be waited for
    lock.unlock();
    Spin([this] { return running_ == 0; });
    lock.lock();
    done_.wait(lock, [this] { return running_ == 0; });
    task_ = nullptr;
    if (std::exception_ptr error = std::exchange(error_, nullptr)) std::rethrow_exception(error);
    return true;
  }

 private:
  // Makes up to `workers` threads; returns how many there are. Called with mutex_ held.
  int Grow(int workers) {
    while (workers_ < workers) {
      try {
        std::thread(&Pool::Loop, this, workers_ + 1, generation_.load()).detach();
      } catch (const std::system_error&) {
        break;  // no more threads to be had: fewer do the work
      }
      ++workers_;
    }
    return workers_;
  }

  void Work(int slot) {
    const DefaultFloatingPoint environment;
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*task_)(i, slot);
    } catch (...) {
      next_.store(count_, std::memory_order_relaxed);  // the others stop soon
      std::lock_guard<std::mutex> lock(mutex_);
      error_ = std::current_exception();
    }
  }

  void Loop(int slot, uint64_t seen) {
    for (;;) {
      Spin([&] { return generation_ != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (slot > wanted_) continue;
      ++running_;
      lock.unlock();
      Work(slot);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  // Waits a little for what is nearly there: a merge is several parallel regions, and to sleep and be woken between them takes longer than this.
  template <class F>
  static void Spin(F&& done) {
    for (int i = 0; i < kSpins && !done(); ++i) Pause();
  }

  std::mutex run_mutex_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t, int)>* task_ = nullptr;
  std::exception_ptr error_;
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
  int workers_ = 0, wanted_ = 0;
  std::atomic<int> running_{0};  // workers at work; changed, like generation_, with mutex_ held
  std::atomic<uint64_t> generation_{0};
};

// Never destroyed: its detached threads may outlive static destructors. A forked child has none of its threads and whatever state its
// locks were in, so it starts with a new one.
std::atomic<Pool*> pool{nullptr};

Pool& CurrentPool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  (void)registered;
  Pool* current = pool.load();
  if (!current) {
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(current, made)) return *made;
    delete made;
  }
  return *current;
}

}  // namespace

void ParallelFor(int64_t count, int threads, const std::function<void(int64_t, int)>& task) {
  threads = static_cast<int>(std::min<int64_t>({threads, count, kMaxThreads}));
  if (threads > 1 && CurrentPool().TryRun(count, threads, task)) return;
  const DefaultFloatingPoint environment;
  for (int64_t i = 0; i < count; ++i) task(i, 0);
}

int UsefulThreads(int64_t bytes, int threads) {
  constexpr int64_t kBytesPerThread = 1 << 19;  // waking a thread costs about as much as moving this much
  return static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::clamp(threads, 1, kMaxThreads)));
}

}  // namespace pymerge
