// The only place that makes threads. Not OpenMP: torch brings its own copy of that runtime, and two in one process cost speed or abort.
#pragma once

#include <cstdint>
#include <functional>

namespace pymerge {

constexpr int kMaxThreads = 256;

// Calls task(i, slot) once for every i in [0, count), on the calling thread and up to threads - 1 workers, and returns when all are done. They
// are taken in rising order, which merging in one pass counts on. Two calls that run at the same time never share a slot, 0 <= slot < threads.
// An exception that a task throws stops the rest and is rethrown. Every thread computes with the default floating-point environment (no
// flushing of subnormals, round to nearest), whatever the caller has set; the caller's is restored. When the pool is in use by another thread,
// everything runs on the caller.
void ParallelFor(int64_t count, int threads, const std::function<void(int64_t i, int slot)>& task);

// Threads worth waking for work that moves this many bytes.
int UsefulThreads(int64_t bytes, int threads);

}  // namespace pymerge
