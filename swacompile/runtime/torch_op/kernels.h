// The kernels that were loaded into this process, and which one serves a call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernel_library.h"

namespace swacompile {

struct LoadedKernel {
  Kernel kernel;
  const KernelLibrary* library;
};

// The kernel for these sizes, best instruction set first. Asks the handler of missing kernels where none is loaded.
// Throws std::runtime_error, saying what is missing and what to do. The reference stays valid.
const LoadedKernel& find_kernel(DLDataType type, int64_t head_size, int64_t value_size);

}  // namespace swacompile
