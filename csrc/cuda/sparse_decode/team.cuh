// A team: the blocks that solve one head together, each with its part of the list. One block, or blocks of a cluster.
#pragma once

#include "../common/cluster.cuh"
#include "../common/reduce.cuh"

namespace entmaxkv::cuda {

constexpr int kTeamThreads = 256;  // threads of each block of a team

/// The near tokens of a head are divided into so many parts of equal counts, one for each warp of the largest team.
/// Their sums are added in a fixed order, so that the number of blocks changes no bit.
constexpr int kParts = cluster::kMostBlocks * kTeamThreads / 32;

/// Returns where a part of `count` tokens begins.
__device__ inline int first_of_part(int count, int part) { return static_cast<int>(int64_t{count} * part / kParts); }

/// All threads of all blocks of the team call every method, in the same order, unless a method says otherwise. A team
/// of several blocks calls sync before a block ends.
class Team {
 public:
  int rank, size;

  /// The team of this block alone.
  static __device__ Team block() { return {0, 1}; }

  /// The team of all blocks of the cluster.
  static __device__ Team cluster() { return {cluster::rank(), cluster::size()}; }

  /// Returns the largest of all threads' values, NaN if any is NaN.
  __device__ float largest(float value) {
    value = cuda::largest<kTeamThreads>(value);
    if (size == 1) return value;
    const auto& each = gather(value);
    for (int other = 0; other < size; ++other) value = larger(value, each.of[other]);
    return value;
  }

  /// Returns how many parts each block of the team has.
  __device__ int own_parts() const { return kParts / size; }

  /// Returns the sum of part(nth) over all parts. part(nth) is a lane's value for a part; the lanes of one warp call it
  /// together.
  template <typename Value, typename Part>
  __device__ Value sum_of_parts(Part part) {
    static_assert(kParts == 64);
    __shared__ Value s_own[2][kParts], s_total;
    turn_ ^= 1;  // another block may still read the sums of the last call
    for (int nth = threadIdx.x / 32; nth < own_parts(); nth += kTeamThreads / 32) {
      const Value own = cuda::sum<32>(part(rank * own_parts() + nth));
      if (threadIdx.x % 32 == 0) s_own[turn_][nth] = own;
    }
    sync();
    if (threadIdx.x < 32) {
      const auto of_part = [&](int nth) { return of(nth / own_parts(), s_own[turn_][nth % own_parts()]); };
      const Value total = cuda::sum<32>(of_part(threadIdx.x) + of_part(threadIdx.x + 32));
      if (threadIdx.x == 0) s_total = total;
    }
    __syncthreads();
    return s_total;
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
  /// reads each of them.
  __device__ int sum_of(const int& s_number) const {
    if (size == 1) return s_number;
    int sum = 0;
#pragma unroll
    for (int other = 0; other < cluster::kMostBlocks; ++other) {
      if (other < size) sum += of(other, s_number);
    }
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

/// A warp's run of some items: first ... last - 1.
struct WarpRun {
  int first, last;

  /// The run of this warp, if the warps of a block divide the items begin ... end - 1 into runs of equal lengths, in
  /// multiples of 32.
  static __device__ WarpRun of_block(int begin, int end) {
    const int each = ceil_div(end - begin, kTeamThreads) * 32;
    const int first = min(begin + static_cast<int>(threadIdx.x) / 32 * each, end);
    return {first, min(first + each, end)};
  }

  /// Calls use(i, read(i), there) for the items, 32 at a time, with there = false behind the end; kAtOnce times 32
  /// items are read together. The loop is short code where kAtOnce is 1: code that runs once waits for instructions
  /// (bench/NOTES.md). All lanes call.
  template <int kAtOnce, typename Read, typename Use>
  __device__ void visit(Read read, Use use) const {
#pragma unroll 1
    for (int from = first + static_cast<int>(threadIdx.x % 32); from - static_cast<int>(threadIdx.x % 32) < last;
         from += 32 * kAtOnce) {
      decltype(read(0)) values[kAtOnce];
#pragma unroll
      for (int nth = 0; nth < kAtOnce; ++nth) values[nth] = read(min(from + 32 * nth, last - 1));
#pragma unroll
      for (int nth = 0; nth < kAtOnce; ++nth) use(from + 32 * nth, values[nth], from + 32 * nth < last);
    }
  }
};

/// How many items the warps of a block keep: in stream compaction, those before this one, and all.
struct Kept {
  int before, all;

  /// Adds up keep(value), 0 or 1 for a single item, over the values read(i) of the run. All threads of the block call.
  template <int kAtOnce, typename Read, typename Keep>
  static __device__ Kept of(const WarpRun& run, Read read, Keep keep) {
    constexpr int kWarps = kTeamThreads / 32;
    __shared__ int s_kept[kWarps];
    int own = 0;
    run.visit<kAtOnce>(read, [&](int, auto value, bool there) { own += there ? int{keep(value)} : 0; });
    own = sum<32>(own);
    __syncthreads();  // the counts of an earlier call have been read
    if (threadIdx.x % 32 == 0) s_kept[threadIdx.x / 32] = own;
    __syncthreads();
    Kept kept{0, 0};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp < static_cast<int>(threadIdx.x) / 32) kept.before += s_kept[warp];
      kept.all += s_kept[warp];
    }
    return kept;
  }
};

/// Stream compaction: calls write(to, i, value) for the items of a warp's run for whose value read(i) keep(value) is
/// true, with to = first, first + 1, ... in the order of the items. All lanes call.
template <int kAtOnce, typename Read, typename Keep, typename Write>
__device__ void compact(const WarpRun& run, int first, Read read, Keep keep, Write write) {
  run.visit<kAtOnce>(read, [&](int i, auto value, bool there) {
    const bool stays = there && keep(value);
    const uint32_t mask = __ballot_sync(kAllLanes, stays);
    if (stays) write(first + __popc(mask & ((1u << threadIdx.x % 32) - 1)), i, value);
    first += __popc(mask);
  });
}

}  // namespace entmaxkv::cuda
