// A front door is compiled once per backend: into _C it brings the schema and the CPU kernel, into _cuda (USE_CUDA)
// the CUDA kernel. EMULATE_CUDA puts the CUDA kernels, run by the CPU, in the CPU kernels' place (tests/emulation);
// with EMULATE_TRUST, too, they get what a device would get: values that nobody has looked at.
#pragma once

#include "check.h"

#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#if defined(USE_CUDA) || defined(EMULATE_CUDA)
#include "cuda/kernels.h"
#else
#include "cpu/kernels.h"
#endif

namespace entmaxkv {

#if defined(USE_CUDA) || defined(EMULATE_CUDA)
/// Calls launch(stream) with the current stream of the device of `where`.
template <typename Launch>
void on_stream_of(const Tensor& where, Launch launch) {
  void* stream = nullptr;
#ifdef USE_CUDA
  const torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.get_device_index(), &stream));
#endif
  launch(static_cast<cudaStream_t>(stream));
}

/// Runs a kernel of namespace cuda on the device and current stream of `where`.
template <typename Op>
void run(void (*kernel)(const Op&, cudaStream_t), const Op& op, const Tensor& where) {
  on_stream_of(where, [&](cudaStream_t stream) { kernel(op, stream); });
}

/// The same for a kernel with intermediate results, which live in torch's memory.
template <typename Op>
void run(void (*kernel)(const Op&, void*, cudaStream_t), const Op& op, const Tensor& where) {
  Tensor workspace = new_tensor(where, {cuda::workspace_bytes(op)}, ScalarType::Byte);
  on_stream_of(where, [&](cudaStream_t stream) { kernel(op, workspace.data_ptr(), stream); });
}

namespace backend = cuda;
#else
template <typename Op>
void run(void (*kernel)(const Op&), const Op& op, const Tensor&) {
  kernel(op);
}

namespace backend = cpu;
#endif

#ifdef USE_CUDA
#define ENTMAXKV_OP(name, schema) \
  STABLE_TORCH_LIBRARY_IMPL(entmaxkv, CUDA, m) { m.impl(#name, TORCH_BOX(&name)); }
#else
#define ENTMAXKV_OP(name, schema)                                     \
  STABLE_TORCH_LIBRARY_FRAGMENT(entmaxkv, m) { m.def(#name schema); } \
  STABLE_TORCH_LIBRARY_IMPL(entmaxkv, CPU, m) { m.impl(#name, TORCH_BOX(&name)); }
#endif

}  // namespace entmaxkv
