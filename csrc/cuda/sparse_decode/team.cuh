// A team: the blocks that solve one head together, each with its part of the list. One block, or blocks of a cluster.
#pragma once

#include "../common/cluster.cuh"
#include "../common/reduce.cuh"

namespace entmaxkv::cuda {

constexpr int kTeamThreads = 256;  // threads of each block of a team
constexpr int kTeamBlocks = 2;     // blocks of a team's threads that share a multiprocessor

/// Most parts that a list is divided into. Each block of a team takes one or more parts.
constexpr int kMostParts = 8;
static_assert(kMostParts % cluster::kMostBlocks == 0);

/// All threads of all blocks of the team call every method, in the same order. A team of several blocks calls sync
/// before a block ends.
class Team {
 public:
  int rank, size;

  /// The team of this block alone.
  static __device__ Team block() { return {0, 1}; }

  /// The team of the first `size` blocks of a cluster. The caller ends the other blocks.
  static __device__ Team blocks(int size) { return {cluster::rank(), size}; }

  /// Combines all threads' values, in a fixed order. All threads get the result.
  template <typename Value, typename Combine>
  __device__ Value reduce(Value value, Combine combine) {
    value = cuda::reduce<kTeamThreads>(value, combine);
    if (size == 1) return value;
    const auto& each = gather(value);
    value = each.of[0];
    for (int other = 1; other < size; ++other) value = combine(value, each.of[other]);
    return value;
  }

  /// Returns the sum of part(nth) over all threads and all parts of the list; each block has `of_block` parts, and
  /// part(nth) is a thread's value for the nth of them. The result has the same bits for every division of the parts
  /// among blocks.
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

  /// Returns the largest of all threads' values, NaN if any is NaN.
  __device__ float largest(float value) {
    return reduce(value, [](float a, float b) { return larger(a, b); });
  }

  /// A barrier for all threads of the team.
  __device__ void sync() const {
    if (size == 1) {
      __syncthreads();
    } else {
      cluster::sync();
    }
  }

  /// Returns the copy of a shared variable that block `other` of the team has. Any thread may call.
  template <typename T>
  __device__ T& of(int other, T& shared) const {
    return size == 1 ? shared : cluster::of(other, shared);
  }

  /// Returns the sum of the blocks' copies of a shared number. Any thread may call once sync has ordered the copies; it
  /// reads each of them, so only few threads should.
  __device__ int sum_of(const int& s_number) const {
    if (size == 1) return s_number;
    int sum = 0;
    for (int other = 0; other < size; ++other) sum += of(other, s_number);
    return sum;
  }

  struct Part {
    int before, total;  // items of the blocks of lower rank, and of all blocks
  };

  /// Computes the Part of this block. All threads of a block pass the block's number of items.
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

  /// Returns the values of all blocks, in shared memory of this block. All threads of a block pass the same value.
  /// Calls alternate between two variables: one is not overwritten before the next call's barrier, and all have read it
  /// by then.
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
