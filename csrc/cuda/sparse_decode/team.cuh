// A team: the blocks that solve one head together, each with its part of the list. One block, or blocks of a cluster.
#pragma once

#include "../common/cluster.cuh"
#include "../common/reduce.cuh"

namespace entmaxkv::cuda {

constexpr int kTeamThreads = 256;  // threads of each block of a team

/// All threads of all blocks of the team call every method, in the same order, unless a method says otherwise. A team
/// of several blocks calls sync before a block ends. A block may use another Team after a barrier.
class Team {
 public:
  static constexpr int kThreads = kTeamThreads;  // of each block
  int rank, size;

  /// The team of this block alone.
  static __device__ Team block() { return {0, 1}; }

  /// The team of all blocks of the cluster. meet() must follow, if it is to do anything together.
  static __device__ Team cluster() {
    const Team team{cluster::rank(), cluster::size()};
    if (team.size > 1) {
      if (threadIdx.x < 2) mailbox(threadIdx.x).open();
      __syncwarp();
      cluster::arrive_with_mailboxes();
    }
    return team;
  }

  /// Waits until all blocks of the cluster run.
  __device__ void meet() const {
    if (size > 1) cluster::wait();
  }

  /// Returns the sum of all threads' values, added up in a fixed order.
  template <typename Value>
  __device__ Value sum(const Value& value) {
    return reduce(value, [](const Value& a, const Value& b) { return a + b; });
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

  struct Part {
    int before, total;  // items of the blocks of lower rank, and of all blocks
  };

  /// Computes the Part of this block. All threads pass their numbers of items.
  __device__ Part part(int own) {
    own = of_block(own, [](int a, int b) { return a + b; });
    if (size == 1) return {0, own};
    const float4* each = gather(own);
    Part part{0, 0};
    for (int other = 0; other < size; ++other) {
      const int items = unpacked<int>(each[other]);
      if (other < rank) part.before += items;
      part.total += items;
    }
    return part;
  }

 private:
  static constexpr int kWarps = kTeamThreads / 32;

  __device__ Team(int rank, int size) : rank(rank), size(size) {}

  /// Rounds alternate between two mailboxes: one is used again when all blocks have ended the round in the other.
  static __device__ cluster::Mailbox& mailbox(int round) {
    __shared__ cluster::Mailbox s_boxes[2];
    return s_boxes[round % 2];
  }

  template <typename Value>
  static __device__ Value unpacked(const float4& packed) {
    static_assert(sizeof(Value) <= sizeof(packed));
    Value value;
    memcpy(&value, &packed, sizeof(value));
    return value;
  }

  template <typename Value, typename Combine>
  __device__ Value reduce(Value value, Combine combine) {
    value = of_block(value, combine);
    if (size == 1) return value;
    const float4* each = gather(value);
    value = unpacked<Value>(each[0]);
    for (int other = 1; other < size; ++other) value = combine(value, unpacked<Value>(each[other]));
    return value;
  }

  /// Combines the values of the block's threads in a fixed order. Calls alternate between two variables: before one is
  /// overwritten all have passed the barrier of the next call, and so have read it.
  template <typename Value, typename Combine>
  __device__ Value of_block(Value value, Combine combine) {
    alignas(16) __shared__ Value s_own[2][kWarps];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value = combine(value, shuffle_xor(value, distance));
    turn_ ^= 1;
    if (threadIdx.x % 32 == 0) s_own[turn_][threadIdx.x / 32] = value;
    __syncthreads();
    value = s_own[turn_][0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) value = combine(value, s_own[turn_][warp]);
    return value;
  }

  /// Returns the values of all blocks, in shared memory of this block. All threads of a block pass the same value,
  /// after a barrier of the block that follows the last use of the values of an earlier call.
  template <typename Value>
  __device__ const float4* gather(const Value& own) {
    __shared__ float4 s_each[2][cluster::kMostBlocks];
    const int other = threadIdx.x;
    auto& of_round = s_each[round_ % 2];
    if (other < size) {
      float4 packed{};
      memcpy(&packed, &own, sizeof(own));
      mailbox(round_).announce(other, sizeof(packed));
      mailbox(round_).send(other, of_round[rank], packed);
    }
    mailbox(round_).wait(round_ / 2);
    ++round_;
    return of_round;
  }

  int turn_ = 0, round_ = 0;
};

/// Stream compaction by a block. In each turn every thread has an item of which it keeps up to 2^kBits - 1 parts. They
/// get places one after the other: those of earlier turns first, and in a turn those of the first threads.
template <int kBits>
class Compaction {
 public:
  /// The first place is `first`. All threads of the block call.
  __device__ explicit Compaction(int first) : end_(first) { __syncthreads(); }

  /// Takes this thread's item of the next turn, of which `count` parts are kept. Returns the place of the first of
  /// them. All threads of the block call.
  __device__ int take(int count) {
    constexpr int kWarps = kTeamThreads / 32;
    __shared__ int s_kept[2][kWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int place = end_, of_warp = 0;
#pragma unroll
    for (int bit = 0; bit < kBits; ++bit) {
      const uint32_t lanes = __ballot_sync(kAllLanes, count >> bit & 1);
      place += __popc(lanes & ((1u << lane) - 1)) << bit;
      of_warp += __popc(lanes) << bit;
    }
    turn_ ^= 1;  // some threads may still read the counts of the last turn
    if (lane == 0) s_kept[turn_][warp] = of_warp;
    __syncthreads();
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      const int kept = s_kept[turn_][other];
      if (other < warp) place += kept;
      end_ += kept;
    }
    return place;
  }

  /// Returns the place behind the last.
  __device__ int end() const { return end_; }

 private:
  int end_, turn_ = 0;
};

}  // namespace entmaxkv::cuda
