// What a launch needs of CUDA and of TVM's runtime. Both are opened when the first CUDA kernel library is: the operator itself is
// linked with neither, so that one source serves every build of torch.
#pragma once

#include <tvm/ffi/c_api.h>

#include <cstdint>
#include <string>

#include "cuda_library.h"

namespace swacompile {

struct Gpu {
  int multiprocessors, l2_bytes, major, minor;
};

// Throws std::runtime_error where there is no such GPU or no driver.
const Gpu& gpu(int index);

// torch's current stream on a GPU, a cudaStream_t. Throws std::runtime_error where torch was built without CUDA.
void* current_stream(int index);

// Loads TVM's runtime, from `folder` where the process does not have it yet; null = it must have it. Throws std::runtime_error.
void load_tvm_runtime(const char* folder);

// Opens a kernel library with TVM, for good, and gives its table. load_tvm_runtime first. Throws std::runtime_error.
const CudaLibrary& open_cuda_library(const std::string& path);

// Calls a function of a kernel library. Throws std::runtime_error with TVM's message where it fails.
void call(CudaFunction function, const TVMFFIAny* arguments, int32_t count);

// While alive, TVM launches on this stream from this thread.
class LaunchStream {
 public:
  LaunchStream(int gpu_index, void* stream);
  ~LaunchStream();
  LaunchStream(const LaunchStream&) = delete;
  LaunchStream& operator=(const LaunchStream&) = delete;

 private:
  int index_;
  void* before_ = nullptr;
};

}  // namespace swacompile
