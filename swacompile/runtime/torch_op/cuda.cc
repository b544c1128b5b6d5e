// The CUDA kernel of the operator: torch tensors go in place to TVM-made kernels, on torch's current stream.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <memory>

#include "cuda_kernels.h"
#include "op.h"

#define SWACOMPILE_EXPORT extern "C" __attribute__((visibility("default")))

namespace swacompile {
namespace {

constexpr char name[] = "swacompile::banded_attention";
constexpr int64_t longest = (int64_t{1} << 29) - 1;  // positions are 32-bit sums of three lengths
constexpr uintptr_t alignment = 16;                  // bytes, of the copies into shared memory
constexpr size_t map_bytes = 128;                    // sizeof(CUtensorMap)
constexpr int64_t l2_share = 2;                      // half of the L2 cache for keys and values; queries and outputs pass through the rest
constexpr int most_arguments = 24;

std::atomic<uint64_t> calls{0};

// Where a tensor lies. Words only, compared as they lie in memory.
struct Place {
  void* data = nullptr;
  int64_t sizes[4] = {}, strides[4] = {};
};

// A tensor as TVM's functions take it.
class View {
 public:
  View() = default;
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  void show(at::Tensor tensor, int gpu_index) {
    kept_ = std::move(tensor);
    place_.data = kept_.data_ptr();
    std::copy(kept_.sizes().begin(), kept_.sizes().end(), place_.sizes);
    std::copy(kept_.strides().begin(), kept_.strides().end(), place_.strides);
    const int rank = static_cast<int>(kept_.dim());
    // torch leaves the strides of axes of one element open; a tensor map needs multiples of 16 bytes there, too.
    for (int axis = 0; axis < rank; ++axis) {
      if (place_.sizes[axis] == 1) place_.strides[axis] = axis == rank - 1 ? 1 : place_.sizes[rank - 1];
    }
    view_ = {place_.data, {kDLCUDA, gpu_index}, rank, dl_type(kept_.scalar_type()), place_.sizes, place_.strides, 0};
  }

  // float32 in one piece; whoever calls keeps the memory.
  void show(float* data, at::IntArrayRef sizes, int gpu_index) {
    const int rank = static_cast<int>(sizes.size());
    place_.data = data;
    int64_t stride = 1;
    for (int axis = rank - 1; axis >= 0; --axis) {
      place_.sizes[axis] = sizes[axis];
      place_.strides[axis] = stride;
      stride *= sizes[axis];
    }
    view_ = {data, {kDLCUDA, gpu_index}, rank, dl_type(at::kFloat), place_.sizes, place_.strides, 0};
  }

  DLTensor* get() { return view_.shape != nullptr ? &view_ : nullptr; }
  const Place& place() const { return place_; }

 private:
  at::Tensor kept_;
  DLTensor view_{};
  Place place_;
};

// The arguments of one call of a TVM function.
class Arguments {
 public:
  Arguments& tensor(View& view) { return view.get() == nullptr ? none() : add(kTVMFFIDLTensorPtr, [&](TVMFFIAny& to) { to.v_ptr = view.get(); }); }
  Arguments& pointer(void* address) { return add(kTVMFFIOpaquePtr, [&](TVMFFIAny& to) { to.v_ptr = address; }); }
  Arguments& integer(int64_t value) { return add(kTVMFFIInt, [&](TVMFFIAny& to) { to.v_int64 = value; }); }
  Arguments& real(double value) { return add(kTVMFFIFloat, [&](TVMFFIAny& to) { to.v_float64 = value; }); }
  Arguments& none() { return add(kTVMFFINone, [](TVMFFIAny&) {}); }

  void call(CudaFunction function) const { swacompile::call(function, values_, count_); }

 private:
  template <class Fill>
  Arguments& add(int32_t type, Fill fill) {
    values_[count_].type_index = type;
    fill(values_[count_++]);
    return *this;
  }

  TVMFFIAny values_[most_arguments] = {};
  int32_t count_ = 0;
};

// The tensor maps of one thread's recent calls: encoding them takes longer than the launch, and tensors come again.
class TensorMaps {
 public:
  // The four maps of a kernel for query, key, value and output, 128 bytes each.
  static char* of(const CudaKernel& kernel, View* (&views)[4]) {
    static thread_local std::unique_ptr<Slot[]> slots;
    if (slots == nullptr) slots = std::make_unique<Slot[]>(slot_count);
    const Key key{&kernel, {views[0]->place(), views[1]->place(), views[2]->place(), views[3]->place()}};
    Slot& slot = slots[hash(key) % slot_count];
    if (std::memcmp(&slot.key, &key, sizeof key) != 0) {
      slot.key.kernel = nullptr;  // where encoding fails, nothing is kept
      Arguments arguments;
      for (View* view : views) arguments.tensor(*view);
      for (size_t i = 0; i < std::size(views); ++i) arguments.pointer(slot.maps + i * map_bytes);
      arguments.call(kernel.describe);
      slot.key = key;
    }
    return slot.maps;
  }

 private:
  static constexpr size_t slot_count = 128;
  struct Key {
    const CudaKernel* kernel = nullptr;
    Place places[4];
  };
  static_assert(sizeof(Key) % sizeof(uint64_t) == 0);
  struct Slot {
    Key key;
    alignas(64) char maps[4 * map_bytes];  // the driver asks for 64
  };

  static uint64_t hash(const Key& key) {
    uint64_t words[sizeof key / sizeof(uint64_t)], mixed = 0;
    std::memcpy(words, &key, sizeof key);
    for (const uint64_t word : words) mixed = (mixed ^ word) * 0x9E3779B97F4A7C15u;
    return mixed >> 32;
  }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

uint32_t features_of(const Operands& is, const Options& with) {
  const auto bit = [](bool on, uint32_t value) { return on ? value : 0; };
  return bit(is.sinks.has_value(), feature::sinks) | bit(with.softcap != 0, feature::softcap) |
         bit(is.key_padding.has_value(), feature::key_padding) | bit(is.segments.has_value(), feature::segments) |
         bit(is.bias.has_value(), feature::bias) | bit(is.alibi_slopes.has_value(), feature::alibi) |
         bit(with.chunk_size > 0, feature::chunked) | bit(with.zeroed, feature::zeroed);
}

// One launch: the kernel that was chosen, and how many shares of the keys its blocks take.
class Launch {
 public:
  Launch(const Operands& is, const Options& with, const at::Tensor& output, int gpu_index)
      : is_(is), with_(with), index_(gpu_index), gpu_(gpu(gpu_index)) {
    choose();
    query_.show(rows(is.query), index_);
    key_.show(rows(is.key), index_);
    value_.show(rows(is.value), index_);
    output_.show(output, index_);
    show(key_padding_, is.key_padding);
    show(segments_, is.segments);
    show(sinks_, is.sinks);
    show(alibi_slopes_, is.alibi_slopes);
    if (is.bias.has_value()) {
      const at::Tensor& bias = *is.bias;
      const auto shape = {is.query.size(0), is.query.size(1), is.query.size(2), is.key.size(2)};
      bias_.show((bias.stride(3) == 1 ? bias : bias.contiguous()).expand(shape), index_);
    }
  }

  void run() {
    if (kernel_->sum_values != nullptr) sum_values();
    if (kernel_->combine == nullptr) return launch(output_);
    const int64_t batch = shares_ * is_.query.size(0), heads = is_.query.size(1), queries = is_.query.size(2);
    const int64_t rows = batch * heads * queries, size = is_.value.size(3);
    const at::Tensor shares = at::empty({rows * (size + 1)}, is_.query.options().dtype(at::kFloat));
    View partial;
    partial.show(shares.data_ptr<float>(), {batch, heads, queries, size}, index_);
    lse_.show(shares.data_ptr<float>() + rows * size, {batch, heads, queries}, index_);
    launch(partial);
    Arguments().tensor(partial).tensor(lse_).tensor(output_).tensor(sinks_).none().integer(shares_).call(kernel_->combine);
  }

 private:
  // Few queries leave most of the GPU idle: then the keys are split, too, where there is a kernel for that.
  void choose() {
    const int64_t group = is_.query.size(1) / is_.key.size(1);
    const int64_t band = with_.left < 0 || with_.right < 0 ? -1 : side(with_.left) + side(with_.right) + 1;
    CudaNeed need{dl_type(is_.query.scalar_type()), is_.query.size(3), is_.value.size(3), features_of(is_, with_), group, band};
    kernel_ = &find_cuda_kernel(need, gpu_);
    need.features |= feature::split;
    const CudaKernel* split = with_.zeroed ? nullptr : loaded_cuda_kernel(need, gpu_);
    if (split == nullptr) return;
    const int64_t shares = shares_of(*split);
    if (shares == 1 && is_.query.size(2) > split->positions) return;
    kernel_ = split;
    shares_ = shares;
  }

  // Shares that fill the GPU once, none under two key tiles.
  int64_t shares_of(const CudaKernel& kernel) const {
    const int64_t groups = ceil_div(is_.query.size(1) / is_.key.size(1), kernel.pack);
    const int64_t tiles = is_.key.size(0) * is_.key.size(1) * groups * ceil_div(is_.query.size(2), kernel.positions);
    const int64_t room = int64_t{gpu_.multiprocessors} * kernel.blocks_per_sm / std::max<int64_t>(tiles, 1);
    return std::max<int64_t>(1, std::min(room, ceil_div(keys_of_tile(kernel), kernel.keys_per_tile) / 2));
  }

  // Kernels take a side of 2^29 for one without end: what they compare with it must be nearer.
  int64_t offset() const {
    const int64_t found = offset_of(is_, with_);
    const int64_t open = side(found > 0 ? with_.left : with_.right);
    const int64_t farthest = std::abs(found) + (found > 0 ? is_.query.size(2) : is_.key.size(2));
    TORCH_CHECK(open <= longest || farthest <= longest, name, ": operand offset: expected less than 2^29 positions between a ",
                "query and a key on CUDA where the window is open to that side, found an offset of ", found);
    return found;
  }

  // Keys that one tile of queries touches at most.
  int64_t keys_of_tile(const CudaKernel& kernel) const {
    return std::min(is_.key.size(2), side(with_.left) + side(with_.right) + kernel.positions);
  }

  // (batch, key head) pairs that run side by side: even waves whose keys and values fit in a share of the cache, or in twice that
  // where one wave takes all.
  int64_t heads_per_wave() const {
    const int64_t bytes = is_.key.element_size() * keys_of_tile(*kernel_) * (is_.query.size(3) + is_.value.size(3));
    const int64_t pairs = is_.key.size(0) * is_.key.size(1);
    const int64_t fitting = std::max<int64_t>(1, gpu_.l2_bytes / l2_share / bytes);
    const int64_t waves = pairs <= 2 * fitting ? 1 : ceil_div(pairs, fitting);
    return ceil_div(pairs, waves);
  }

  // As the kernels read rows: the last axis in one piece, everything at multiples of 16 bytes. Other tensors are copied.
  static at::Tensor rows(const at::Tensor& tensor) {
    bool fits = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment == 0 && (tensor.stride(3) == 1 || tensor.size(3) == 1);
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t bytes = tensor.stride(axis) * tensor.element_size();
      fits = fits && (tensor.size(axis) == 1 || (bytes > 0 && bytes % static_cast<int64_t>(alignment) == 0));
    }
    return fits ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
  }

  void show(View& view, const OptionalTensor& tensor) const {
    if (tensor.has_value()) view.show(tensor->contiguous(), index_);
  }

  // The zeroed kind adds exp(score) - 1 within the band to a sum over all values.
  void sum_values() {
    const at::Tensor& value = is_.value;
    value_sum_.show(at::empty({value.size(0), value.size(1), value.size(3) + 1}, value.options().dtype(at::kFloat)), index_);
    Arguments().tensor(value_).tensor(key_padding_).tensor(value_sum_).call(kernel_->sum_values);
  }

  void launch(View& target) {
    Arguments arguments;
    if (kernel_->describe != nullptr) {
      View* mapped[] = {&query_, &key_, &value_, &output_};
      char* maps = TensorMaps::of(*kernel_, mapped);
      for (size_t i = 0; i < std::size(mapped); ++i) arguments.pointer(maps + i * map_bytes);
    } else {
      arguments.tensor(query_).tensor(key_).tensor(value_);
    }
    arguments.tensor(target).tensor(lse_).tensor(key_padding_).tensor(segments_).tensor(sinks_).tensor(bias_);
    arguments.tensor(alibi_slopes_).tensor(value_sum_);
    arguments.integer(is_.key.size(1)).integer(is_.key.size(2)).integer(side(with_.left)).integer(side(with_.right));
    arguments.integer(offset()).integer(std::max<int64_t>(with_.chunk_size, 1)).integer(shares_);
    arguments.integer(heads_per_wave()).integer(int64_t{gpu_.multiprocessors} * kernel_->blocks_per_sm);
    arguments.real(with_.scale).real(with_.softcap).call(kernel_->launch);
  }

  const Operands& is_;
  const Options& with_;
  int index_;
  const Gpu& gpu_;
  const CudaKernel* kernel_ = nullptr;
  int64_t shares_ = 1;
  View query_, key_, value_, output_, key_padding_, segments_, sinks_, bias_, alibi_slopes_, lse_, value_sum_;
};

void check_cuda(const Operands& is, const Options& with) {
  TORCH_CHECK(with.scale > 0, name, ": scale: expected more than 0 on CUDA, found ", with.scale, ". Negate the query");
  const int64_t found = std::max(is.query.size(2), is.key.size(2));
  TORCH_CHECK(found <= longest, name, ": expected at most ", longest, " queries and keys on CUDA, found ", found);
}

at::Tensor forward_cuda(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptionalTensor& key_padding,
    const OptionalTensor& segments, const OptionalTensor& sinks, const OptionalTensor& bias, const OptionalTensor& alibi_slopes,
    const OptionalTensor& offset, double scale, double softcap, int64_t left, int64_t right, bool bottom_right,
    int64_t chunk_size, bool zeroed, bool bshd_output) {
  const Operands is{query, key, value, key_padding, segments, sinks, bias, alibi_slopes, offset};
  const Options with{scale, softcap, left, right, bottom_right, chunk_size, zeroed, bshd_output};
  check(is, with);
  check_cuda(is, with);
  const c10::DeviceGuard guard(query.device());  // TVM makes the tensors' GPU the current one
  at::Tensor output = empty_output(is, with);
  if (output.numel() == 0) return output;
  if (key.size(2) == 0) return output.zero_();
  const int index = query.get_device();
  try {
    Launch launch(is, with, output, index);
    const LaunchStream stream(index, current_stream(index));
    launch.run();
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(false, name, ": ", error.what());
  }
  calls.fetch_add(1, std::memory_order_relaxed);
  return output;
}

}  // namespace
}  // namespace swacompile

TORCH_LIBRARY_IMPL(swacompile, CUDA, library) { library.impl("banded_attention", swacompile::forward_cuda); }

// How many times the operator has launched CUDA kernels in this process.
SWACOMPILE_EXPORT uint64_t swacompile_torch_cuda_call_count() { return swacompile::calls; }
