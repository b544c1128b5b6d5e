#include "kernels.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <deque>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>

#include "instruction_sets.h"

#define SWACOMPILE_EXPORT extern "C" __attribute__((visibility("default")))

namespace swacompile {
namespace {

constexpr size_t longest_message = 2048;

// Loads a library with the kernel. 0 = done; else `message` says what went wrong.
using MissingHandler = int (*)(int code, int bits, int64_t head_size, int64_t value_size, char* message, size_t size);

std::shared_mutex& mutex = *new std::shared_mutex;
std::deque<LoadedKernel>& loaded = *new std::deque<LoadedKernel>;  // grows at the end only: references stay valid
std::atomic<MissingHandler> on_missing{nullptr};

std::string text_of(DLDataType type) {
  return (type.code == kDLBfloat ? "bfloat" : "float") + std::to_string(type.bits);
}

const LoadedKernel* search(DLDataType type, int64_t head_size, int64_t value_size) {
  const std::shared_lock<std::shared_mutex> lock(mutex);
  for (const LoadedKernel& entry : loaded) {
    const Kernel& kernel = entry.kernel;
    const bool same_type = kernel.type.code == type.code && kernel.type.bits == type.bits;
    if (same_type && kernel.head_size == head_size && kernel.value_size == value_size) return &entry;
  }
  return nullptr;
}

void add(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  using Entry = const KernelLibrary* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(handle, kernel_library_symbol));
  if (entry == nullptr) throw std::runtime_error(path + ": expected a kernel library of swacompile, found another library");
  const KernelLibrary* library = entry();
  if (library->version != kernel_library_version) {
    throw std::runtime_error(path + ": expected kernel library version " + std::to_string(kernel_library_version) +
                             ", found " + std::to_string(library->version) + ". Build it again");
  }
  const std::unique_lock<std::shared_mutex> lock(mutex);
  size_t usable = 0;
  for (size_t i = 0; i < library->count; ++i) {
    if (supports(library->kernels[i].instruction_set) != Support::Yes) continue;
    loaded.push_back({library->kernels[i], library});
    ++usable;
  }
  if (usable == 0 && library->count > 0) {
    throw std::runtime_error(path + ": built for " + std::string(library->kernels[0].instruction_set) +
                             ", but this CPU runs " + supported_here() + ". Build it for this machine");
  }
}

// The kernel library of the compiled folder that this library lies in, for programs that load nothing else. False = there is none.
bool add_from_own_folder() {
  Dl_info own;
  if (dladdr(reinterpret_cast<const void*>(&add_from_own_folder), &own) == 0) return false;
  const std::string path = own.dli_fname, beside = path.substr(0, path.rfind('/') + 1) + "libswacompile_kernels.so";
  if (access(beside.c_str(), R_OK) != 0) return false;
  add(beside);
  return true;
}

}  // namespace

const LoadedKernel& find_kernel(DLDataType type, int64_t head_size, int64_t value_size) {
  if (const LoadedKernel* found = search(type, head_size, value_size)) return *found;
  const std::string wanted = "no kernel for " + text_of(type) + " with head sizes D=" + std::to_string(head_size) +
                             ", V=" + std::to_string(value_size);
  const MissingHandler handler = on_missing;
  if (handler == nullptr) {
    static const bool added = add_from_own_folder();
    if (const LoadedKernel* found = added ? search(type, head_size, value_size) : nullptr) return *found;
    throw std::runtime_error(wanted + " is loaded: load this library from a folder that swacompile compile wrote for this model, or a " +
                             "kernel library with swacompile_torch_add_kernels");
  }
  char message[longest_message] = "";
  if (handler(type.code, type.bits, head_size, value_size, message, sizeof message) != 0) {
    throw std::runtime_error(wanted + ": " + message);
  }
  if (const LoadedKernel* found = search(type, head_size, value_size)) return *found;
  throw std::runtime_error(wanted + ": the library that was built for it does not hold it");
}

}  // namespace swacompile

// Loads a kernel library. 0 = done; else `message`, of `size` bytes, says what went wrong.
SWACOMPILE_EXPORT int swacompile_torch_add_kernels(const char* path, char* message, size_t size) {
  try {
    swacompile::add(path);
    return 0;
  } catch (const std::exception& error) {
    snprintf(message, size, "%s", error.what());
    return 1;
  }
}

// Whom to ask for a kernel that is not loaded; null = nobody.
SWACOMPILE_EXPORT void swacompile_torch_on_missing(swacompile::MissingHandler handler) { swacompile::on_missing = handler; }
