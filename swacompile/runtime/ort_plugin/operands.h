// From the operands of BandedAttention (docs/operator.md) to the arguments of a CPU kernel.
#pragma once

#include <tvm/ffi/c_api.h>

#include <array>
#include <cstdint>

#include "ort.h"

namespace swacompile {

struct Attributes {
  bool heads_first;  // layout BHSD
  bool bottom_right;
  bool zeroed;
  int64_t left, right;  // inclusive; `unbounded` where the node says -1
  int64_t chunk_size;
  double scale, softcap;
};

constexpr int64_t unbounded = INT32_MAX;

// Throws Error, naming attribute, expected and found value.
Attributes read_attributes(const NodeInfo& info);

struct Sizes {
  int64_t batch, heads, kv_heads, queries, keys, head_size, value_size;
};

// The nine inputs in the operator's order, checked against each other.
struct Operands {
  Tensor query, key, value, key_padding, segments, sinks, bias, alibi_slopes;
  Sizes sizes;
  int64_t offset;  // key position of query 0

  Shape output_shape() const;  // in the node's layout
  int64_t visible_keys(const Attributes& attributes) const;  // the most that one query may see
};

// Throws Error, naming operand, expected and found shape. Absent and neutral operands come out without data.
Operands read_operands(const Context& context, ElementType type, const Attributes& attributes);

// The argument array of one kernel call; points into itself.
class KernelArguments {
 public:
  static constexpr int32_t count = 16;

  KernelArguments(const Operands& operands, const Tensor& output, const Attributes& attributes);
  KernelArguments(const KernelArguments&) = delete;
  KernelArguments& operator=(const KernelArguments&) = delete;

  const TVMFFIAny* data() const { return arguments_.data(); }

 private:
  static constexpr int tensors = 9, most_axes = 4;
  using Axes = std::array<int64_t, most_axes>;

  void add_heads(const Tensor& tensor, bool heads_first);
  void add_plain(const Tensor& tensor, ElementType type, int rank);
  void add_bias(const Tensor& tensor, ElementType type, const Sizes& sizes);
  void add_tensor(void* data, ElementType type, int rank, const Axes& extents, const Axes& strides);
  void add_int(int64_t value);
  void add_float(double value);

  int32_t used_ = 0;
  std::array<TVMFFIAny, count> arguments_{};
  std::array<DLTensor, tensors> tensors_{};
  std::array<Axes, tensors> extents_{}, strides_{};
};

}  // namespace swacompile
