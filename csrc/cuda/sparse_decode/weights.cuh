// From the scores of one head to its weights, by a team.
#pragma once

#include "../../entmax.h"
#include "team.cuh"

namespace entmaxkv::cuda {

constexpr int kRun = 4;           // entries, kTeamThreads apart, that a thread takes at once
constexpr int kFewTokens = 1024;  // that one block holds
constexpr int kOfWarp = 256;      // of which one warp finds the threshold, without barriers

/// A token of a list: its score or weight, and where it stands.
struct Entry {
  float value;
  int32_t place;
};

/// Calls write(to, entry) for those entries read(i), i < count, whose value is not kNothing, in their order, to = 0, 1,
/// ...; returns how many. read(i) may take what stands at i or behind it in what write fills: nothing is overwritten
/// before it has been read. All threads call.
template <typename Read, typename Write>
__device__ int pack(int count, Read read, Write write) {
  int kept = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kTeamThreads * kRun) {
    Entry entries[kRun];
    bool wanted[kRun];
#pragma unroll
    for (int nth = 0; nth < kRun; ++nth) {
      const int i = first + nth * kTeamThreads + static_cast<int>(threadIdx.x);
      entries[nth] = {kNothing, 0};
      if (i < count) entries[nth] = read(i);
      wanted[nth] = entries[nth].value != kNothing;
    }
    const Places<kTeamThreads, kRun> to(wanted);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (!wanted[i]) continue;
      write(kept + to.place[i], entries[i]);
    }
    kept += to.count;
  }
  __syncthreads();
  return kept;
}

/// A block's part of the scores that may have weight, in parts that do not depend on how many blocks there are.
struct Candidates {
  const float* scores;
  int count;
  float origin;  // a score at or below the threshold, from which it counts; the best one for softmax
  int parts = 1;
  const int* ends = nullptr;  // where parts end, if there are several

  /// Calls body(run) for all of this thread's of a part, kRun at once, kNothing where there are no more.
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

/// Adds a token with x = (alpha-1)(score - origin) to those above a threshold.
template <bool kSquare, typename Real>
__device__ void add_if_above(Excess<Real>& excess, Real x, Real threshold, Real beta) {
  const Real y = x - threshold;
  if constexpr (kSquare) {
    excess.add(max(y, Real(0)), Real(2));  // no branch
  } else if (y > 0) {
    excess.add(y, beta);
  }
}

/// By kSolvers threads, a block or a warp, each of which holds up to kHeld of the candidates. They all call.
template <bool kSquare, int kSolvers, int kHeld>
__device__ Solution<float> solve_held(const Entmax<float>& entmax, const Candidates& candidates) {
  float held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int entry = i * kSolvers + static_cast<int>(threadIdx.x);
    held[i] = entry < candidates.count ? entmax.gap * (candidates.scores[entry] - candidates.origin) : -1.0f;
  }
  return find_threshold(entmax, 0.0f, 0.0f, [&](float threshold) {
    Excess<float> own;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * kSolvers < candidates.count) add_if_above<kSquare>(own, held[i], threshold, entmax.beta);
    }
    return sum<kSolvers>(own);
  });
}

/// By a block. Not inlined, as it is seldom needed: code that is run once takes time by its length (bench/NOTES.md).
template <bool kSquare>
__device__ ENTMAXKV_NOINLINE Solution<float> solve_by_block(Entmax<float> entmax, Candidates candidates) {
  return solve_held<kSquare, kTeamThreads, kFewTokens / kTeamThreads>(entmax, candidates);
}

/// Of few candidates, all in this block. All threads call.
template <bool kSquare>
__device__ Solution<float> solve_few(const Entmax<float>& entmax, const Candidates& candidates) {
  if (candidates.count > kOfWarp) return solve_by_block<kSquare>(entmax, candidates);
  __shared__ Solution<float> s_solution;
  if (threadIdx.x < 32) {
    const Solution<float> solution = solve_held<kSquare, 32, kOfWarp / 32>(entmax, candidates);
    if (threadIdx.x == 0) s_solution = solution;
  }
  __syncthreads();
  return s_solution;
}

/// By the team. All its threads call.
template <bool kSquare, typename Real>
__device__ ENTMAXKV_NOINLINE Solution<Real> solve_many(Team& team, const Entmax<Real>& entmax,
                                                       const Candidates& candidates) {
  return find_threshold(entmax, Real(0), Real(0), [&](Real threshold) {
    return team.sum_of_parts<Excess<double>>(candidates.parts, [&](int part) {
      Excess<double> own;
      candidates.visit(part, [&](const float (&run)[kRun]) {
        Excess<Real> few;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          add_if_above<kSquare>(few, entmax.gap * (static_cast<Real>(run[i]) - candidates.origin), threshold,
                                entmax.beta);
        }
        own = own + Excess<double>{few.mass, few.slope};
      });
      return own;
    });
  });
}

/// What makes weights of a head's scores.
struct Weights {
  Entmax<double> entmax;
  float origin;
  double threshold, mass;
  float tau;

  /// Powers above 15 magnify the rounding of fp32 too much.
  template <typename Real>
  __device__ static bool are_in_float(const Entmax<Real>& entmax) {
    return entmax.beta <= 15;
  }

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

/// The weights of a head of which all tokens that can have weight are candidates: up to kFewTokens of them, and all in
/// this block, or any number over the team. All threads call, of the block or of the team.
__device__ inline Weights find_weights(Team& team, const Entmax<double>& entmax, Candidates candidates, bool few) {
  const float origin = candidates.origin;
  Weights weights{entmax, origin, 0, 0, 0};
  if (entmax.is_softmax()) {
    Team all = few ? Team::block() : team;
    weights.mass = all.sum_of_parts<double>(candidates.parts, [&](int part) {
      double own = 0;
      candidates.visit(part, [&](const float (&run)[kRun]) {
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
    if (few) return take(solve_few<square>(real, candidates));  // mass is at least 2^-10 of the slope
    constexpr float kClose = 0x1p-8f;
    Solution<float> solution = solve_many<square>(team, real, candidates);
    if (solution.mass < kClose * solution.slope) {  // many tokens just above: fp32 must count from closer by
      const float below = 0x1p-21f * (fabsf(origin) + real.beta);
      weights.origin = candidates.origin = origin + solution.threshold * real.beta - below;
      solution = solve_many<square>(team, real, candidates);
    }
    take(solution);
  };
  if (!Weights::are_in_float(entmax)) {
    Team all = few ? Team::block() : team;
    take(solve_many<false>(all, entmax, candidates));
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
