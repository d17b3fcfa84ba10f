// The blocks that work together: a block alone, or those of a cluster, each with its part of the items.
#pragma once

#include "../common/cluster.cuh"
#include "../common/reduce.cuh"

namespace entmaxkv::cuda {

constexpr int kTeamThreads = 256;  // of a block of a team

/// Parts of a list, of which each block of a team takes one or more.
constexpr int kMostParts = 8;
static_assert(kMostParts % cluster::kMostBlocks == 0);

/// All threads of all blocks call every method, in the same order, and cluster::sync before a block of several ends.
class Team {
 public:
  int rank, size;

  static __device__ Team block() { return {0, 1}; }
  /// The first `size` blocks of a cluster; the others end.
  static __device__ Team blocks(int size) { return {cluster::rank(), size}; }

  /// The combination of all threads' values, in a fixed order, for each of them.
  template <typename Value, typename Combine>
  __device__ Value reduce(Value value, Combine combine) {
    value = cuda::reduce<kTeamThreads>(value, combine);
    if (size == 1) return value;
    const auto& each = gather(value);
    value = each.of[0];
    for (int other = 1; other < size; ++other) value = combine(value, each.of[other]);
    return value;
  }

  /// The sum over all threads and parts, of which each block has as many, by part(nth)'s values of a thread: the same
  /// bits however the parts are divided.
  template <typename Value, typename Part>
  __device__ Value sum_of_parts(int of_block, Part part) {
    __shared__ Value s_own[2][kMostParts], s_each[kMostParts];
    turn_ ^= 1;
    for (int nth = 0; nth < of_block; ++nth) {
      const Value own = cuda::sum<kTeamThreads>(part(nth));
      if (threadIdx.x == 0) s_own[turn_][nth] = own;
    }
    sync();
    const int nth = threadIdx.x;
    if (nth < size * of_block) s_each[nth] = of(nth / of_block, s_own[turn_][nth % of_block]);
    __syncthreads();
    Value all = s_each[0];
    for (int other = 1; other < size * of_block; ++other) all = all + s_each[other];
    return all;
  }

  /// The largest of all threads' values, NaN if any is.
  __device__ float largest(float value) {
    return reduce(value, [](float a, float b) { return larger(a, b); });
  }

  __device__ void sync() const {
    if (size == 1) {
      __syncthreads();
    } else {
      cluster::sync();
    }
  }

  /// A shared variable as the block of that rank has it.
  template <typename T>
  __device__ T& of(int other, T& shared) const {
    return size == 1 ? shared : cluster::of(other, shared);
  }

  /// The sum over the blocks of a number in shared memory, which must be there: for few threads.
  __device__ int sum_of(const int& s_number) const {
    if (size == 1) return s_number;
    int sum = 0;
    for (int other = 0; other < size; ++other) sum += of(other, s_number);
    return sum;
  }

  /// How many items the blocks have before this one, and all together.
  struct Part {
    int before, total;
  };

  /// From a block's own number of items, which all its threads know.
  __device__ Part part(int own) {
    if (size == 1) return {0, own};
    const auto& each = gather(own);
    Part part{0, 0};
    for (int other = 0; other < size; ++other) {
      if (other < rank) part.before += each.of[other];
      part.total += each.of[other];
    }
    return part;
  }

 private:
  template <typename Value>
  struct Each {
    Value of[cluster::kMostBlocks];
  };

  __device__ Team(int rank, int size) : rank(rank), size(size) {}

  /// The blocks' values. Two calls that follow each other use different memory: the first one's has been read when the
  /// second one's barrier opens.
  template <typename Value>
  __device__ const Each<Value>& gather(const Value& own) {
    __shared__ Value s_own[2];
    __shared__ Each<Value> s_each;
    turn_ ^= 1;
    if (threadIdx.x == 0) s_own[turn_] = own;
    cluster::sync();
    if (static_cast<int>(threadIdx.x) < size) s_each.of[threadIdx.x] = cluster::of(threadIdx.x, s_own[turn_]);
    __syncthreads();
    return s_each;
  }

  int turn_ = 0;
};

}  // namespace entmaxkv::cuda
