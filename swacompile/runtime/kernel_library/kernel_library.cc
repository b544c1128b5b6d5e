#include "kernel_library.h"

namespace swacompile {

// Written by kernel_library.py for each library.
extern const Kernel kernel_list[];
extern const size_t kernel_count;

namespace {

int call(KernelFunction function, const TVMFFIAny* arguments, int32_t count, const ParallelFor* host, int tasks) {
  const ParallelScope scope(*host, tasks);
  TVMFFIAny result{};
  return function(nullptr, arguments, count, &result);
}

const char* last_error() {
  static thread_local char text[512];
  const std::string error = last_kernel_error();
  text[error.copy(text, sizeof text - 1)] = '\0';
  return text;
}

}  // namespace
}  // namespace swacompile

__attribute__((visibility("default"))) const swacompile::KernelLibrary* swacompile_kernel_library() {
  using namespace swacompile;
  static const KernelLibrary library = [] {
    install_tvm_host();
    return KernelLibrary{kernel_library_version, kernel_list, kernel_count, call, last_error};
  }();
  return &library;
}
