// The CUDA kernels that were loaded into this process, and which one serves a call.
#pragma once

#include "cuda_library.h"
#include "cuda_runtime.h"

namespace swacompile {

// What a kernel must be, and what helps to choose its tiles where it has to be built.
struct CudaNeed {
  DLDataType type;
  int64_t head_size, value_size;
  uint32_t features;
  int64_t group;  // query heads of one key head
  int64_t band;   // keys that a query sees at most, -1 = unbounded
};

// The kernel with exactly these features that runs on `gpu`, null where none is loaded. Stays valid.
const CudaKernel* loaded_cuda_kernel(const CudaNeed& need, const Gpu& gpu);

// The same; asks the handler of missing kernels. Throws std::runtime_error, saying what is missing and what to do.
const CudaKernel& find_cuda_kernel(const CudaNeed& need, const Gpu& gpu);

}  // namespace swacompile
