// Asynchronous copies from global to shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace entmaxkv::cuda {

#ifndef EMULATE_CUDA
/// Returns the address of a shared variable as PTX takes it.
__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

/// Waits until an mbarrier has completed a phase, of which `parity` is the last bit. Needs compute capability 9.0.
__device__ inline void wait_for_parity(const uint64_t& s_barrier, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(&s_barrier)), "r"(parity)
                 : "memory");
  }
}

#endif

/// From so many bytes on, a stream is long: read_once.
constexpr int64_t kLongStream = 400 << 20;

/// Returns L2's policy for memory that is read once. L2 gives its lines up first: so a stream evicts neither what
/// others need nor lines that would have to be written back. Where it is long, its lines take part in no order: an H200
/// reads them 3 % faster, which outweighs the lines that are written back.
__device__ inline uint64_t read_once([[maybe_unused]] bool is_long = false) {
  uint64_t policy = 0;
#ifndef EMULATE_CUDA
  if (is_long) {
    asm("createpolicy.fractional.L2::evict_unchanged.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  }
#endif
  return policy;
}

/// Starts to load the cache line at `address` into L2.
__device__ inline void prefetch([[maybe_unused]] const void* address) {
#ifndef EMULATE_CUDA
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

/// Starts to copy 16 bytes into shared memory, or writes zeros if !valid. wait_for_copies ends the copy.
__device__ inline void copy_async(uint4& s_to, const void* from, bool valid) {
#ifdef EMULATE_CUDA
  s_to = valid ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(&s_to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}

/// Does what copy_async does, for memory that is read once; `policy` is that of read_once.
__device__ inline void stream_async(uint4& s_to, const void* from, bool valid, [[maybe_unused]] uint64_t policy) {
#ifdef EMULATE_CUDA
  copy_async(s_to, from, valid);
#else
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(&s_to)),
               "l"(from), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
#endif
}

/// Starts to copy one number into shared memory. wait_for_copies ends the copy.
__device__ inline void copy_async(float& s_to, const float* from) {
#ifdef EMULATE_CUDA
  s_to = *from;
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(&s_to)), "l"(from) : "memory");
#endif
}

/// Makes a group of the copies that this thread has started since its last call.
__device__ inline void commit_copies() {
#ifndef EMULATE_CUDA
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until at most kGroups groups of this thread's copies are unfinished.
template <int kGroups>
__device__ void wait_for_copies() {
#ifndef EMULATE_CUDA
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace entmaxkv::cuda
