#include "cuda_runtime.h"

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstring>
#include <mutex>
#include <stdexcept>

namespace swacompile {
namespace {

constexpr int most_gpus = 64;
// CUdevice_attribute.
constexpr int multiprocessor_count = 16, l2_cache_size = 38, capability_major = 75, capability_minor = 76;
// Each needs those before it.
constexpr const char* runtime_libraries[] = {"libcudart.so.13", "libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_cuda.so"};

template <class Function>
Function* symbol(void* library, const char* library_name, const char* name) {
  void* found = dlsym(library, name);
  if (found == nullptr) throw std::runtime_error(std::string(library_name) + " has no " + name);
  return reinterpret_cast<Function*>(found);
}

// The parts of libtvm_ffi's C interface that are used here.
struct Tvm {
  decltype(TVMFFIFunctionGetGlobal)* get_global;
  decltype(TVMFFIFunctionCall)* call_object;
  decltype(TVMFFIErrorMoveFromRaised)* take_error;
  decltype(TVMFFIObjectDecRef)* release;
  int (*set_stream)(int32_t type, int32_t index, void* stream, void** before);
};

std::mutex loading;
std::atomic<const Tvm*> loaded_tvm{nullptr};

const Tvm& tvm() {
  const Tvm* found = loaded_tvm.load(std::memory_order_acquire);
  if (found == nullptr) throw std::runtime_error("TVM's runtime is not loaded");
  return *found;
}

void* open_runtime(const char* name, const char* folder) {
  if (void* present = dlopen(name, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD)) return present;
  const std::string beside = folder == nullptr ? name : std::string(folder) + "/" + name;
  if (void* opened = dlopen(beside.c_str(), RTLD_NOW | RTLD_GLOBAL)) return opened;
  const std::string reason = dlerror();
  if (void* opened = dlopen(name, RTLD_NOW | RTLD_GLOBAL)) return opened;
  throw std::runtime_error("CUDA kernels need a GPU's driver, CUDA 13's runtime and TVM's runtime libraries: " + reason);
}

// Takes the error that TVM raised on this thread.
std::string error_text() {
  TVMFFIObjectHandle error = nullptr;
  tvm().take_error(&error);
  if (error == nullptr) return "unknown error";
  const TVMFFIErrorCell& cell = *TVMFFIErrorGetCellPtr(error);
  std::string text = std::string(cell.kind.data, cell.kind.size) + ": " + std::string(cell.message.data, cell.message.size);
  tvm().release(error);
  return text;
}

Gpu describe_gpu(int index) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (driver == nullptr) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
  const auto get_device = symbol<int(int*, int)>(driver, "libcuda.so.1", "cuDeviceGet");
  const auto get_attribute = symbol<int(int*, int, int)>(driver, "libcuda.so.1", "cuDeviceGetAttribute");
  Gpu found{};
  int device = 0;
  bool answers = get_device(&device, index) == 0;
  const auto read = [&](int attribute, int& value) { answers = answers && get_attribute(&value, attribute, device) == 0; };
  read(multiprocessor_count, found.multiprocessors);
  read(l2_cache_size, found.l2_bytes);
  read(capability_major, found.major);
  read(capability_minor, found.minor);
  if (!answers) throw std::runtime_error("GPU " + std::to_string(index) + " does not answer");
  return found;
}

}  // namespace

const Gpu& gpu(int index) {
  static std::array<std::once_flag, most_gpus> once;
  static std::array<Gpu, most_gpus> found;
  if (index < 0 || index >= most_gpus) throw std::runtime_error("expected a GPU from 0 to 63, found " + std::to_string(index));
  const size_t place = static_cast<size_t>(index);
  std::call_once(once[place], [&] { found[place] = describe_gpu(index); });
  return found[place];
}

void* current_stream(int index) {
  // A function of torch's stable C interface: its C++ one needs CUDA's headers.
  using Get = int(int32_t, void**);
  static Get* const get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) throw std::runtime_error("this torch is built without CUDA");
    return symbol<Get>(library, "libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
  }();
  void* stream = nullptr;
  if (get(index, &stream) != 0) throw std::runtime_error("torch does not tell the current stream of GPU " + std::to_string(index));
  return stream;
}

void load_tvm_runtime(const char* folder) {
  const std::lock_guard<std::mutex> lock(loading);
  if (loaded_tvm.load() != nullptr) return;
  void* ffi = nullptr;
  for (const char* name : runtime_libraries) {
    void* library = open_runtime(name, folder);
    if (std::strcmp(name, "libtvm_ffi.so") == 0) ffi = library;
  }
  constexpr char name[] = "libtvm_ffi.so";
  loaded_tvm = new Tvm{
      symbol<decltype(TVMFFIFunctionGetGlobal)>(ffi, name, "TVMFFIFunctionGetGlobal"),
      symbol<decltype(TVMFFIFunctionCall)>(ffi, name, "TVMFFIFunctionCall"),
      symbol<decltype(TVMFFIErrorMoveFromRaised)>(ffi, name, "TVMFFIErrorMoveFromRaised"),
      symbol<decltype(TVMFFIObjectDecRef)>(ffi, name, "TVMFFIObjectDecRef"),
      symbol<int(int32_t, int32_t, void*, void**)>(ffi, name, "TVMFFIEnvSetStream"),
  };
}

const CudaLibrary& open_cuda_library(const std::string& path) {
  constexpr char loader_name[] = "ffi.ModuleLoadFromFile";
  const TVMFFIByteArray global{loader_name, sizeof loader_name - 1};
  TVMFFIObjectHandle loader = nullptr;
  if (tvm().get_global(&global, &loader) != 0) throw std::runtime_error(error_text());
  if (loader == nullptr) throw std::runtime_error(std::string("libtvm_ffi.so has no ") + loader_name);
  TVMFFIAny argument{}, module{};
  argument.type_index = kTVMFFIRawStr;
  argument.v_c_str = path.c_str();
  // The module is never released: whoever asks for its kernels keeps pointers into it.
  const int status = tvm().call_object(loader, &argument, 1, &module);
  tvm().release(loader);
  if (status != 0) throw std::runtime_error(path + ": " + error_text());
  void* handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  using Entry = const CudaLibrary* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(handle, cuda_library_symbol));
  if (entry == nullptr) throw std::runtime_error(path + ": expected a library of CUDA kernels of swacompile, found another library");
  const CudaLibrary* library = entry();
  if (library->version != cuda_library_version) {
    throw std::runtime_error(path + ": expected CUDA library version " + std::to_string(cuda_library_version) + ", found " +
                             std::to_string(library->version) + ". Build it again");
  }
  return *library;
}

void call(CudaFunction function, const TVMFFIAny* arguments, int32_t count) {
  TVMFFIAny result{};
  if (function(nullptr, arguments, count, &result) != 0) throw std::runtime_error(error_text());
}

LaunchStream::LaunchStream(int gpu_index, void* stream) : index_(gpu_index) {
  if (tvm().set_stream(kDLCUDA, index_, stream, &before_) != 0) throw std::runtime_error(error_text());
}

LaunchStream::~LaunchStream() { tvm().set_stream(kDLCUDA, index_, before_, nullptr); }

}  // namespace swacompile
