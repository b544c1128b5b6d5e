#include "kernels.h"

#include "instruction_sets.h"
#include "ort.h"

namespace swacompile {
namespace {

std::string text_of(const Kernel& kernel) {
  return text_of(kernel.type) + " D=" + std::to_string(kernel.head_size) + " V=" + std::to_string(kernel.value_size) +
         " (" + kernel.instruction_set + ")";
}

[[noreturn]] void report_missing(const std::string& wanted) {
  std::string built_for;
  for (size_t i = 0; i < kernel_count; ++i) built_for += (i ? ", " : "") + text_of(kernel_list[i]);
  throw Error("no kernel for " + wanted + " on this CPU, which runs " + supported_here() +
              "; this library was built for " + (built_for.empty() ? "nothing" : built_for) +
              ". Compile the model again, on or for this machine");
}

}  // namespace

std::string text_of(ElementType type) {
  switch (type) {
    case ElementType::Float32: return "float32";
    case ElementType::Float16: return "float16";
    case ElementType::BFloat16: return "bfloat16";
    case ElementType::Bool: return "bool";
    case ElementType::Int64: return "int64";
    default: return "element type " + std::to_string(static_cast<int>(type));
  }
}

const Kernel& find_kernel(ElementType type, int64_t head_size, int64_t value_size) {
  for (size_t i = 0; i < kernel_count; ++i) {
    const Kernel& kernel = kernel_list[i];
    if (kernel.type == type && kernel.head_size == head_size && kernel.value_size == value_size &&
        supports(kernel.instruction_set) == Support::Yes) {
      return kernel;
    }
  }
  report_missing(text_of(type) + " with head sizes D=" + std::to_string(head_size) + ", V=" + std::to_string(value_size));
}

void require_kernels(ElementType type) {
  for (size_t i = 0; i < kernel_count; ++i) {
    if (kernel_list[i].type == type && supports(kernel_list[i].instruction_set) == Support::Yes) return;
  }
  report_missing(text_of(type));
}

}  // namespace swacompile
