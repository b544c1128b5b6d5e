// Runs a compiled model from C++ and shows that the library's kernels ran.
//
//     c++ -std=c++17 -O2 main.cc -o host -ldl
//     ./host libonnxruntime.so.1.32.0 compiled_folder 512
//
// With ONNX Runtime's headers this is three lines (docs/ort_library.md). Python wheels ship the library without headers,
// so this program calls the C API by its slot numbers, which never change.
#include <dlfcn.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

namespace {

struct Base {
  void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum Slot {
  GetErrorMessage = 2, CreateEnv = 3, CreateSession = 7, Run = 9, CreateSessionOptions = 10, SessionGetInputCount = 30,
  SessionGetOutputCount = 31, SessionGetInputTypeInfo = 33, SessionGetInputName = 36, SessionGetOutputName = 37,
  CreateTensorWithDataAsOrtValue = 49, GetTensorMutableData = 51, CastTypeInfoToTensorInfo = 55, GetTensorElementType = 60,
  GetDimensionsCount = 61, GetDimensions = 62, GetTensorShapeElementCount = 64, GetTensorTypeAndShape = 65,
  CreateCpuMemoryInfo = 69, GetAllocatorWithDefaultOptions = 78, RegisterCustomOpsLibrary_V2 = 228,
};

enum ElementType { Float = 1, Int64 = 7, Bool = 9 };

void* const* api;

[[noreturn]] void stop(const std::string& message) {
  fprintf(stderr, "%s\n", message.c_str());
  exit(1);
}

// Every call here gives null, or a status that holds a message.
template <class... Arguments>
void call(Slot slot, Arguments... arguments) {
  const void* status = reinterpret_cast<void* (*)(Arguments...)>(api[slot])(arguments...);
  if (status) stop(reinterpret_cast<const char* (*)(const void*)>(api[GetErrorMessage])(status));
}

void* open_library(const std::string& path) {
  if (void* handle = dlopen(path.c_str(), RTLD_NOW)) return handle;
  stop(dlerror());
}

struct Input {
  std::string name;
  int type = 0;
  std::vector<int64_t> shape;
  std::vector<char> data;
};

// Deterministic contents. Open sizes: 1 for the first axis, `length` for the others.
Input make_input(void* session, size_t index, void* allocator, int64_t length) {
  Input input;
  char* name;
  void *type, *info;
  size_t rank;
  call(SessionGetInputName, session, index, allocator, &name);
  call(SessionGetInputTypeInfo, session, index, &type);
  call(CastTypeInfoToTensorInfo, type, &info);
  call(GetTensorElementType, info, &input.type);
  call(GetDimensionsCount, info, &rank);
  input.name = name;
  input.shape.resize(rank);
  call(GetDimensions, info, input.shape.data(), rank);
  for (size_t axis = 0; axis < rank; ++axis) {
    if (input.shape[axis] < 0) input.shape[axis] = axis == 0 ? 1 : length;
  }
  const int64_t count = std::accumulate(input.shape.begin(), input.shape.end(), int64_t{1}, std::multiplies<>());
  const int64_t bytes = input.type == Int64 ? 8 : input.type == Float ? 4 : 1;
  input.data.resize(static_cast<size_t>(count * bytes));
  for (int64_t i = 0; i < count; ++i) {
    char* place = input.data.data() + i * bytes;
    if (input.type == Float) *reinterpret_cast<float*>(place) = static_cast<float>(i * 37 % 101) / 50.5f - 1;
    else if (input.type == Int64) *reinterpret_cast<int64_t*>(place) = i * 37 % 101;
    else if (input.type == Bool) *place = 1;
    else stop("input " + input.name + ": expected float32, int64 or bool");
  }
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) stop("usage: host LIBONNXRUNTIME COMPILED_FOLDER LENGTH");
  const std::string folder = argv[2], library = folder + "/libswacompile_ort.so", model = folder + "/model.onnx";
  const auto base = reinterpret_cast<const Base* (*)()>(dlsym(open_library(argv[1]), "OrtGetApiBase"))();
  api = base->GetApi(17);

  // The three lines: options, the library, the session.
  void *env, *options, *session;
  call(CreateEnv, 3, "host", &env);
  call(CreateSessionOptions, &options);
  call(RegisterCustomOpsLibrary_V2, options, library.c_str());
  call(CreateSession, env, model.c_str(), options, &session);

  void *allocator, *memory;
  size_t input_count, output_count;
  call(GetAllocatorWithDefaultOptions, &allocator);
  call(CreateCpuMemoryInfo, 0, 0, &memory);
  call(SessionGetInputCount, session, &input_count);
  call(SessionGetOutputCount, session, &output_count);
  std::vector<Input> inputs;
  for (size_t i = 0; i < input_count; ++i) inputs.push_back(make_input(session, i, allocator, atoll(argv[3])));
  std::vector<const char*> input_names, output_names(output_count);
  std::vector<void*> values(input_count), outputs(output_count);
  for (size_t i = 0; i < input_count; ++i) {
    Input& input = inputs[i];
    input_names.push_back(input.name.c_str());
    call(CreateTensorWithDataAsOrtValue, memory, input.data.data(), input.data.size(), input.shape.data(),
         input.shape.size(), input.type, &values[i]);
  }
  for (size_t i = 0; i < output_count; ++i) call(SessionGetOutputName, session, i, allocator, &output_names[i]);

  const auto start = std::chrono::steady_clock::now();
  call(Run, session, static_cast<void*>(nullptr), input_names.data(), values.data(), input_count, output_names.data(),
       output_count, outputs.data());
  const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;

  void* info;
  size_t count;
  float* numbers;
  call(GetTensorTypeAndShape, outputs[0], &info);
  call(GetTensorShapeElementCount, info, &count);
  call(GetTensorMutableData, outputs[0], &numbers);
  const auto calls = reinterpret_cast<uint64_t (*)()>(dlsym(open_library(library), "swacompile_call_count"))();
  printf("ONNX Runtime %s, %.2f ms, %s sums to %.6f, kernel calls %llu\n", base->GetVersionString(), taken.count(),
         output_names[0], std::accumulate(numbers, numbers + count, 0.0), static_cast<unsigned long long>(calls));
}
