// Kernel launches with clusters and programmatic dependent launch.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace entmaxkv::cuda {

/// Throws an exception that names the op if `error` is a failure.
inline void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("entmaxkv::") + op + ": kernel launch failed: " + cudaGetErrorString(error));
  }
}

inline int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

/// Returns a property of the current device.
inline int device_property(cudaDeviceAttr property) {
  int value = 0;
  cudaDeviceGetAttribute(&value, property, current_device());
  return value;
}

inline int multiprocessors() { return device_property(cudaDevAttrMultiProcessorCount); }

/// Returns whether the device has thread block clusters and programmatic dependent launch: compute capability >= 9.0.
inline bool is_hopper_or_later() { return device_property(cudaDevAttrComputeCapabilityMajor) >= 9; }

/// The configuration of a launch.
struct Grid {
  dim3 blocks;
  int threads;
  int cluster = 1;  // blocks of a cluster, along x; more than 1 needs compute capability 9.0
  int shared = 0;   // bytes of dynamic shared memory per block
  // Whether blocks of a cluster share multiprocessors rather than spread over as many as they can. More clusters then
  // run at the same time, each slower.
  bool packed = false;
};

/// What the runtime wants to know about a launch. From compute capability 9.0 on this is a programmatic dependent
/// launch: the kernel's blocks may be scheduled while the previous kernel still runs.
struct Launch {
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config{};

  template <typename... Params>
  Launch(const char* op, void (*kernel)(Params...), const Grid& grid, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = grid.cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    attributes[2].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
    attributes[2].val.clusterSchedulingPolicyPreference =
        grid.packed ? cudaClusterSchedulingPolicyLoadBalancing : cudaClusterSchedulingPolicyDefault;
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = !is_hopper_or_later() ? 0 : grid.cluster == 1 ? 1 : 3;
    if (grid.shared > 0) {
      check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared));
    }
  }
  Launch(const Launch&) = delete;  // config points to attributes
};

/// Launches a kernel whose first statement is wait_for_previous_kernel().
template <typename... Params>
void launch(const char* op, void (*kernel)(Params...), const Grid& grid, cudaStream_t stream,
            std::common_type_t<Params>... params) {
  const Launch launch(op, kernel, grid, stream);
  check(op, cudaLaunchKernelEx(&launch.config, kernel, params...));
}

/// Waits until the previous kernel of the stream has finished and its writes are visible, then allows the next kernel's
/// blocks to be scheduled. The first statement of every kernel; all threads call. In the opposite order the waiting
/// blocks of several later kernels would occupy the multiprocessors, which is slower (bench/NOTES.md).
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Returns the block's dynamic shared memory.
__device__ inline uint4* dynamic_shared() {
#ifdef EMULATE_CUDA
  return emulation::dynamic_shared();  // tests/emulation
#else
  extern __shared__ uint4 s_dynamic[];
  return s_dynamic;
#endif
}

}  // namespace entmaxkv::cuda
