#include "cuda_kernels.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>

#define SWACOMPILE_EXPORT extern "C" __attribute__((visibility("default")))

namespace swacompile {
namespace {

constexpr size_t longest_message = 2048;

// Loads a library with the kernel. 0 = done; else `message` says what went wrong.
using MissingCudaHandler = int (*)(const CudaNeed* need, int major, int minor, char* message, size_t size);

std::shared_mutex& mutex = *new std::shared_mutex;
std::deque<const CudaLibrary*>& libraries = *new std::deque<const CudaLibrary*>;
std::atomic<MissingCudaHandler> on_missing{nullptr};

bool runs_on(const CudaLibrary& library, const Gpu& gpu) {
  return gpu.major == library.major && (library.exact ? gpu.minor == library.minor : gpu.minor >= library.minor);
}

bool is_wanted(const CudaKernel& kernel, const CudaNeed& need) {
  return kernel.type.code == need.type.code && kernel.type.bits == need.type.bits && kernel.head_size == need.head_size &&
         kernel.value_size == need.value_size && kernel.features == need.features;
}

std::string text_of(const CudaNeed& need, const Gpu& gpu) {
  static constexpr const char* names[] = {"sinks", "softcap", "key_padding", "segments", "bias",
                                          "alibi", "chunked", "zeroed",      "lse",      "split"};
  std::string features;
  for (size_t bit = 0; bit < std::size(names); ++bit) {
    if (need.features >> bit & 1) features += (features.empty() ? " with " : ", ") + std::string(names[bit]);
  }
  return "no CUDA kernel for " + std::string(need.type.code == kDLBfloat ? "bfloat" : "float") + std::to_string(need.type.bits) +
         ", head sizes D=" + std::to_string(need.head_size) + ", V=" + std::to_string(need.value_size) + features + " on sm_" +
         std::to_string(gpu.major) + std::to_string(gpu.minor);
}

void add(const char* path, const char* runtime_folder) {
  load_tvm_runtime(runtime_folder);
  const CudaLibrary& library = open_cuda_library(path);
  const std::unique_lock<std::shared_mutex> lock(mutex);
  libraries.push_front(&library);  // what was loaded last serves first
}

// The libraries of the compiled folder that this one lies in, for programs that load nothing else. False = there are none.
bool add_from_own_folder() {
  Dl_info own;
  if (dladdr(reinterpret_cast<const void*>(&add_from_own_folder), &own) == 0) return false;
  const std::filesystem::path folder = std::filesystem::absolute(own.dli_fname).parent_path();
  bool added = false;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("libswacompile_cuda_") || !name.ends_with(".so")) continue;
    add(entry.path().c_str(), folder.c_str());
    added = true;
  }
  return added;
}

}  // namespace

const CudaKernel* loaded_cuda_kernel(const CudaNeed& need, const Gpu& gpu) {
  const std::shared_lock<std::shared_mutex> lock(mutex);
  for (const CudaLibrary* library : libraries) {
    if (!runs_on(*library, gpu)) continue;
    for (size_t i = 0; i < library->count; ++i) {
      if (is_wanted(library->kernels[i], need)) return &library->kernels[i];
    }
  }
  return nullptr;
}

const CudaKernel& find_cuda_kernel(const CudaNeed& need, const Gpu& gpu) {
  if (const CudaKernel* found = loaded_cuda_kernel(need, gpu)) return *found;
  const MissingCudaHandler handler = on_missing;
  if (handler == nullptr) {
    static const bool added = add_from_own_folder();
    if (const CudaKernel* found = added ? loaded_cuda_kernel(need, gpu) : nullptr) return *found;
    throw std::runtime_error(text_of(need, gpu) + " is loaded: load this library from a folder that swacompile compile wrote for this " +
                             "model and GPU, or a library of kernels with swacompile_torch_add_cuda_kernels");
  }
  char message[longest_message] = "";
  if (handler(&need, gpu.major, gpu.minor, message, sizeof message) != 0) {
    throw std::runtime_error(text_of(need, gpu) + ": " + message);
  }
  if (const CudaKernel* found = loaded_cuda_kernel(need, gpu)) return *found;
  throw std::runtime_error(text_of(need, gpu) + ": the library that was built for it does not hold it");
}

}  // namespace swacompile

// Loads a library of CUDA kernels. TVM's runtime libraries come from `runtime_folder` where the process has none; null = it has.
// 0 = done; else `message`, of `size` bytes, says what went wrong.
SWACOMPILE_EXPORT int swacompile_torch_add_cuda_kernels(const char* path, const char* runtime_folder, char* message, size_t size) {
  try {
    swacompile::add(path, runtime_folder);
    return 0;
  } catch (const std::exception& error) {
    snprintf(message, size, "%s", error.what());
    return 1;
  }
}

// Whom to ask for a CUDA kernel that is not loaded; null = nobody.
SWACOMPILE_EXPORT void swacompile_torch_on_missing_cuda(swacompile::MissingCudaHandler handler) { swacompile::on_missing = handler; }
