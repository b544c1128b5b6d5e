// ONNX Runtime's C calls as C++: a status becomes an exception, and the other way round at the border.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace swacompile {

// A mistake of the caller or of ORT; `guarded` hands its text to ORT.
struct Error : std::runtime_error {
  explicit Error(const std::string& text, OrtErrorCode code = OrtErrorCode::InvalidArgument)
      : std::runtime_error(text), code(code) {}
  OrtErrorCode code;
};

using Shape = std::vector<int64_t>;

std::string text_of(const Shape& shape);  // "(2, 8, 128, 64)"; an unknown size is "?"

// One input or output of a running node. `data` is null where the node omits the input.
struct Tensor {
  ElementType type = ElementType::Undefined;
  Shape shape;
  void* data = nullptr;

  bool given() const { return data != nullptr || type != ElementType::Undefined; }
  int64_t size() const;
};

// Throws Error if `status` is one, and releases it.
void check(const OrtApi* api, OrtStatus* status);

// A node while its session is created.
class NodeInfo {
 public:
  NodeInfo(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  std::string name() const;
  double float_attribute(const char* name) const;
  int64_t int_attribute(const char* name) const;
  std::string string_attribute(const char* name) const;
  Shape input_shape(size_t index) const;  // -1 for what the model leaves open; empty if nothing is known

 private:
  template <class... Arguments>
  void read_attribute(Slot slot, const char* name, Arguments... arguments) const;

  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

// A node while it runs.
class Context {
 public:
  Context(const OrtApi* api, OrtKernelContext* context) : api_(api), context_(context) {}

  Tensor input(size_t index) const;
  Tensor output(size_t index, const Shape& shape) const;

  // Runs task(user, i) for i in [0, count) on the session's own intra-op threads; returns when all are done.
  void parallel_for(void (*task)(void* user, size_t i), size_t count, void* user) const;

 private:
  Tensor tensor(const OrtValue* value) const;

  const OrtApi* api_;
  OrtKernelContext* context_;
};

// Runs `body`; an exception becomes the status that ORT reports.
template <class Body>
OrtStatus* guarded(const OrtApi* api, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return invoke(api, Slot::CreateStatus, static_cast<int>(error.code), error.what());
  } catch (const std::exception& error) {
    return invoke(api, Slot::CreateStatus, static_cast<int>(OrtErrorCode::Fail), error.what());
  }
}

}  // namespace swacompile
