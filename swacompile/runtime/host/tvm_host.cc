#include "tvm_host.h"

#include <tvm/ffi/c_api.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>

namespace {

// TVM's c_backend_api.h, which is no part of the headers that this library is built with.
struct ParallelGroup {
  void* sync_handle;
  int32_t task_count;
};
using ParallelBody = int (*)(int task, ParallelGroup* group, void* closure);

constexpr size_t cache_line = 64;  // kernels assume it of their scratch memory
constexpr size_t longest_error = 512;

// Plain arrays and pointers only: a thread may outlive the library, and would then run its destructors.
thread_local char raised_error[longest_error] = "";
thread_local swacompile::ParallelFor current_host = {nullptr, nullptr};
thread_local int current_tasks = 1;

struct ParallelRun {
  ParallelBody body;
  void* closure;
  ParallelGroup group;
  std::atomic<int> failure{0};
};

void run_task(void* user, size_t task) {
  ParallelRun& run = *static_cast<ParallelRun*>(user);
  const int status = run.body(static_cast<int>(task), &run.group, run.closure);
  if (status != 0) run.failure = status;
}

int parallel_launch(ParallelBody body, void* closure, int task_count) {
  const int tasks = task_count > 0 ? task_count : current_tasks;
  ParallelRun run{body, closure, {nullptr, tasks}};
  if (tasks == 1 || current_host.run == nullptr) {
    for (int task = 0; task < tasks; ++task) run_task(&run, static_cast<size_t>(task));
    return run.failure;
  }
  try {
    current_host.run(current_host.context, run_task, static_cast<size_t>(tasks), &run);
  } catch (const std::exception& error) {
    snprintf(raised_error, longest_error, "%s", error.what());
    return -1;
  }
  return run.failure;
}

void* allocate_workspace(int /*device_type*/, int /*device*/, uint64_t bytes, int /*code*/, int /*bits*/) {
  void* memory = nullptr;
  return posix_memalign(&memory, cache_line, bytes ? bytes : 1) == 0 ? memory : nullptr;
}

int free_workspace(int /*device_type*/, int /*device*/, void* memory) {
  free(memory);
  return 0;
}

}  // namespace

extern "C" {

// The slots through which TVM-made code reaches its runtime. Each object file holds them too, as weak symbols, but only
// those that it uses.
__attribute__((weak)) void* __TVMBackendParallelLaunch = nullptr;
__attribute__((weak)) void* __TVMBackendAllocWorkspace = nullptr;
__attribute__((weak)) void* __TVMBackendFreeWorkspace = nullptr;

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t part_count) {
  size_t used = static_cast<size_t>(snprintf(raised_error, longest_error, "%s: ", kind));
  for (int32_t i = 0; i < part_count && used < longest_error; ++i) {
    if (parts[i]) used += static_cast<size_t>(snprintf(raised_error + used, longest_error - used, "%s", parts[i]));
  }
}

void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &message, 1);
}

}  // extern "C"

namespace swacompile {

void install_tvm_host() {
  __TVMBackendParallelLaunch = reinterpret_cast<void*>(parallel_launch);
  __TVMBackendAllocWorkspace = reinterpret_cast<void*>(allocate_workspace);
  __TVMBackendFreeWorkspace = reinterpret_cast<void*>(free_workspace);
}

ParallelScope::ParallelScope(const ParallelFor& host, int tasks) : outer_host_(current_host), outer_tasks_(current_tasks) {
  current_host = host;
  current_tasks = tasks;
}

ParallelScope::~ParallelScope() {
  current_host = outer_host_;
  current_tasks = outer_tasks_;
}

std::string last_kernel_error() { return raised_error[0] ? raised_error : "unknown error"; }

}  // namespace swacompile
