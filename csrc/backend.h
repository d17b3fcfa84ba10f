// What connects a front door to a backend. The front door of an op is csrc/<op>.cpp: it checks the tensors and calls
// the kernel. It is compiled once for each library:
//     _C                with the op's schema and the CPU kernel
//     _cuda (USE_CUDA)  with the CUDA kernel
// Tests compile it with EMULATE_CUDA, so that the CPU runs the CUDA kernels in the place of its own (tests/emulation).
// With EMULATE_TRUST added, it does not look at values in tensors, just as it cannot look at those on a device.
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
/// Calls launch(stream) with the current stream of the device that holds `where`.
template <typename Launch>
void on_stream_of(const Tensor& where, Launch launch) {
  void* stream = nullptr;
#ifdef USE_CUDA
  const torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.get_device_index(), &stream));
#endif
  launch(static_cast<cudaStream_t>(stream));
}

/// Runs a CUDA kernel on the device that holds `where`, in its current stream.
template <typename Op>
void run(void (*kernel)(const Op&, cudaStream_t), const Op& op, const Tensor& where) {
  on_stream_of(where, [&](cudaStream_t stream) { kernel(op, stream); });
}

/// The same for a kernel with intermediate results. Their memory comes from torch.
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

/// Registers the op `name`, whose front door is the function of the same name.
#ifdef USE_CUDA
#define ENTMAXKV_OP(name, schema) \
  STABLE_TORCH_LIBRARY_IMPL(entmaxkv, CUDA, m) { m.impl(#name, TORCH_BOX(&name)); }
#else
#define ENTMAXKV_OP(name, schema)                                     \
  STABLE_TORCH_LIBRARY_FRAGMENT(entmaxkv, m) { m.def(#name schema); } \
  STABLE_TORCH_LIBRARY_IMPL(entmaxkv, CPU, m) { m.impl(#name, TORCH_BOX(&name)); }
#endif

}  // namespace entmaxkv
