// The kernels that were linked in.
#pragma once

#include <tvm/ffi/c_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "ort_abi.h"

namespace swacompile {

using KernelFunction = int (*)(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result);

struct Kernel {
  ElementType type;
  int64_t head_size;
  int64_t value_size;
  const char* instruction_set;
  KernelFunction function;
};

// Written by ort_library.py for each library. Of kernels that differ only in the instruction set, the best comes first.
extern const Kernel kernel_list[];
extern const size_t kernel_count;
extern const char library_version[];

std::string text_of(ElementType type);

// The best kernel that this CPU runs. Throws Error, saying what is missing and what to do.
const Kernel& find_kernel(ElementType type, int64_t head_size, int64_t value_size);

// Throws Error if no head size at all would do.
void require_kernels(ElementType type);

}  // namespace swacompile
