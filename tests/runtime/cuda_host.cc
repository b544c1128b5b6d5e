// The CUDA kernel of the operator without a GPU: its launches, made for tensors in the memory of the CPU.
#include "cuda.cc"

namespace swacompile {
namespace {

at::Tensor forward_here(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptionalTensor& key_padding,
    const OptionalTensor& segments, const OptionalTensor& sinks, const OptionalTensor& bias, const OptionalTensor& alibi_slopes,
    const OptionalTensor& offset, double scale, double softcap, int64_t left, int64_t right, bool bottom_right,
    int64_t chunk_size, bool zeroed, bool bshd_output) {
  const Operands is{query, key, value, key_padding, segments, sinks, bias, alibi_slopes, offset};
  const Options with{scale, softcap, left, right, bottom_right, chunk_size, zeroed, bshd_output};
  check(is, with);
  check_cuda(is, with);
  at::Tensor output = empty_output(is, with);
  Launch launch(is, with, output, 0);
  const LaunchStream stream(0, current_stream(0));
  launch.run();
  return output;
}

}  // namespace
}  // namespace swacompile

TORCH_LIBRARY_IMPL(swacompile, CPU, library) { library.impl("banded_attention", swacompile::forward_here); }
