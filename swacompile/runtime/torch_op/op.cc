#include "op.h"

#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

namespace swacompile {
namespace {

constexpr char name[] = "swacompile::banded_attention";
constexpr int64_t farthest_offset = int64_t{1} << 29;  // beyond it a query stands before or behind all keys

void check_type(const char* operand, const at::Tensor& found, at::ScalarType type) {
  TORCH_CHECK(found.scalar_type() == type, name, ": operand ", operand, ": expected ", type, ", found ", found.scalar_type());
}

void check_shape(const char* operand, const at::Tensor& found, at::IntArrayRef expected, const char* letters) {
  TORCH_CHECK(found.sizes() == expected, name, ": operand ", operand, ": expected shape ", letters, " = ", expected, ", found ",
              found.sizes());
}

void check_optional(const char* operand, const OptionalTensor& found, at::ScalarType type, at::IntArrayRef expected,
                    const char* letters) {
  if (!found.has_value()) return;
  check_type(operand, *found, type);
  check_shape(operand, *found, expected, letters);
}

void check_device(const char* operand, const OptionalTensor& found, const at::Tensor& query) {
  TORCH_CHECK(!found.has_value() || found->device() == query.device(), name, ": operand ", operand, ": expected device ",
              query.device(), " as the query's, found ", found->device());
}

void check_devices(const Operands& is) {
  check_device("key", is.key, is.query);
  check_device("value", is.value, is.query);
  check_device("key_padding", is.key_padding, is.query);
  check_device("segments", is.segments, is.query);
  check_device("sinks", is.sinks, is.query);
  check_device("bias", is.bias, is.query);
  check_device("alibi_slopes", is.alibi_slopes, is.query);
}

void check_bias(const Operands& is) {
  if (!is.bias.has_value()) return;
  const at::Tensor& bias = *is.bias;
  check_type("bias", bias, is.query.scalar_type());
  const int64_t batch = is.query.size(0), heads = is.query.size(1), queries = is.query.size(2), keys = is.key.size(2);
  const bool fits = bias.dim() == 4 && (bias.size(0) == 1 || bias.size(0) == batch) &&
                    (bias.size(1) == 1 || bias.size(1) == heads) && (bias.size(2) == 1 || bias.size(2) == queries) && bias.size(3) == keys;
  TORCH_CHECK(fits, name, ": operand bias: expected shape (1 or B, 1 or H, 1 or S, T) with (B, H, S, T) = ",
              at::IntArrayRef({batch, heads, queries, keys}), ", found ", bias.sizes());
}

void check_options(const Options& is) {
  TORCH_CHECK(is.left >= -1, name, ": left_window_size: expected -1 (unbounded) or more, found ", is.left);
  TORCH_CHECK(is.right >= -1, name, ": right_window_size: expected -1 (unbounded) or more, found ", is.right);
  TORCH_CHECK(is.chunk_size >= 0 && is.chunk_size <= unbounded, name, ": chunk_size: expected 0 (none) to 2147483647, found ",
              is.chunk_size);
  TORCH_CHECK(is.softcap >= 0, name, ": softcap: expected 0 (none) or more, found ", is.softcap);
}

}  // namespace

void check(const Operands& is, const Options& options) {
  for (const at::Tensor* operand : {&is.query, &is.key, &is.value}) {
    TORCH_CHECK(operand->dim() == 4, name, ": expected query, key and value of 4 axes (batch, heads, length, size), found ",
                operand->sizes());
  }
  const auto type = is.query.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, name,
              ": operand query: expected float32, float16 or bfloat16, found ", type);
  check_type("key", is.key, type);
  check_type("value", is.value, type);
  const int64_t batch = is.query.size(0), heads = is.query.size(1), kv_heads = is.key.size(1), keys = is.key.size(2);
  check_shape("key", is.key, {batch, kv_heads, keys, is.query.size(3)}, "(B, K, T, D)");
  check_shape("value", is.value, {batch, kv_heads, keys, is.value.size(3)}, "(B, K, T, V)");
  TORCH_CHECK(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, name,
              ": operands query and key: expected a number of query heads that the key heads divide, found ", heads, " and ",
              kv_heads);
  TORCH_CHECK(std::max(is.query.size(2), keys) <= unbounded, name, ": more than 2147483647 queries or keys");
  check_optional("key_padding", is.key_padding, at::kBool, {batch, keys}, "(B, T)");
  check_optional("segments", is.segments, at::kLong, {batch, keys}, "(B, T)");
  check_optional("sinks", is.sinks, type, {heads}, "(H,)");
  check_optional("alibi_slopes", is.alibi_slopes, at::kFloat, {heads}, "(H,)");
  check_optional("offset", is.offset, at::kLong, {}, "()");
  check_bias(is);
  check_devices(is);
  check_options(options);
}

at::Tensor empty_output(const Operands& is, const Options& options) {
  const int64_t batch = is.query.size(0), heads = is.query.size(1), queries = is.query.size(2), size = is.value.size(3);
  const auto steps = [](int64_t extent, int64_t stride) { return std::max<int64_t>(extent, 1) * stride; };
  const int64_t inner = steps(size, 1), middle = steps(options.bshd_output ? heads : queries, inner);
  const int64_t outer = steps(options.bshd_output ? queries : heads, middle);
  const int64_t of_head = options.bshd_output ? inner : middle, of_query = options.bshd_output ? middle : inner;
  return at::empty_strided({batch, heads, queries, size}, {outer, of_head, of_query, 1}, is.query.options());
}

int64_t offset_of(const Operands& is, const Options& options) {
  if (!is.offset.has_value()) return options.bottom_right ? is.key.size(2) - is.query.size(2) : 0;
  return std::clamp(is.offset->item<int64_t>(), -farthest_offset, farthest_offset);
}

int64_t side(int64_t size) { return size < 0 ? unbounded : std::min(size, unbounded); }

DLDataType dl_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return {kDLFloat, 32, 1};
    case at::kHalf: return {kDLFloat, 16, 1};
    case at::kBFloat16: return {kDLBfloat, 16, 1};
    case at::kLong: return {kDLInt, 64, 1};
    default: return {kDLUInt, 8, 1};
  }
}

}  // namespace swacompile

TORCH_LIBRARY(swacompile, library) {
  library.set_python_module("swacompile.torch");
  library.def(
      "banded_attention(Tensor query, Tensor key, Tensor value, Tensor? key_padding=None, Tensor? segments=None, "
      "Tensor? sinks=None, Tensor? bias=None, Tensor? alibi_slopes=None, Tensor? offset=None, *, float scale, "
      "float softcap=0.0, int left_window_size=-1, int right_window_size=-1, bool bottom_right=False, int chunk_size=0, "
      "bool zeroed=False, bool bshd_output=True) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  library.def(
      "banded_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? key_padding, "
      "Tensor? segments, Tensor? sinks, Tensor? bias, Tensor? alibi_slopes, Tensor? offset, *, float scale, float softcap, "
      "int left_window_size, int right_window_size, bool bottom_right, int chunk_size, bool zeroed, bool[6] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}
