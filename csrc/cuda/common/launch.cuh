// How kernels are launched, and how they take turns.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace entmaxkv::cuda {

/// A failure surfaces at the op that caused it, with its name.
inline void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("entmaxkv::") + op + ": kernel launch failed: " + cudaGetErrorString(error));
  }
}

/// A property of the current device.
inline int device_property(cudaDeviceAttr property) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, property, device);
  return value;
}

inline int multiprocessors() { return device_property(cudaDevAttrMultiProcessorCount); }

/// From compute capability 9.0 on there are thread block clusters and dependent launches.
inline bool is_hopper_or_later() { return device_property(cudaDevAttrComputeCapabilityMajor) >= 9; }

/// The blocks of a launch.
struct Grid {
  dim3 blocks;
  int threads;
  int cluster = 1;  // blocks, along x, that share their memory: more than one from Hopper on
  int shared = 0;   // bytes of dynamic shared memory of a block
};

/// Launches a kernel that begins with take_turn(): from Hopper on, its blocks come to the multiprocessors while the
/// kernel before it still runs.
template <typename... Params>
void launch(const char* op, void (*kernel)(Params...), const Grid& grid, cudaStream_t stream,
            std::common_type_t<Params>... params) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = grid.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !is_hopper_or_later() ? 0 : grid.cluster == 1 ? 1 : 2;
  if (grid.shared > 0) {
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared));
  }
  check(op, cudaLaunchKernelEx(&config, kernel, params...));
}

/// First in every kernel, by every thread: waits until the kernels before this one are done, and lets the next come.
/// The other way round, blocks of ever later kernels come and wait, and steps take longer (bench/NOTES.md).
__device__ inline void take_turn() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// The block's dynamic shared memory.
__device__ inline uint4* dynamic_shared() {
#ifdef EMULATE_CUDA
  return emulation::dynamic_shared();  // tests/emulation
#else
  extern __shared__ uint4 s_dynamic[];
  return s_dynamic;
#endif
}

}  // namespace entmaxkv::cuda
