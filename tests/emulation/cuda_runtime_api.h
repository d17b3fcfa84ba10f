// The part of CUDA that the kernels of csrc/cuda use, for a C++ compiler. The kernels then run on the CPU: one cluster
// after the other, its blocks in turns, each thread of a block on a stack of its own (emulation.cpp). The emulation
// finds wrong results, deadlocks, warp functions that not all lanes call, and uses of the shared memory of a block that
// does not run. It does not find races or reads of uninitialised shared memory. There are no dependent launches.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __device__
#define __global__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // each block of a cluster has an OS thread

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct EmulatedIndex {
  int x, y, z;
};
extern EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum class Call { kNone, kSync, kShuffle, kShuffleUp, kShuffleXor, kBallot, kReduce, kMma, kLoad };

/// Says what is wrong in this thread, and ends the process.
[[noreturn]] void fail(const char* what);

/// Runs a grid to its end. Each `cluster` blocks with successive blockIdx.x are a cluster.
void run(dim3 grid, int threads, int cluster, const std::function<void()>& kernel);

/// Deposits a value and waits for all lanes of the warp; returns the 32 values, valid until the next call.
const uint64_t* exchange(Call call, uint64_t value);

template <typename T>
T exchange(Call call, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t own = 0;
  std::memcpy(&own, &value, sizeof(T));
  std::memcpy(&value, exchange(call, own) + lane, sizeof(T));
  return value;
}

inline int lane() { return threadIdx.x % 32; }

/// Returns memory that is large enough for any block.
inline uint4* dynamic_shared() {
  __shared__ uint4 memory[(256 << 10) / sizeof(uint4)];
  return memory;
}

/// What threads wait for: when all members have arrived, the next generation begins. Shared memory may hold it, so it
/// has no constructor.
struct Barrier {
  int members, arrived;
  long generation;
};

/// The functions of csrc/cuda/common/cluster.cuh.
namespace cluster {

int rank();
int size();
void arrive();
void wait();
inline void arrive_with_mailboxes() { arrive(); }

/// Returns the address of the copy of a shared variable that block `rank` has.
void* copy_of(int rank, const void* shared);

template <typename T>
T& of(int rank, T& shared) {
  return *static_cast<T*>(copy_of(rank, &shared));
}

class Mailbox {
 public:
  void open() {
    round_ = {size(), 0, 0};
    missing_ = 0;
  }

  template <typename T>
  void send(int rank, T& to, const T& value) {
    of(rank, to) = value;
    of(rank, *this).receive(sizeof(T));
  }

  void raise(int rank, uint32_t& to, uint32_t value) { send(rank, to, std::max(of(rank, to), value)); }
  void add(int rank, unsigned long long& to, unsigned long long value) { send(rank, to, of(rank, to) + value); }

  void announce(int rank, int bytes) {
    Mailbox& there = of(rank, *this);
    ++there.round_.arrived;
    there.receive(-bytes);
  }

  void wait(int round);

 private:
  void receive(int bytes);

  Barrier round_;
  int missing_;  // bytes that are announced and have not arrived, in this round
};

}  // namespace cluster

}  // namespace emulation

// Host.

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeClusterSchedulingPolicyPreference
};
enum cudaClusterSchedulingPolicy { cudaClusterSchedulingPolicyDefault, cudaClusterSchedulingPolicyLoadBalancing };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    dim3 clusterDim;
    cudaClusterSchedulingPolicy clusterSchedulingPolicyPreference;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <typename... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Params... params) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  }
  emulation::run(config->gridDim, static_cast<int>(config->blockDim.x), static_cast<int>(cluster),
                 [&] { kernel(params...); });
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

/// Clusters of sizes that are no power of two occur, too.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t* config) {
  constexpr int kBlocks = 15;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      *clusters = kBlocks / static_cast<int>(attribute.val.clusterDim.x);
  }
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // Enough for a cluster of eight blocks, and so few that a block of a fixed grid has several parts of the work.
  constexpr int kMultiprocessors = 8;
  constexpr int kMajor = 9;  // with clusters
  constexpr int kSharedBytes = 99 << 10;
  *value = attribute == cudaDevAttrMultiProcessorCount      ? kMultiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? kMajor
                                                            : kSharedBytes;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

// Device.

using std::exp;
using std::fabs;
using std::log;
using std::max;
using std::min;

void __syncthreads();
inline void __syncwarp() { emulation::exchange(emulation::Call::kSync, 0); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::exchange(emulation::Call::kShuffle, value, source % 32);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(emulation::Call::kShuffleXor, value, emulation::lane() ^ mask);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int source = emulation::lane() - distance;
  return emulation::exchange(emulation::Call::kShuffleUp, value, source < 0 ? emulation::lane() : source);
}

inline unsigned __ballot_sync(unsigned, bool holds) {
  const uint64_t* values = emulation::exchange(emulation::Call::kBallot, holds);
  unsigned mask = 0;
  for (int lane = 0; lane < 32; ++lane) mask |= static_cast<unsigned>(values[lane]) << lane;
  return mask;
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const uint64_t* values = emulation::exchange(emulation::Call::kReduce, value);
  return static_cast<unsigned>(*std::max_element(values, values + 32));
}

inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  const uint64_t* values = emulation::exchange(emulation::Call::kReduce, value);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(values[lane]);
  return bits;
}

inline int __reduce_add_sync(unsigned, int value) {
  const uint64_t* values = emulation::exchange(emulation::Call::kReduce, value);
  int sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += static_cast<int>(values[lane]);
  return sum;
}

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

template <typename T>
T atomicMax(T* to, T value) {
  const T before = *to;
  *to = std::max(before, value);
  return before;
}

template <typename T>
T atomicOr(T* to, T value) {
  const T before = *to;
  *to |= value;
  return before;
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float __double2float_rd(double x) {
  const auto rounded = static_cast<float>(x);
  return rounded > x ? std::nextafter(rounded, -HUGE_VALF) : rounded;
}

inline float __fsub_rd(float a, float b) {
  const double x = a, y = b, difference = x - y, taken = x - difference;
  const double error = (x - (difference + taken)) + (taken - y);  // of the difference, which may need more bits
  const auto rounded = static_cast<float>(difference);
  const bool above = rounded > difference || (rounded == difference && error < 0);
  return above ? std::nextafter(rounded, -HUGE_VALF) : rounded;
}

namespace emulation {

/// mma.sync.m16n8k16 with fp32 accumulation: fragments of A [16, 16], B [16, 8], C and D [16, 8] as PTX lays them out.
template <typename T>
void multiply_fragments(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1, const float (&c)[4]) {
  float left[2][16], right[2][16];  // the rows of A and the columns of B that meet in this lane
  const uint32_t words[6] = {a.x, a.y, a.z, a.w, b0, b1};
  for (int word = 0; word < 6; ++word) {
    const uint64_t* values = exchange(Call::kMma, words[word]);
    const auto value = [&](int i) {
      T element;
      const auto bits = static_cast<uint16_t>(values[i / 2] >> 16 * (i % 2));
      std::memcpy(&element, &bits, sizeof(element));
      return emulated_value(element);
    };
    for (int k = 0; k < 8; ++k) {
      if (word < 4) {
        left[word % 2][word / 2 * 8 + k] = value(lane() / 4 * 8 + k);
      } else {
        for (int column : {0, 1}) right[column][word % 2 * 8 + k] = value((lane() % 4 * 2 + column) * 8 + k);
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    d[i] = c[i];
    for (int k = 0; k < 16; ++k) d[i] += left[i / 2][k] * right[i % 2][k];
  }
}

/// mma.sync.m16n8k32 of unsigned and signed bytes, in whole numbers: C [16, 8] += A [16, 32] B [32, 8].
inline void multiply_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  int left[2][32], right[2][32];  // the rows of A and the columns of B that meet in this lane
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (int word = 0; word < 6; ++word) {
    const uint64_t* values = exchange(Call::kMma, words[word]);
    const auto byte = [&](int i) { return static_cast<uint8_t>(values[i / 4] >> 8 * (i % 4)); };
    for (int k = 0; k < 16; ++k) {
      if (word < 4) {
        left[word % 2][word / 2 * 16 + k] = byte(lane() / 4 * 16 + k);
      } else {
        for (int column : {0, 1}) {
          right[column][word % 2 * 16 + k] = static_cast<int8_t>(byte((lane() % 4 * 2 + column) * 16 + k));
        }
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 32; ++k) c[i] += left[i / 2][k] * right[i % 2][k];
  }
}

/// The class of csrc/cuda/common/bulk_copy.cuh. Its copies end at once. All lanes of a warp wait together.
class alignas(16) CopyBarrier {
 public:
  void open() { missing_ = 0; }
  static void fence() {}
  void announce(uint32_t bytes) { missing_ += bytes; }

  void copy(uint4* s_to, const void* from, uint32_t bytes, uint64_t) {
    std::memcpy(s_to, from, bytes);
    missing_ -= bytes;
  }

  void wait(int) const {
    __syncwarp();
    if (missing_ != 0) fail("waits for other bytes than were announced");
  }

  void close() {}

 private:
  int64_t missing_;  // bytes that are announced and have not been copied
};

/// ldmatrix.x4.trans
inline uint4 load_transposed(const void* row) {
  const uint64_t* rows = exchange(Call::kLoad, reinterpret_cast<uint64_t>(row));
  uint32_t words[4] = {};
  for (int i = 0; i < 8; ++i) {
    const auto* elements = reinterpret_cast<const uint16_t*>(rows[i / 2 * 8 + lane() % 4 * 2 + i % 2]);
    words[i / 2] |= static_cast<uint32_t>(elements[lane() / 4]) << i % 2 * 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace emulation
