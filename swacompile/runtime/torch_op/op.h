// torch.ops.swacompile.banded_attention: its operands, as the dispatcher passes them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include <tvm/ffi/c_api.h>

namespace swacompile {

using OptionalTensor = std::optional<at::Tensor>;
constexpr int64_t unbounded = INT32_MAX;

// The operator's options that are no tensors.
struct Options {
  double scale, softcap;
  int64_t left, right;  // inclusive, -1 = unbounded
  bool bottom_right;
  int64_t chunk_size;
  bool zeroed, bshd_output;
};

// Operands in the schema's order; (B, H, S, D), (B, K, T, D), (B, K, T, V), (B, T), (B, T), (H,), (1 or B, 1 or H, 1 or S, T), (H,), ().
struct Operands {
  const at::Tensor &query, &key, &value;
  const OptionalTensor &key_padding, &segments, &sinks, &bias, &alibi_slopes, &offset;
};

using Forward = at::Tensor(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double, double, int64_t,
    int64_t, bool, int64_t, bool, bool);
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Backward = Gradients(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double, double, int64_t,
    int64_t, bool, int64_t, bool, std::array<bool, 6>);

// Throws c10::Error, naming the operand, what was expected and what was found. The same checks for every device.
void check(const Operands& operands, const Options& options);

// (B, H, S, V), in memory (B, S, H, V) where `bshd_output`, else (B, H, S, V).
at::Tensor empty_output(const Operands& operands, const Options& options);

// The key position of query 0. Reads the operand where there is one, so on CUDA it waits for the device.
int64_t offset_of(const Operands& operands, const Options& options);

// A side of the window as kernels take it: `unbounded` for -1 and for what is longer.
int64_t side(int64_t size);

// The element type of an operand as kernels take it; bool is uint8.
DLDataType dl_type(at::ScalarType type);

}  // namespace swacompile
