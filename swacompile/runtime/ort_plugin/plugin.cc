// swacompile::BandedAttention for ONNX Runtime's CPU execution provider: ORT tensors go in place to a TVM-made kernel.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "instruction_sets.h"
#include "kernels.h"
#include "operands.h"
#include "ort.h"
#include "tvm_host.h"

#define SWACOMPILE_EXPORT extern "C" __attribute__((visibility("default")))

namespace swacompile {
namespace {

constexpr size_t input_count = 9, required_inputs = 3;
constexpr int tasks_per_core = 4;                        // so that a core that is held up does not hold up the rest
constexpr double multiplications_worth_a_thread = 2e5;  // some 10 us of work; waking a thread costs about as much

std::atomic<uint64_t> calls{0};

// Independent of the load and of the session, so that a kernel's work is always cut alike.
int choose_tasks(const Operands& operands, const Attributes& attributes) {
  static const int most = tasks_per_core * static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const Sizes& sizes = operands.sizes;
  const double rows = static_cast<double>(sizes.batch) * static_cast<double>(sizes.heads) * static_cast<double>(sizes.queries);
  const double per_row =
      static_cast<double>(operands.visible_keys(attributes)) * static_cast<double>(sizes.head_size + sizes.value_size);
  return static_cast<int>(std::clamp(rows * per_row / multiplications_worth_a_thread, 1.0, static_cast<double>(most)));
}

void run_on_session_threads(const void* context, void (*task)(void* user, size_t i), size_t count, void* user) {
  static_cast<const Context*>(context)->parallel_for(task, count, user);
}

class Node {
 public:
  Node(const OrtApi* api, const OrtKernelInfo* info, ElementType type) : api_(api), type_(type) {
    const NodeInfo node(api, info);
    try {
      attributes_ = read_attributes(node);
      require_kernel(node);
    } catch (const Error& error) {
      throw Error("swacompile::BandedAttention, node '" + node.name() + "': " + error.what(), error.code);
    }
  }

  const OrtApi* api() const { return api_; }

  void compute(OrtKernelContext* ort_context) const {
    const Context context(api_, ort_context);
    const Operands operands = read_operands(context, type_, attributes_);
    const Tensor output = context.output(0, operands.output_shape());
    if (output.size() == 0) return;
    if (operands.sizes.keys == 0) {
      std::memset(output.data, 0, static_cast<size_t>(output.size()) * (type_ == ElementType::Float32 ? 4 : 2));
      return;
    }
    const Kernel& kernel = find_kernel(type_, operands.sizes.head_size, operands.sizes.value_size);
    const KernelArguments arguments(operands, output, attributes_);
    const ParallelScope scope({run_on_session_threads, &context}, choose_tasks(operands, attributes_));
    TVMFFIAny result{};
    const int status = kernel.function(nullptr, arguments.data(), KernelArguments::count, &result);
    if (status != 0) throw Error("the kernel failed: " + last_kernel_error(), OrtErrorCode::Fail);
    ++calls;
  }

 private:
  // At load where the model states its head sizes, else find_kernel reports at the first run.
  void require_kernel(const NodeInfo& node) const {
    const Shape query = node.input_shape(0), value = node.input_shape(2);
    const bool known = query.size() == 4 && value.size() == 4 && query[3] > 0 && value[3] > 0;
    if (known) {
      find_kernel(type_, query[3], value[3]);
    } else {
      require_kernels(type_);
    }
  }

  const OrtApi* api_;
  ElementType type_;
  Attributes attributes_{};
};

// ORT takes one OrtCustomOp for each T; they share the operator's name.
struct Op : OrtCustomOp {
  explicit Op(ElementType type);
  ElementType type;
};

int input_type(const OrtCustomOp* op, size_t index) {
  const ElementType t = static_cast<const Op*>(op)->type;
  const ElementType types[input_count] = {t, t, t, ElementType::Bool, ElementType::Int64, t, t, ElementType::Float32, ElementType::Int64};
  return static_cast<int>(types[index]);
}

OrtStatus* create_node(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** node) {
  return guarded(api, [&] { *node = new Node(api, info, static_cast<const Op*>(op)->type); });
}

OrtStatus* compute_node(void* node, OrtKernelContext* context) {
  const Node& self = *static_cast<const Node*>(node);
  return guarded(self.api(), [&] { self.compute(context); });
}

Op::Op(ElementType of_type) : OrtCustomOp{}, type(of_type) {
  version = ort_api_version;
  GetName = [](const OrtCustomOp*) { return "BandedAttention"; };
  GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  GetInputType = input_type;
  GetInputTypeCount = [](const OrtCustomOp*) { return input_count; };
  GetOutputType = [](const OrtCustomOp* op, size_t) { return static_cast<int>(static_cast<const Op*>(op)->type); };
  GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  GetInputCharacteristic = [](const OrtCustomOp*, size_t index) { return index < required_inputs ? 0 : 1; };
  GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  KernelDestroy = [](void* node) { delete static_cast<Node*>(node); };
  CreateKernelV2 = create_node;
  KernelComputeV2 = compute_node;
  // No shape inference: ORT 1.19 to 1.22 crash in it where a node omits an input before one that it gives. Models state the
  // output's shape in value_info instead.
  InferOutputShapeFn = nullptr;
  GetStartVersion = [](const OrtCustomOp*) { return 1; };
  GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
}

// One domain for each copy of ORT in the process. ORT keeps pointers to it, so it lives as long as the library.
OrtCustomOpDomain* domain_of(const OrtApi* api) {
  static std::mutex mutex;
  static auto& domains = *new std::map<const OrtApi*, OrtCustomOpDomain*>;
  static const Op ops[] = {Op(ElementType::Float32), Op(ElementType::Float16), Op(ElementType::BFloat16)};
  const std::lock_guard<std::mutex> lock(mutex);
  OrtCustomOpDomain*& domain = domains[api];
  if (domain != nullptr) return domain;
  OrtCustomOpDomain* made = nullptr;
  check(api, invoke(api, Slot::CreateCustomOpDomain, static_cast<const char*>("swacompile"), &made));
  for (const Op& op : ops) check(api, invoke(api, Slot::CustomOpDomain_Add, made, static_cast<const OrtCustomOp*>(&op)));
  return domain = made;
}

}  // namespace
}  // namespace swacompile

SWACOMPILE_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace swacompile;
  const OrtApi* api = base->GetApi(ort_api_version);
  if (api == nullptr) {
    const std::string text = "swacompile needs ONNX Runtime 1.17 or newer, found " + std::string(base->GetVersionString());
    return invoke(base->GetApi(1), Slot::CreateStatus, static_cast<int>(OrtErrorCode::Fail), text.c_str());
  }
  install_tvm_host();
  return guarded(api, [&] { check(api, invoke(api, Slot::AddCustomOpDomain, options, domain_of(api))); });
}

// How many times a kernel has run in this process: the proof that it did.
SWACOMPILE_EXPORT uint64_t swacompile_call_count() { return swacompile::calls; }

SWACOMPILE_EXPORT const char* swacompile_version() { return swacompile::library_version; }

// 1: this CPU runs code of that target; 0: it does not; -1: the name is unknown.
SWACOMPILE_EXPORT int swacompile_supports(const char* target) { return static_cast<int>(swacompile::supports(target)); }
