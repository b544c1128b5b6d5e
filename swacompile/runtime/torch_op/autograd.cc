// The gradient: banded_attention_backward recomputes the weights, so nothing but the operands is kept.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "op.h"

namespace swacompile {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

constexpr size_t tensor_count = 9, argument_count = 17;
// Which of the tensors has which place among the gradients: query, key, value, sinks, bias, alibi_slopes.
constexpr size_t differentiable[] = {0, 1, 2, 5, 6, 7};

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

at::Tensor forward_below(const Operands& is, const Options& with) {
  static const auto op = find<Forward>("swacompile::banded_attention");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(is.query, is.key, is.value, is.key_padding, is.segments, is.sinks, is.bias, is.alibi_slopes, is.offset,
                 with.scale, with.softcap, with.left, with.right, with.bottom_right, with.chunk_size, with.zeroed,
                 with.bshd_output);
}

OptionalTensor saved(const Variable& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

struct BandedAttention : torch::autograd::Function<BandedAttention> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* context, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
      const OptionalTensor& key_padding, const OptionalTensor& segments, const OptionalTensor& sinks,
      const OptionalTensor& bias, const OptionalTensor& alibi_slopes, const OptionalTensor& offset, double scale,
      double softcap, int64_t left, int64_t right, bool bottom_right, int64_t chunk_size, bool zeroed, bool bshd_output) {
    const auto kept = [](const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); };
    context->save_for_backward({query, key, value, kept(key_padding), kept(segments), kept(sinks), kept(bias),
                                kept(alibi_slopes), kept(offset)});
    context->saved_data["numbers"] = std::vector<double>{scale, softcap};
    context->saved_data["integers"] = std::vector<int64_t>{left, right, bottom_right, chunk_size, zeroed};
    return forward_below({query, key, value, key_padding, segments, sinks, bias, alibi_slopes, offset},
                         {scale, softcap, left, right, bottom_right, chunk_size, zeroed, bshd_output});
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    static const auto op = find<Backward>("swacompile::banded_attention_backward");
    const variable_list is = context->get_saved_variables();
    const auto numbers = context->saved_data["numbers"].toDoubleVector();
    const auto integers = context->saved_data["integers"].toIntVector();
    std::array<bool, 6> wanted{};
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = is_wanted(*context, is, differentiable[i]);
    const Gradients found = op.call(
        gradients[0], is[0], is[1], is[2], saved(is[3]), saved(is[4]), saved(is[5]), saved(is[6]), saved(is[7]), saved(is[8]),
        numbers[0], numbers[1], integers[0], integers[1], integers[2] != 0, integers[3], integers[4] != 0, wanted);
    const at::Tensor parts[] = {std::get<0>(found), std::get<1>(found), std::get<2>(found),
                                std::get<3>(found), std::get<4>(found), std::get<5>(found)};
    variable_list results(argument_count);
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i]) results[differentiable[i]] = parts[i];
    }
    return results;
  }

  // Autograd counts the tensors that were given: an absent operand has no place.
  static bool is_wanted(const AutogradContext& context, const variable_list& is, size_t operand) {
    if (!is[operand].defined()) return false;
    size_t place = 0;
    for (size_t i = 0; i < operand; ++i) place += is[i].defined();
    return context.needs_input_grad(place);
  }
};

bool wants_gradient(const Operands& is) {
  if (!at::GradMode::is_enabled()) return false;
  const auto wants = [](const OptionalTensor& tensor) { return tensor.has_value() && tensor->requires_grad(); };
  return is.query.requires_grad() || is.key.requires_grad() || is.value.requires_grad() || wants(is.sinks) ||
         wants(is.bias) || wants(is.alibi_slopes);
}

at::Tensor forward_autograd(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptionalTensor& key_padding,
    const OptionalTensor& segments, const OptionalTensor& sinks, const OptionalTensor& bias, const OptionalTensor& alibi_slopes,
    const OptionalTensor& offset, double scale, double softcap, int64_t left, int64_t right, bool bottom_right,
    int64_t chunk_size, bool zeroed, bool bshd_output) {
  const Operands is{query, key, value, key_padding, segments, sinks, bias, alibi_slopes, offset};
  if (!wants_gradient(is)) {
    return forward_below(is, {scale, softcap, left, right, bottom_right, chunk_size, zeroed, bshd_output});
  }
  return BandedAttention::apply(query, key, value, key_padding, segments, sinks, bias, alibi_slopes, offset, scale, softcap,
                                left, right, bottom_right, chunk_size, zeroed, bshd_output);
}

}  // namespace
}  // namespace swacompile

TORCH_LIBRARY_IMPL(swacompile, Autograd, library) {
  library.impl("banded_attention", swacompile::forward_autograd);
  library.impl("banded_attention_backward", torch::autograd::autogradNotImplementedFallback());
}
