// The threshold of one head from the scores of its near tokens, and the weight of a score, by a team.
#pragma once

#include "../../entmax.h"
#include "team.cuh"

namespace entmaxkv::cuda {

constexpr int kRun = 4;           // entries that a thread takes at once; they are kTeamThreads apart
constexpr int kFewTokens = 1024;  // near tokens that one block solves
constexpr int kOfWarp = 256;      // near tokens that one warp solves, without barriers

/// A token of a list: its score or weight, and its place in the list.
struct Entry {
  float value;
  int32_t place;
};

/// Stream compaction: calls write(to, entry) with to = 0, 1, ... for the entries read(i), i < count, whose value is not
/// kNothing, in order. Returns their number to all threads. write may fill the array that read reads: entry i is read
/// before index i is written. All threads of the block call; a barrier follows the last write.
template <typename Read, typename Write>
__device__ int pack(int count, Read read, Write write) {
  int kept = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kTeamThreads * kRun) {
    Entry entries[kRun];
    bool keep[kRun];
#pragma unroll
    for (int nth = 0; nth < kRun; ++nth) {
      const int i = first + nth * kTeamThreads + static_cast<int>(threadIdx.x);
      entries[nth] = {kNothing, 0};
      if (i < count) entries[nth] = read(i);
      keep[nth] = entries[nth].value != kNothing;
    }
    const Places<kTeamThreads, kRun> to(keep);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (!keep[i]) continue;
      write(kept + to.place[i], entries[i]);
    }
    kept += to.count;
  }
  __syncthreads();
  return kept;
}

/// The scores of a block's near tokens. They are divided into parts that do not depend on the number of blocks.
struct NearScores {
  const float* scores;
  int count;
  float origin;  // thresholds are relative to this score, which is at or below the threshold; softmax: the best score
  int parts = 1;
  const int* ends = nullptr;  // [parts] index of each part's end, if there are several parts

  /// Calls body(run) for this thread's scores of a part, kRun at once, filled up with kNothing.
  template <typename Body>
  __device__ void visit(int part, Body body) const {
    const int begin = part > 0 ? ends[part - 1] : 0, end = parts > 1 ? ends[part] : count;
    for (int first = begin + static_cast<int>(threadIdx.x); first < end; first += kTeamThreads * kRun) {
      float run[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        run[i] = first + i * kTeamThreads < end ? scores[first + i * kTeamThreads] : kNothing;
      body(run);
    }
  }
};

/// Adds a token with x = (alpha-1)(score - origin) to the excess, if it is above the threshold. kSquare: beta is 2.
template <bool kSquare, typename Real>
__device__ void add_if_above(Excess<Real>& excess, Real x, Real threshold, Real beta) {
  const Real y = x - threshold;
  if constexpr (kSquare) {
    excess.add(max(y, Real(0)), Real(2));  // max avoids a branch
  } else if (y > 0) {
    excess.add(y, beta);
  }
}

/// Finds the threshold, relative to (alpha-1) origin, with kSolvers threads, a block or a warp. Each thread holds up to
/// kHeld near scores in registers. All these threads call and all get the result.
template <bool kSquare, int kSolvers, int kHeld>
__device__ Solution<float> solve_held(const Entmax<float>& entmax, const NearScores& near) {
  float held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int entry = i * kSolvers + static_cast<int>(threadIdx.x);
    held[i] = entry < near.count ? entmax.gap * (near.scores[entry] - near.origin) : -1.0f;
  }
  return find_threshold(entmax, 0.0f, 0.0f, [&](float threshold) {
    Excess<float> own;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * kSolvers < near.count) add_if_above<kSquare>(own, held[i], threshold, entmax.beta);
    }
    return sum<kSolvers>(own);
  });
}

/// Solves with all threads of a block; all call and all get the result. Not inlined: the call is rare, and longer code
/// slows a kernel that runs it once (bench/NOTES.md).
template <bool kSquare>
__device__ ENTMAXKV_NOINLINE Solution<float> solve_by_block(Entmax<float> entmax, NearScores near) {
  return solve_held<kSquare, kTeamThreads, kFewTokens / kTeamThreads>(entmax, near);
}

/// Solves for at most kFewTokens near tokens, which all belong to this block. All threads of the block call and all get
/// the result.
template <bool kSquare>
__device__ Solution<float> solve_few(const Entmax<float>& entmax, const NearScores& near) {
  if (near.count > kOfWarp) return solve_by_block<kSquare>(entmax, near);
  __shared__ Solution<float> s_solution;
  if (threadIdx.x < 32) {
    const Solution<float> solution = solve_held<kSquare, 32, kOfWarp / 32>(entmax, near);
    if (threadIdx.x == 0) s_solution = solution;
  }
  __syncthreads();
  return s_solution;
}

/// Solves for any number of near tokens of all blocks of the team. All threads of the team call and all get the result.
template <bool kSquare, typename Real>
__device__ ENTMAXKV_NOINLINE Solution<Real> solve_many(Team& team, const Entmax<Real>& entmax, const NearScores& near) {
  return find_threshold(entmax, Real(0), Real(0), [&](Real threshold) {
    return team.sum_of_parts<Excess<double>>(near.parts, [&](int part) {
      Excess<double> own;
      near.visit(part, [&](const float (&run)[kRun]) {
        Excess<Real> few;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          add_if_above<kSquare>(few, entmax.gap * (static_cast<Real>(run[i]) - near.origin), threshold, entmax.beta);
        }
        own = own + Excess<double>{few.mass, few.slope};
      });
      return own;
    });
  });
}

/// The weights of a head as a function of the score.
struct Weights {
  Entmax<double> entmax;
  float origin;
  double threshold, mass;
  float tau;

  /// Returns whether fp32 is precise enough. Powers above 15 magnify its rounding too much.
  template <typename Real>
  __device__ static bool are_in_float(const Entmax<Real>& entmax) {
    return entmax.beta <= 15;
  }

  /// Returns the weight p of a score.
  __device__ float of(float score) const {
    if (entmax.is_softmax()) return expf(score - origin) / static_cast<float>(mass);
    return are_in_float(entmax) ? power_of<float>(score) : power_of<double>(score);
  }

 private:
  template <typename Real>
  __device__ float power_of(float score) const {
    const Entmax<Real> real(entmax);
    const Real y = real.gap * (static_cast<Real>(score) - origin) - static_cast<Real>(threshold);
    return static_cast<float>(y > 0 ? power(y, real.beta) / static_cast<Real>(mass) : 0);
  }
};

/// Finds the weights of a head from its near tokens. few: there are at most kFewTokens, which all belong to this block,
/// and all threads of the block call. Otherwise the blocks of the team have the near tokens together, and all threads
/// of the team call. All that call get the result.
__device__ inline Weights find_weights(Team& team, const Entmax<double>& entmax, NearScores near, bool few) {
  const float origin = near.origin;
  Weights weights{entmax, origin, 0, 0, 0};
  if (entmax.is_softmax()) {
    Team all = few ? Team::block() : team;
    weights.mass = all.sum_of_parts<double>(near.parts, [&](int part) {
      double own = 0;
      near.visit(part, [&](const float (&run)[kRun]) {
        for (const float score : run) own += expf(score - origin);
      });
      return own;
    });
    if (!few) team = all;
    weights.tau = origin + logf(static_cast<float>(weights.mass));
    return weights;
  }
  const auto take = [&](const auto& solution) {
    weights.threshold = solution.threshold;
    weights.mass = solution.mass;
  };
  const auto solve_by = [&](const Entmax<float>& real, auto square) {
    if (few) return take(solve_few<square>(real, near));  // so few tokens: mass >= 2^-10 slope
    constexpr float kClose = 0x1p-8f;
    Solution<float> solution = solve_many<square>(team, real, near);
    if (solution.mass < kClose * solution.slope) {  // many tokens just above the threshold: fp32 needs a closer origin
      const float below = 0x1p-21f * (fabsf(origin) + real.beta);
      weights.origin = near.origin = origin + solution.threshold * real.beta - below;
      solution = solve_many<square>(team, real, near);
    }
    take(solution);
  };
  if (!Weights::are_in_float(entmax)) {
    Team all = few ? Team::block() : team;
    take(solve_many<false>(all, entmax, near));
    if (!few) team = all;
  } else if (entmax.beta == 2) {  // alpha = 1.5
    solve_by(Entmax<float>(entmax), std::true_type{});
  } else {
    solve_by(Entmax<float>(entmax), std::false_type{});
  }
  weights.tau = static_cast<float>(weights.threshold + entmax.gap * weights.origin);
  return weights;
}

}  // namespace entmaxkv::cuda
