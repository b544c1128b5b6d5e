// What a TVM-made kernel asks of the program that it is linked into: threads, scratch memory and a place for errors.
#pragma once

#include <string>

#include "ort.h"

namespace swacompile {

// Points the kernels at this library. Call before the first kernel.
void install_tvm_host();

// While alive, parallel loops of kernels called from this thread run as `tasks` tasks on the session's threads.
class ParallelScope {
 public:
  ParallelScope(const Context& context, int tasks);
  ~ParallelScope();
  ParallelScope(const ParallelScope&) = delete;
  ParallelScope& operator=(const ParallelScope&) = delete;

 private:
  const Context* outer_context_;
  int outer_tasks_;
};

// The text of the last error that a kernel raised on this thread.
std::string last_kernel_error();

}  // namespace swacompile
