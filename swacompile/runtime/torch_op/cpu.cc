// The CPU kernel of the operator: torch tensors go in place to a TVM-made kernel, on torch's own threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "op.h"

#define SWACOMPILE_EXPORT extern "C" __attribute__((visibility("default")))

namespace swacompile {
namespace {

constexpr int32_t argument_count = 16;
constexpr int tasks_per_thread = 4;                     // so that a thread that is held up does not hold up the rest
constexpr double multiplications_worth_a_thread = 2e5;  // some 10 us of work; waking a thread costs about as much

std::atomic<uint64_t> calls{0};

// The argument array of one kernel call (docs/operator.md, CPU kernel ABI); points into itself and keeps the tensors.
class Arguments {
 public:
  Arguments(const Operands& is, const at::Tensor& output, const Options& with) {
    const auto type = is.query.scalar_type();
    add_rows(is.query);
    add_rows(is.key);
    add_rows(is.value);
    add_packed(is.key_padding, at::kBool, 2);
    add_packed(is.segments, at::kLong, 2);
    add_packed(is.sinks, type, 1);
    add_optional(expanded_bias(is), type, 4);
    add_packed(is.alibi_slopes, at::kFloat, 1);
    add_tensor(output);
    add_int(side(with.left));
    add_int(side(with.right));
    add_int(offset_of(is, with));
    add_int(with.chunk_size);
    add_int(with.zeroed);
    add_float(with.scale);
    add_float(with.softcap);
  }
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  const TVMFFIAny* data() const { return arguments_; }

 private:
  static OptionalTensor expanded_bias(const Operands& is) {
    if (!is.bias.has_value()) return std::nullopt;
    const at::Tensor& bias = *is.bias;
    return (bias.stride(3) == 1 ? bias : bias.contiguous()).expand({is.query.size(0), is.query.size(1), is.query.size(2), is.key.size(2)});
  }

  // Kernels read vectors along the last axis; anything else about strides they take as it is.
  void add_rows(const at::Tensor& tensor) { add_tensor(tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : tensor.contiguous()); }

  void add_packed(const OptionalTensor& tensor, at::ScalarType type, int rank) {
    add_optional(tensor.has_value() ? OptionalTensor(tensor->contiguous()) : tensor, type, rank);
  }

  void add_optional(const OptionalTensor& tensor, at::ScalarType type, int rank) {
    if (tensor.has_value()) return add_tensor(*tensor);
    static constexpr int64_t zeros[4] = {0, 0, 0, 0}, ones[4] = {1, 1, 1, 1};
    static int64_t nothing = 0;  // absent operands need an address
    add_view(&nothing, type, rank, zeros, ones);
  }

  void add_tensor(const at::Tensor& tensor) {
    at::Tensor& kept = kept_[used_];
    kept = tensor;
    static int64_t nothing = 0;
    void* data = kept.numel() > 0 ? kept.data_ptr() : &nothing;
    add_view(data, kept.scalar_type(), static_cast<int>(kept.dim()), kept.sizes().data(), kept.strides().data());
    if (kept.dim() == 4 && kept.size(3) == 1) fix_stride(kept);
  }

  // torch leaves the stride of an axis of one element open.
  void fix_stride(const at::Tensor& tensor) {
    std::copy(tensor.strides().begin(), tensor.strides().end(), strides_[used_ - 1]);
    strides_[used_ - 1][3] = 1;
    tensors_[used_ - 1].strides = strides_[used_ - 1];
  }

  void add_view(void* data, at::ScalarType type, int rank, const int64_t* sizes, const int64_t* strides) {
    DLTensor& view = tensors_[used_];
    view = {data, {kDLCPU, 0}, rank, dl_type(type), const_cast<int64_t*>(sizes), const_cast<int64_t*>(strides), 0};
    arguments_[used_].type_index = kTVMFFIDLTensorPtr;
    arguments_[used_++].v_ptr = &view;
  }

  void add_int(int64_t value) {
    arguments_[used_].type_index = kTVMFFIInt;
    arguments_[used_++].v_int64 = value;
  }

  void add_float(double value) {
    arguments_[used_].type_index = kTVMFFIFloat;
    arguments_[used_++].v_float64 = value;
  }

  int used_ = 0;
  TVMFFIAny arguments_[argument_count] = {};
  DLTensor tensors_[9] = {};
  at::Tensor kept_[9];
  int64_t strides_[9][4] = {};
};

struct Loop {
  void (*task)(void* user, size_t i);
  size_t count;
  void* user;
  std::atomic<size_t> next{0};
};

// As many tasks as are left for whoever comes: torch cuts a loop into one equal piece a thread.
void run_on_torch_threads(const void*, void (*task)(void* user, size_t i), size_t count, void* user) {
  Loop loop{task, count, user};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(count));
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i = loop.next++; i < loop.count; i = loop.next++) loop.task(loop.user, i);
  });
}

int choose_tasks(const Operands& is, const Options& with) {
  const int threads = at::get_num_threads();
  if (threads == 1 || at::in_parallel_region()) return 1;
  const double visible = static_cast<double>(std::min(is.key.size(2), side(with.left) + side(with.right) + 1));
  const double rows = static_cast<double>(is.query.size(0) * is.query.size(1)) * static_cast<double>(is.query.size(2));
  const double work = rows * visible * static_cast<double>(is.query.size(3) + is.value.size(3));
  return static_cast<int>(std::clamp(work / multiplications_worth_a_thread, 1.0, static_cast<double>(tasks_per_thread * threads)));
}

at::Tensor forward_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptionalTensor& key_padding,
    const OptionalTensor& segments, const OptionalTensor& sinks, const OptionalTensor& bias, const OptionalTensor& alibi_slopes,
    const OptionalTensor& offset, double scale, double softcap, int64_t left, int64_t right, bool bottom_right,
    int64_t chunk_size, bool zeroed, bool bshd_output) {
  const Operands is{query, key, value, key_padding, segments, sinks, bias, alibi_slopes, offset};
  const Options with{scale, softcap, left, right, bottom_right, chunk_size, zeroed, bshd_output};
  check(is, with);
  at::Tensor output = empty_output(is, with);
  if (output.numel() == 0) return output;
  if (key.size(2) == 0) return output.zero_();
  const LoadedKernel& found = find_kernel(dl_type(query.scalar_type()), query.size(3), value.size(3));
  const Arguments arguments(is, output, with);
  const ParallelFor threads{run_on_torch_threads, nullptr};
  const int status = found.library->call(found.kernel.function, arguments.data(), argument_count, &threads, choose_tasks(is, with));
  TORCH_CHECK(status == 0, "swacompile::banded_attention: the kernel failed: ", found.library->last_error());
  calls.fetch_add(1, std::memory_order_relaxed);
  return output;
}

}  // namespace
}  // namespace swacompile

TORCH_LIBRARY_IMPL(swacompile, CPU, library) { library.impl("banded_attention", swacompile::forward_cpu); }

// How many times a kernel has run in this process: the proof that it did.
SWACOMPILE_EXPORT uint64_t swacompile_torch_call_count() { return swacompile::calls; }
