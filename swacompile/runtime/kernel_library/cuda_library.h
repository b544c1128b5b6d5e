// The C interface of a library of CUDA kernels: a table of TVM's functions in it, for hosts without Python.
// TVM loads the library, which gives the functions their device code; docs/cuda_kernels.md has their arguments.
#pragma once

#include <tvm/ffi/c_api.h>

#include <cstddef>
#include <cstdint>

namespace swacompile {

constexpr uint32_t cuda_library_version = 1;
constexpr char cuda_library_symbol[] = "swacompile_cuda_library";

using CudaFunction = int (*)(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result);

// Bits in the order of the fields of swacompile.schedules.cuda.spec.Features.
namespace feature {
constexpr uint32_t sinks = 1, softcap = 2, key_padding = 4, segments = 8, bias = 16, alibi = 32, chunked = 64, zeroed = 128,
                   lse = 256, split = 512;
}

struct CudaKernel {
  DLDataType type;
  int64_t head_size, value_size;
  uint32_t features;
  int32_t positions;      // query positions of one tile
  int32_t keys_per_tile;
  int32_t pack;           // query heads of one tile
  int32_t blocks_per_sm;
  CudaFunction launch;
  CudaFunction describe;    // null where the kernel takes tensors and no tensor maps
  CudaFunction combine;     // null unless split
  CudaFunction sum_values;  // null unless zeroed
};

struct CudaLibrary {
  uint32_t version;
  int32_t major, minor;  // of the compute capability that the code is for
  bool exact;            // it runs on no later minor version
  const CudaKernel* kernels;
  size_t count;
};

}  // namespace swacompile
