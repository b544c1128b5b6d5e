// What a TVM-made kernel asks of the program that it is linked into: threads, scratch memory and a place for errors.
#pragma once

#include <cstddef>
#include <string>

namespace swacompile {

// Points the kernels at this library. Call before the first kernel.
void install_tvm_host();

// A host's threads: `run` calls task(user, i) for every i in [0, count) and returns when all are done. It may throw.
struct ParallelFor {
  void (*run)(const void* context, void (*task)(void* user, size_t i), size_t count, void* user);
  const void* context;
};

// While alive, parallel loops of kernels called from this thread run as `tasks` tasks on the host's threads.
class ParallelScope {
 public:
  ParallelScope(const ParallelFor& host, int tasks);
  ~ParallelScope();
  ParallelScope(const ParallelScope&) = delete;
  ParallelScope& operator=(const ParallelScope&) = delete;

 private:
  ParallelFor outer_host_;
  int outer_tasks_;
};

// The text of the last error that a kernel raised on this thread.
std::string last_kernel_error();

}  // namespace swacompile
