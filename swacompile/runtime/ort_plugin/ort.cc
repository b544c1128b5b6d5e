#include "ort.h"

#include <memory>

namespace swacompile {
namespace {

template <Slot release>
struct Release {
  const OrtApi* api;
  template <class Handle>
  void operator()(Handle* handle) const {
    invoke<void>(api, release, handle);
  }
};

using TypeInfo = std::unique_ptr<OrtTypeInfo, Release<Slot::ReleaseTypeInfo>>;
using TensorInfo = std::unique_ptr<OrtTensorTypeAndShapeInfo, Release<Slot::ReleaseTensorTypeAndShapeInfo>>;

Shape shape_of(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info) {
  size_t rank = 0;
  check(api, invoke(api, Slot::GetDimensionsCount, info, &rank));
  Shape shape(rank);
  check(api, invoke(api, Slot::GetDimensions, info, shape.data(), rank));
  return shape;
}

}  // namespace

std::string text_of(const Shape& shape) {
  std::string text = "(";
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    text += (axis ? ", " : "") + (shape[axis] < 0 ? "?" : std::to_string(shape[axis]));
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

int64_t Tensor::size() const {
  int64_t product = 1;
  for (int64_t extent : shape) product *= extent;
  return product;
}

void check(const OrtApi* api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string text = invoke<const char*>(api, Slot::GetErrorMessage, static_cast<const OrtStatus*>(status));
  invoke<void>(api, Slot::ReleaseStatus, status);
  throw Error(text, OrtErrorCode::Fail);
}

std::string NodeInfo::name() const {
  size_t length = 0;
  check(api_, invoke(api_, Slot::KernelInfo_GetNodeName, info_, static_cast<char*>(nullptr), &length));
  std::string name(length, '\0');
  check(api_, invoke(api_, Slot::KernelInfo_GetNodeName, info_, &name[0], &length));
  name.resize(length ? length - 1 : 0);
  return name;
}

template <class... Arguments>
void NodeInfo::read_attribute(Slot slot, const char* name, Arguments... arguments) const {
  try {
    check(api_, invoke(api_, slot, info_, name, arguments...));
  } catch (const Error&) {
    throw Error("attribute " + std::string(name) +
                " is missing or has another type: docs/operator.md lists the attributes, all of which must be written");
  }
}

double NodeInfo::float_attribute(const char* name) const {
  float value = 0;
  read_attribute(Slot::KernelInfoGetAttribute_float, name, &value);
  return value;
}

int64_t NodeInfo::int_attribute(const char* name) const {
  int64_t value = 0;
  read_attribute(Slot::KernelInfoGetAttribute_int64, name, &value);
  return value;
}

std::string NodeInfo::string_attribute(const char* name) const {
  size_t length = 0;
  read_attribute(Slot::KernelInfoGetAttribute_string, name, static_cast<char*>(nullptr), &length);
  std::string value(length, '\0');
  read_attribute(Slot::KernelInfoGetAttribute_string, name, &value[0], &length);
  value.resize(length ? length - 1 : 0);
  return value;
}

Shape NodeInfo::input_shape(size_t index) const {
  OrtTypeInfo* type = nullptr;
  check(api_, invoke(api_, Slot::KernelInfo_GetInputTypeInfo, info_, index, &type));
  const TypeInfo owner(type, {api_});
  const OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api_, invoke(api_, Slot::CastTypeInfoToTensorInfo, static_cast<const OrtTypeInfo*>(type), &info));
  return info == nullptr ? Shape{} : shape_of(api_, info);
}

Tensor Context::input(size_t index) const {
  const OrtKernelContext* context = context_;
  size_t count = 0;
  check(api_, invoke(api_, Slot::KernelContext_GetInputCount, context, &count));
  if (index >= count) return {};
  const OrtValue* value = nullptr;
  check(api_, invoke(api_, Slot::KernelContext_GetInput, context, index, &value));
  return value == nullptr ? Tensor{} : tensor(value);
}

Tensor Context::output(size_t index, const Shape& shape) const {
  OrtValue* value = nullptr;
  check(api_, invoke(api_, Slot::KernelContext_GetOutput, context_, index, shape.data(), shape.size(), &value));
  return tensor(value);
}

void Context::parallel_for(void (*task)(void*, size_t), size_t count, void* user) const {
  const OrtKernelContext* context = context_;
  const size_t one_batch_a_task = 0;
  check(api_, invoke(api_, Slot::KernelContext_ParallelFor, context, task, count, one_batch_a_task, user));
}

Tensor Context::tensor(const OrtValue* value) const {
  OrtTensorTypeAndShapeInfo* handle = nullptr;
  check(api_, invoke(api_, Slot::GetTensorTypeAndShape, value, &handle));
  const TensorInfo info(handle, {api_});
  Tensor result;
  int type = 0;
  check(api_, invoke(api_, Slot::GetTensorElementType, static_cast<const OrtTensorTypeAndShapeInfo*>(handle), &type));
  result.type = static_cast<ElementType>(type);
  result.shape = shape_of(api_, handle);
  check(api_, invoke(api_, Slot::GetTensorMutableData, value, &result.data));
  return result;
}

}  // namespace swacompile
