// From the scores of one head to its weights, by a team.
#pragma once

#include "team.cuh"

namespace entmaxkv::cuda {

constexpr int kRun = 4;           // entries, kThreads apart, that a thread takes at once
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
  for (int first = 0; first < count; first += kThreads * kRun) {
    Entry entries[kRun];
    bool wanted[kRun];
#pragma unroll
    for (int nth = 0; nth < kRun; ++nth) {
      const int i = first + nth * kThreads + static_cast<int>(threadIdx.x);
      entries[nth] = {kNothing, 0};
      if (i < count) entries[nth] = read(i);
      wanted[nth] = entries[nth].value != kNothing;
    }
    const Places<kThreads, kRun> to(wanted);
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

/// A block's part of the scores that may have weight.
struct Candidates {
  const float* scores;
  int count;
  float origin;  // a score at or below the threshold, from which it counts; the best one for softmax
  int total;     // of all blocks of the team

  /// Calls body(run) for all of this thread's, kRun at once, kNothing where there are no more.
  template <typename Body>
  __device__ void visit(Body body) const {
    for (int first = threadIdx.x; first < count; first += kThreads * kRun) {
      float run[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) run[i] = first + i * kThreads < count ? scores[first + i * kThreads] : kNothing;
      body(run);
    }
  }
};

/// A threshold, and sum y^beta and sum y^(beta-1) over the tokens that are y above it.
template <typename Real>
struct Solution {
  Real threshold, mass, slope;  // threshold from (alpha-1) origin on
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

/// Newton's steps from the left (entmax.h), with a function that returns the excess of all tokens above a threshold.
template <typename Real, typename ExcessAbove>
__device__ Solution<Real> solve(const Entmax<Real>& entmax, ExcessAbove excess_above) {
  constexpr int kMostSteps = 64;  // a guard: convergence is quadratic
  Solution<Real> solution{0, 1, 1};
  for (int step = 0; step < kMostSteps; ++step) {
    const auto all = excess_above(solution.threshold);
    solution.mass = static_cast<Real>(all.mass);
    solution.slope = static_cast<Real>(all.slope);
    const Real next = solution.threshold + entmax.step({solution.mass, solution.slope});
    if (!(next > solution.threshold)) break;
    solution.threshold = next;
  }
  return solution;
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
  return solve(entmax, [&](float threshold) {
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
  return solve_held<kSquare, kThreads, kFewTokens / kThreads>(entmax, candidates);
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

/// In fixed point, so that it does not depend on the order of its terms.
struct ExactExcess {
  long long mass = 0, slope = 0;

  __device__ friend ExactExcess operator+(const ExactExcess& a, const ExactExcess& b) {
    return {a.mass + b.mass, a.slope + b.slope};
  }
};

/// What 1 is in fixed point, if as many numbers from 0 to 1 as there are candidates must find room.
__device__ inline double fixed_point(const Candidates& candidates) {
  return static_cast<double>(1ll << (29 + __clz(candidates.total)));
}

/// By the team. All its threads call.
template <bool kSquare, typename Real>
__device__ ENTMAXKV_NOINLINE Solution<Real> solve_many(Team& team, const Entmax<Real>& entmax,
                                                       const Candidates& candidates) {
  const double one = fixed_point(candidates);
  return solve(entmax, [&](Real threshold) {
    ExactExcess own;
    candidates.visit([&](const float (&run)[kRun]) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        Excess<Real> its;
        add_if_above<kSquare>(its, entmax.gap * (static_cast<Real>(run[i]) - candidates.origin), threshold,
                              entmax.beta);
        own.mass += std::llrint(its.mass * static_cast<Real>(one));
        own.slope += std::llrint(its.slope * static_cast<Real>(one));
      }
    });
    const ExactExcess all = team.sum(own);
    return Excess<double>{static_cast<double>(all.mass) / one, static_cast<double>(all.slope) / one};
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
    const double one = fixed_point(candidates);
    long long own = 0;
    candidates.visit([&](const float (&run)[kRun]) {
      for (const float score : run) own += std::llrint(expf(score - origin) * static_cast<float>(one));
    });
    own = few ? sum<kThreads>(own) : team.sum(own);
    weights.mass = fabsf(origin) < __builtin_huge_valf() ? static_cast<double>(own) / one : kUndefined;
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
