// The C interface of a kernel library: kernels for some element types, head sizes and instruction sets. It needs no other library.
#pragma once

#include <tvm/ffi/c_api.h>

#include <cstddef>
#include <cstdint>

#include "tvm_host.h"

namespace swacompile {

constexpr uint32_t kernel_library_version = 1;
constexpr char kernel_library_symbol[] = "swacompile_kernel_library";

using KernelFunction = int (*)(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result);

struct Kernel {
  DLDataType type;
  int64_t head_size;
  int64_t value_size;
  const char* instruction_set;  // the name of a row of swacompile.target
  KernelFunction function;
};

struct KernelLibrary {
  uint32_t version;
  // Of kernels that differ only in the instruction set, the best comes first.
  const Kernel* kernels;
  size_t count;
  // Calls a kernel of this library, its parallel loops as `tasks` tasks on the host's threads. Not 0: last_error() says why.
  int (*call)(KernelFunction function, const TVMFFIAny* arguments, int32_t count, const ParallelFor* host, int tasks);
  const char* (*last_error)();  // of this thread; valid until the next one
};

}  // namespace swacompile

extern "C" const swacompile::KernelLibrary* swacompile_kernel_library();
