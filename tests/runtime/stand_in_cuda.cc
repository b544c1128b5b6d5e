// "CUDA" kernels that compute on the CPU with stand_in_kernel.c: a library with the table and the arguments of docs/cuda_kernels.md,
// which refuses what a GPU could not take. Head size 16 goes through descriptors, as the wgmma family does; others as mma.
#include <algorithm>
#include <vector>

#include "cuda_library.h"

extern "C" {
int stand_in(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result);
void* TVMFFIEnvGetStream(int32_t device_type, int32_t device_id);
}

namespace {

struct Group {
  void* sync_handle;
  int32_t task_count;
};

int run_alone(int (*body)(int, Group*, void*), void* closure, int) {
  Group group{nullptr, 1};
  return body(0, &group, closure);
}

}  // namespace

extern "C" {
void* __TVMBackendParallelLaunch = reinterpret_cast<void*>(run_alone);
}

namespace {

using namespace swacompile;

constexpr int64_t stream_of_torch = 0x77, multiprocessors = 132;  // as the stand-ins of the driver and of torch say
constexpr float summed = 42;

struct Map {
  void* data;
  int64_t sizes[4], strides[4];
};
static_assert(sizeof(Map) <= 128);

int described = 0;

DLTensor* tensor(const TVMFFIAny& argument) {
  return argument.type_index == kTVMFFIDLTensorPtr ? static_cast<DLTensor*>(argument.v_ptr) : nullptr;
}

bool is_aligned(const DLTensor& rows) {
  bool good = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.strides[3] == 1 && rows.device.device_type == kDLCUDA;
  for (int axis = 0; axis < 3; ++axis) good = good && rows.strides[axis] % 4 == 0 && rows.strides[axis] > 0;
  return good;
}

int describe(void*, const TVMFFIAny* arguments, int32_t count, TVMFFIAny*) {
  if (count != 8) return -1;
  for (int i = 0; i < 4; ++i) {
    const DLTensor& from = *tensor(arguments[i]);
    Map& to = *static_cast<Map*>(arguments[4 + i].v_ptr);
    if (reinterpret_cast<uintptr_t>(&to) % 64 != 0 || !is_aligned(from)) return -1;
    to.data = from.data;
    std::copy_n(from.shape, 4, to.sizes);
    std::copy_n(from.strides, 4, to.strides);
  }
  ++described;
  return 0;
}

class CpuCall {
 public:
  // `rest`: output, lse, key_padding, segments, sinks, bias, alibi_slopes, value_sum, nine integers, scale, softcap.
  CpuCall(DLTensor* query, DLTensor* key, DLTensor* value, const TVMFFIAny* rest) : rest_(rest) {
    for (DLTensor* operand : {query, key, value}) add(operand);
    for (int i : {2, 3, 4, 5, 6}) add(tensor(rest[i]));
    add(tensor(rest[0]));
  }

  int run(bool zeroed, bool chunked) {
    const int64_t numbers[] = {integer(2), integer(3), integer(4), chunked ? integer(5) : 0, zeroed};
    for (const int64_t number : numbers) {
      arguments_[used_].type_index = kTVMFFIInt;
      arguments_[used_++].v_int64 = number;
    }
    arguments_[used_++] = rest_[17];
    arguments_[used_++] = rest_[18];
    TVMFFIAny result{};
    return stand_in(nullptr, arguments_, used_, &result);
  }

  // kv_heads, keys, left, right, offset, chunk_size, splits, heads_per_wave, blocks
  int64_t integer(int place) const { return rest_[8 + place].v_int64; }

 private:
  void add(DLTensor* operand) {
    static int64_t zeros[4] = {}, ones[4] = {1, 1, 1, 1};
    static DLTensor absent[] = {{zeros, {kDLCPU, 0}, 4, {kDLFloat, 32, 1}, zeros, ones, 0}};
    arguments_[used_].type_index = kTVMFFIDLTensorPtr;
    arguments_[used_++].v_ptr = operand == nullptr ? absent : operand;
  }

  const TVMFFIAny* rest_;
  TVMFFIAny arguments_[16] = {};
  int used_ = 0;
};

int compute(DLTensor* query, DLTensor* key, DLTensor* value, const TVMFFIAny* rest, uint32_t features) {
  CpuCall call(query, key, value, rest);
  const bool on_stream = TVMFFIEnvGetStream(kDLCUDA, 0) == reinterpret_cast<void*>(stream_of_torch);
  const bool sizes = call.integer(0) == key->shape[1] && call.integer(1) == key->shape[2] && call.integer(8) == multiprocessors;
  if (!on_stream || !sizes || call.integer(7) < 1) return -1;
  const bool zeroed = features & feature::zeroed;
  if (zeroed != (tensor(rest[7]) != nullptr) || (zeroed && *static_cast<float*>(tensor(rest[7])->data) != summed)) return -1;
  return call.run(zeroed, features & feature::chunked);
}

template <uint32_t features>
int launch(void*, const TVMFFIAny* arguments, int32_t count, TVMFFIAny*) {
  DLTensor* rows[] = {tensor(arguments[0]), tensor(arguments[1]), tensor(arguments[2])};
  if (count != 22 || !std::all_of(rows, rows + 3, [](DLTensor* operand) { return is_aligned(*operand); })) return -1;
  return compute(rows[0], rows[1], rows[2], arguments + 3, features);
}

template <uint32_t features>
int launch_mapped(void*, const TVMFFIAny* arguments, int32_t count, TVMFFIAny*) {
  if (count != 23) return -1;
  DLTensor rows[3];
  for (int i = 0; i < 3; ++i) {
    Map& map = *static_cast<Map*>(arguments[i].v_ptr);
    rows[i] = {map.data, {kDLCUDA, 0}, 4, {kDLFloat, 32, 1}, map.sizes, map.strides, 0};
  }
  return compute(&rows[0], &rows[1], &rows[2], arguments + 4, features);
}

// The first share takes all keys, the others none.
int launch_split(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
  TVMFFIAny copy[23];
  std::copy_n(arguments, count, copy);
  DLTensor first = *tensor(arguments[4]);
  const DLTensor& lse = *tensor(arguments[5]);
  const int64_t shares = arguments[18].v_int64;
  int64_t sizes[4];
  std::copy_n(first.shape, 4, sizes);
  sizes[0] /= shares;
  first.shape = sizes;
  copy[4].v_ptr = &first;
  std::fill_n(static_cast<float*>(lse.data), lse.shape[0] * lse.shape[1] * lse.shape[2], 0.f);
  return launch_mapped<0>(self, copy, count, result);
}

int combine(void*, const TVMFFIAny* arguments, int32_t count, TVMFFIAny*) {
  const DLTensor &partial = *tensor(arguments[0]), &output = *tensor(arguments[2]);
  const bool shared = partial.shape[0] == arguments[5].v_int64 * output.shape[0] && tensor(arguments[1])->shape[0] == partial.shape[0];
  if (count != 6 || !shared) return -1;
  const float* from = static_cast<float*>(partial.data);
  float* to = static_cast<float*>(output.data);
  for (int64_t b = 0; b < output.shape[0]; ++b)
    for (int64_t h = 0; h < output.shape[1]; ++h)
      for (int64_t q = 0; q < output.shape[2]; ++q)
        for (int64_t v = 0; v < output.shape[3]; ++v)
          to[b * output.strides[0] + h * output.strides[1] + q * output.strides[2] + v * output.strides[3]] = *from++;
  return 0;
}

int sum_values(void*, const TVMFFIAny* arguments, int32_t count, TVMFFIAny*) {
  const DLTensor &value = *tensor(arguments[0]), &sums = *tensor(arguments[2]);
  if (count != 3 || sums.shape[1] != value.shape[1] || sums.shape[2] != value.shape[3] + 1) return -1;
  *static_cast<float*>(sums.data) = summed;
  return 0;
}

template <uint32_t features>
CudaFunction launch_of(bool mapped) {
  return mapped ? launch_mapped<features> : launch<features>;
}

// A stand-in asks only for what its arguments do not say.
CudaFunction launch_with(uint32_t features, bool mapped) {
  using namespace feature;
  switch (features & (chunked | zeroed)) {
    case chunked | zeroed: return launch_of<chunked | zeroed>(mapped);
    case chunked: return launch_of<chunked>(mapped);
    case zeroed: return launch_of<zeroed>(mapped);
    default: return launch_of<0>(mapped);
  }
}

std::vector<CudaKernel> all_rows() {
  std::vector<CudaKernel> rows;
  for (const auto& [head, value] : {std::pair{16, 16}, {16, 8}, {24, 8}}) {
    for (uint32_t features = 0; features < feature::lse; ++features) {
      const bool mapped = head == 16;
      const auto sums = features & feature::zeroed ? sum_values : nullptr;
      rows.push_back({{kDLFloat, 32, 1}, head, value, features, 64, 8, 1, 1, launch_with(features, mapped),
                      mapped ? describe : nullptr, nullptr, sums});
    }
  }
  rows.push_back({{kDLFloat, 32, 1}, 16, 16, feature::split, 4, 8, 1, 1, launch_split, describe, combine, nullptr});
  return rows;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const CudaLibrary* swacompile_cuda_library() {
  static const std::vector<CudaKernel> rows = all_rows();
  static const CudaLibrary library{cuda_library_version, 9, 0, true, rows.data(), rows.size()};
  return &library;
}

extern "C" __attribute__((visibility("default"))) int stand_in_describes() { return described; }
