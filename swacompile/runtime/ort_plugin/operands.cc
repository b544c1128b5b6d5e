#include "operands.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace swacompile {
namespace {

enum Input : size_t { Query, Key, Value, KeyPadding, Segments, Sinks, Bias, AlibiSlopes, Offset };

constexpr int64_t farthest_offset = int64_t{1} << 29;  // beyond it a query stands before or behind all keys

constexpr const char* input_names[] = {"query", "key",  "value",        "key_padding", "segments",
                                       "sinks", "bias", "alibi_slopes", "offset"};

[[noreturn]] void refuse_attribute(const char* name, const std::string& expected, const std::string& found) {
  throw Error("attribute " + std::string(name) + ": expected " + expected + ", found " + found);
}

bool read_choice(const NodeInfo& info, const char* name, const char* chosen, const char* other) {
  const std::string found = info.string_attribute(name);
  if (found != chosen && found != other) refuse_attribute(name, std::string(chosen) + " or " + other, "'" + found + "'");
  return found == chosen;
}

int64_t read_window(const NodeInfo& info, const char* name) {
  const int64_t size = info.int_attribute(name);
  if (size < -1) refuse_attribute(name, "-1 (unbounded) or more", std::to_string(size));
  return size == -1 ? unbounded : std::min(size, unbounded);
}

[[noreturn]] void refuse_shape(Input input, const std::string& expected, const Tensor& found) {
  throw Error("input " + std::string(input_names[input]) + ": expected shape " + expected + ", found " +
              text_of(found.shape));
}

void require_shape(Input input, const Tensor& tensor, const Shape& expected, const char* letters) {
  if (tensor.shape != expected) refuse_shape(input, std::string(letters) + " = " + text_of(expected), tensor);
}

Tensor read_input(const Context& context, Input input, ElementType type) {
  Tensor tensor = context.input(input);
  if (tensor.given() && tensor.type != type) {
    throw Error("input " + std::string(input_names[input]) + ": expected " + text_of(type) + ", found " +
                text_of(tensor.type));
  }
  return tensor;
}

Tensor read_heads(const Context& context, Input input, ElementType type, const Attributes& attributes) {
  const Tensor tensor = read_input(context, input, type);
  if (!tensor.given()) throw Error("input " + std::string(input_names[input]) + " is missing");
  if (tensor.shape.size() != 4) refuse_shape(input, attributes.heads_first ? "BHSD" : "BSHD", tensor);
  return tensor;
}

Sizes read_sizes(const Operands& operands, const Attributes& attributes) {
  const size_t heads = attributes.heads_first ? 1 : 2, length = attributes.heads_first ? 2 : 1;
  const Shape &query = operands.query.shape, &key = operands.key.shape, &value = operands.value.shape;
  return {query[0], query[heads], key[heads], query[length], key[length], query[3], value[3]};
}

void check_heads(const Operands& operands, const Attributes& attributes) {
  const Sizes& is = operands.sizes;
  const auto ordered = [&](int64_t heads, int64_t length, int64_t size) {
    return attributes.heads_first ? Shape{is.batch, heads, length, size} : Shape{is.batch, length, heads, size};
  };
  const char* key_letters = attributes.heads_first ? "(B, K, T, D)" : "(B, T, K, D)";
  const char* value_letters = attributes.heads_first ? "(B, K, T, V)" : "(B, T, K, V)";
  require_shape(Key, operands.key, ordered(is.kv_heads, is.keys, is.head_size), key_letters);
  require_shape(Value, operands.value, ordered(is.kv_heads, is.keys, is.value_size), value_letters);
  if (is.kv_heads == 0 ? is.heads != 0 : is.heads % is.kv_heads != 0) {
    throw Error("inputs query and key: expected a number of query heads that the key heads divide, found " +
                std::to_string(is.heads) + " and " + std::to_string(is.kv_heads));
  }
  if (std::max(is.queries, is.keys) > INT32_MAX) throw Error("more than 2147483647 queries or keys");
}

// One label is all keys' label; one flag is neutral if it is true, so that a single hidden key stays hidden.
bool is_neutral(const Tensor& single) {
  return single.type != ElementType::Bool || *static_cast<const uint8_t*>(single.data) != 0;
}

Tensor read_per_key(const Context& context, Input input, ElementType type, const Sizes& sizes) {
  const Tensor tensor = read_input(context, input, type);
  if (!tensor.given() || (tensor.shape == Shape{1, 1} && is_neutral(tensor))) return {};
  require_shape(input, tensor, {sizes.batch, sizes.keys}, "(B, T)");
  return tensor;
}

Tensor read_per_head(const Context& context, Input input, ElementType type, const Sizes& sizes) {
  const Tensor tensor = read_input(context, input, type);
  if (!tensor.given() || tensor.shape == Shape{0}) return {};
  require_shape(input, tensor, {sizes.heads}, "(H,)");
  return tensor;
}

bool is_zero(const Tensor& scalar) {
  uint32_t bits = 0;
  std::memcpy(&bits, scalar.data, scalar.type == ElementType::Float32 ? 4 : 2);
  const uint32_t sign = scalar.type == ElementType::Float32 ? 0x80000000u : 0x8000u;
  return (bits & ~sign) == 0;
}

Tensor read_bias(const Context& context, ElementType type, const Sizes& sizes) {
  const Tensor tensor = read_input(context, Bias, type);
  if (!tensor.given() || (tensor.shape == Shape{1, 1, 1, 1} && is_zero(tensor))) return {};
  const bool fits = tensor.shape.size() == 4 && (tensor.shape[0] == 1 || tensor.shape[0] == sizes.batch) &&
                    (tensor.shape[1] == 1 || tensor.shape[1] == sizes.heads) &&
                    (tensor.shape[2] == 1 || tensor.shape[2] == sizes.queries) && tensor.shape[3] == sizes.keys;
  if (!fits) {
    const Shape full{sizes.batch, sizes.heads, sizes.queries, sizes.keys};
    refuse_shape(Bias, "(1 or B, 1 or H, 1 or S, T) with (B, H, S, T) = " + text_of(full) + ", or (1, 1, 1, 1) of 0", tensor);
  }
  return tensor;
}

int64_t read_offset(const Context& context, const Sizes& sizes, const Attributes& attributes) {
  const Tensor tensor = read_input(context, Offset, ElementType::Int64);
  if (!tensor.given()) return attributes.bottom_right ? sizes.keys - sizes.queries : 0;
  require_shape(Offset, tensor, {}, "()");
  int64_t offset = 0;
  std::memcpy(&offset, tensor.data, sizeof offset);
  return std::clamp(offset, -farthest_offset, farthest_offset);
}

DLDataType dl_type(ElementType type) {
  switch (type) {
    case ElementType::Float32: return {kDLFloat, 32, 1};
    case ElementType::Float16: return {kDLFloat, 16, 1};
    case ElementType::BFloat16: return {kDLBfloat, 16, 1};
    case ElementType::Int64: return {kDLInt, 64, 1};
    default: return {kDLUInt, 8, 1};
  }
}

}  // namespace

Attributes read_attributes(const NodeInfo& info) {
  Attributes read{};
  read.heads_first = read_choice(info, "layout", "BHSD", "BSHD");
  read.bottom_right = read_choice(info, "alignment", "bottom_right", "top_left");
  read.zeroed = read_choice(info, "kind", "zeroed", "hidden");
  read.left = read_window(info, "left_window_size");
  read.right = read_window(info, "right_window_size");
  read.chunk_size = info.int_attribute("chunk_size");
  if (read.chunk_size < 0 || read.chunk_size > unbounded) {
    refuse_attribute("chunk_size", "0 (none) to 2147483647", std::to_string(read.chunk_size));
  }
  read.scale = info.float_attribute("scale");
  read.softcap = info.float_attribute("softcap");
  if (!(read.softcap >= 0)) refuse_attribute("softcap", "0 (none) or more", std::to_string(read.softcap));
  return read;
}

Shape Operands::output_shape() const {
  Shape shape = query.shape;
  shape[3] = sizes.value_size;
  return shape;
}

int64_t Operands::visible_keys(const Attributes& attributes) const {
  return std::min(sizes.keys, attributes.left + attributes.right + 1);
}

Operands read_operands(const Context& context, ElementType type, const Attributes& attributes) {
  Operands read{};
  read.query = read_heads(context, Query, type, attributes);
  read.key = read_heads(context, Key, type, attributes);
  read.value = read_heads(context, Value, type, attributes);
  read.sizes = read_sizes(read, attributes);
  check_heads(read, attributes);
  read.key_padding = read_per_key(context, KeyPadding, ElementType::Bool, read.sizes);
  read.segments = read_per_key(context, Segments, ElementType::Int64, read.sizes);
  read.sinks = read_per_head(context, Sinks, type, read.sizes);
  read.bias = read_bias(context, type, read.sizes);
  read.alibi_slopes = read_per_head(context, AlibiSlopes, ElementType::Float32, read.sizes);
  read.offset = read_offset(context, read.sizes, attributes);
  return read;
}

KernelArguments::KernelArguments(const Operands& operands, const Tensor& output, const Attributes& attributes) {
  const ElementType type = output.type;
  add_heads(operands.query, attributes.heads_first);
  add_heads(operands.key, attributes.heads_first);
  add_heads(operands.value, attributes.heads_first);
  add_plain(operands.key_padding, ElementType::Bool, 2);
  add_plain(operands.segments, ElementType::Int64, 2);
  add_plain(operands.sinks, type, 1);
  add_bias(operands.bias, type, operands.sizes);
  add_plain(operands.alibi_slopes, ElementType::Float32, 1);
  add_heads(output, attributes.heads_first);
  add_int(attributes.left);
  add_int(attributes.right);
  add_int(operands.offset);
  add_int(attributes.chunk_size);
  add_int(attributes.zeroed);
  add_float(attributes.scale);
  add_float(attributes.softcap);
}

// Logical order (batch, heads, length, size), whatever the layout in memory.
void KernelArguments::add_heads(const Tensor& tensor, bool heads_first) {
  const Shape& shape = tensor.shape;
  const int64_t row = shape[3], plane = shape[2] * row, sample = shape[1] * plane;
  if (heads_first) {
    add_tensor(tensor.data, tensor.type, 4, {shape[0], shape[1], shape[2], row}, {sample, plane, row, 1});
  } else {
    add_tensor(tensor.data, tensor.type, 4, {shape[0], shape[2], shape[1], row}, {sample, row, plane, 1});
  }
}

void KernelArguments::add_plain(const Tensor& tensor, ElementType type, int rank) {
  Axes extents{}, strides{};
  if (tensor.given()) std::copy(tensor.shape.begin(), tensor.shape.end(), extents.begin());
  strides[rank - 1] = 1;
  for (int axis = rank - 2; axis >= 0; --axis) strides[axis] = strides[axis + 1] * extents[axis + 1];
  add_tensor(tensor.data, type, rank, extents, strides);
}

void KernelArguments::add_bias(const Tensor& tensor, ElementType type, const Sizes& sizes) {
  if (!tensor.given()) return add_plain(tensor, type, 4);
  const int64_t plane = tensor.shape[2] * sizes.keys;
  const int64_t per_query = tensor.shape[2] == 1 ? 0 : sizes.keys;
  const int64_t per_head = tensor.shape[1] == 1 ? 0 : plane;
  const int64_t per_sample = tensor.shape[0] == 1 ? 0 : tensor.shape[1] * plane;
  add_tensor(tensor.data, type, 4, {sizes.batch, sizes.heads, sizes.queries, sizes.keys},
             {per_sample, per_head, per_query, 1});
}

void KernelArguments::add_tensor(void* data, ElementType type, int rank, const Axes& extents, const Axes& strides) {
  static int64_t nothing = 0;  // absent operands need an address
  const auto place = static_cast<size_t>(used_);  // the tensors are the first arguments
  extents_[place] = extents;
  strides_[place] = strides;
  DLTensor& tensor = tensors_[place];
  tensor.data = data != nullptr ? data : &nothing;
  tensor.device = {kDLCPU, 0};
  tensor.ndim = rank;
  tensor.dtype = dl_type(type);
  tensor.shape = extents_[place].data();
  tensor.strides = strides_[place].data();
  TVMFFIAny& argument = arguments_[static_cast<size_t>(used_++)];
  argument.type_index = kTVMFFIDLTensorPtr;
  argument.v_ptr = &tensor;
}

void KernelArguments::add_int(int64_t value) {
  TVMFFIAny& argument = arguments_[static_cast<size_t>(used_++)];
  argument.type_index = kTVMFFIInt;
  argument.v_int64 = value;
}

void KernelArguments::add_float(double value) {
  TVMFFIAny& argument = arguments_[static_cast<size_t>(used_++)];
  argument.type_index = kTVMFFIFloat;
  argument.v_float64 = value;
}

}  // namespace swacompile
