// Runs a rewritten program that AOTInductor packaged, without Python, and shows that the banded kernels ran.
//
//     host compiled_folder package.pt2 inputs.pt outputs.pt
//
// compiled_folder is what `swacompile compile model.pt2 -o compiled_folder` wrote; the package, the program in it:
//
//     program = swacompile.load("compiled_folder").program
//     torch._inductor.aoti_compile_and_package(program, package_path="package.pt2")
//
// inputs.pt is a list of tensors that torch.save wrote; outputs.pt is a tuple of tensors for torch.load.
// The one thing that such a program must do is load libswacompile_torch.so from the compiled folder before the package: that registers
// the operator, which takes its kernels from libswacompile_kernels.so or, on a GPU, libswacompile_cuda_*.so beside it.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void* load_operator(const std::string& folder) {
  const std::string path = folder + "/libswacompile_torch.so";
  if (void* handle = dlopen(path.c_str(), RTLD_NOW)) return handle;
  throw std::runtime_error(dlerror());
}

std::vector<at::Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : list.toListRef()) tensors.push_back(value.toTensor());
  return tensors;
}

void write_tensors(const std::string& path, const std::vector<at::Tensor>& tensors) {
  const auto tuple = c10::ivalue::Tuple::create(std::vector<c10::IValue>(tensors.begin(), tensors.end()));
  const std::vector<char> bytes = torch::jit::pickle_save(tuple);
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

std::vector<at::Tensor> on(const std::string& device, std::vector<at::Tensor> tensors) {
  for (at::Tensor& tensor : tensors) tensor = tensor.to(at::Device(device));
  return tensors;
}

void run(const std::string& folder, const std::string& package, const std::string& inputs, const std::string& outputs) {
  void* const library = load_operator(folder);
  torch::inductor::AOTIModelPackageLoader model(package);
  const std::string device = model.get_metadata().at("AOTI_DEVICE_KEY");
  const std::vector<at::Tensor> given = on(device, read_tensors(inputs));

  const auto start = std::chrono::steady_clock::now();
  const std::vector<at::Tensor> found = on("cpu", model.run(given));
  const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;

  write_tensors(outputs, found);
  const std::string counter = device == "cpu" ? "swacompile_torch_call_count" : "swacompile_torch_cuda_call_count";
  const auto calls = reinterpret_cast<uint64_t (*)()>(dlsym(library, counter.c_str()));
  printf("%zu outputs, %.2f ms, kernel calls %llu\n", found.size(), taken.count(), static_cast<unsigned long long>(calls()));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    fprintf(stderr, "usage: host COMPILED_FOLDER PACKAGE INPUTS OUTPUTS\n");
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3], argv[4]);
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
