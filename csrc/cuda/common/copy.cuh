// Copies from global to shared memory that run while their threads go on.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace entmaxkv::cuda {

/// Begins to fetch the line of that address into L2.
__device__ inline void prefetch([[maybe_unused]] const void* address) {
#ifndef EMULATE_CUDA
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

/// Begins to copy 16 bytes into shared memory; zeros, if they are not wanted. Ends with wait_for_copies.
__device__ inline void copy_async(uint4& s_to, const void* from, bool wanted) {
#ifdef EMULATE_CUDA
  s_to = wanted ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#else
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(&s_to))),
      "l"(from), "r"(wanted ? 16 : 0)
      : "memory");
#endif
}

/// The same for one number.
__device__ inline void copy_async(float& s_to, const float* from) {
#ifdef EMULATE_CUDA
  s_to = *from;
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(&s_to))),
               "l"(from)
               : "memory");
#endif
}

/// The copies begun so far by this thread, and after the last call, are one lot.
__device__ inline void commit_copies() {
#ifndef EMULATE_CUDA
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Until no more than kLots lots of this thread are under way.
template <int kLots>
__device__ void wait_for_copies() {
#ifndef EMULATE_CUDA
  asm volatile("cp.async.wait_group %0;" ::"n"(kLots) : "memory");
#endif
}

}  // namespace entmaxkv::cuda
