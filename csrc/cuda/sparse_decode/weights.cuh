// The threshold of one head from the scores of its near tokens, and the weight of a score, by a team.
#pragma once

#include "../../entmax.h"
#include "../common/fast_math.cuh"
#include "team.cuh"

namespace entmaxkv::cuda {

constexpr int kRun = 8;           // scores that a lane reads at once, where near tokens are many
constexpr int kFewTokens = 2048;  // near tokens for which there is room in a block's shared memory
constexpr int kOfWarp = 256;      // near tokens that one warp solves, without barriers

/// The scores of a head's near tokens.
struct NearScores {
  float* scores;
  int count;
  // Thresholds are relative to (alpha-1) origin. The search for them begins at `start`.
  float origin, start;

  /// Sets origin and start from the best score and the floor (near_tokens.cuh). The origin is the floor: fp32 then
  /// tells apart scores that are just above the threshold. Scores of more than about 2^24 are so coarse that the floor
  /// can lie further below the best score than weights reach; powers would overflow. Then, and for softmax, the origin
  /// is the best score.
  __device__ void set_origin(const Entmax<float>& entmax, float best, float floor) {
    const bool close = best - floor <= entmax.beta + 1 && !entmax.is_softmax();
    origin = close ? floor : best;
    start = close ? 0 : -1;
  }

  /// Returns whether one block solves.
  __device__ bool few() const { return count <= kFewTokens; }

  /// Calls body(run) for this lane's scores of a part, kRun at once, filled up with kNothing. All lanes call.
  template <typename Body>
  __device__ void visit(int part, Body body) const {
    const int end = first_of_part(count, part + 1);
    for (int first = first_of_part(count, part) + static_cast<int>(threadIdx.x % 32); first < end; first += 32 * kRun) {
      float run[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) run[i] = first + i * 32 < end ? scores[first + i * 32] : kNothing;
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

/// Finds the threshold, relative to (alpha-1) origin, from few near tokens with kSolvers threads, a block or a warp.
/// All these threads call and all get the result. least_move: as in find_threshold.
template <bool kSquare, int kSolvers>
__device__ Solution<float> solve_by(const Entmax<float>& entmax, const NearScores& near, float least_move = 0) {
  return find_threshold(entmax, near.start, least_move, [&](float threshold) {
    Excess<float> own;
#pragma unroll 1
    for (int i = threadIdx.x; i < near.count; i += kSolvers) {
      add_if_above<kSquare>(own, entmax.gap * (near.scores[i] - near.origin), threshold, entmax.beta);
    }
    return sum<kSolvers>(own);
  });
}

/// Solves for at most kOfWarp near tokens by one warp. All threads of the block call and all get the result.
template <bool kSquare>
__device__ Solution<float> solve_by_warp(const Entmax<float>& entmax, const NearScores& near, float least_move = 0) {
  __shared__ Solution<float> s_solution;
  if (threadIdx.x < 32) {
    const Solution<float> solution = solve_by<kSquare, 32>(entmax, near, least_move);
    if (threadIdx.x == 0) s_solution = solution;
  }
  __syncthreads();
  return s_solution;
}

/// Solves for any number of near tokens. All threads of the team call and all get the result.
template <bool kSquare, typename Real>
__device__ ENTMAXKV_NOINLINE Solution<Real> solve_many(Team& team, const Entmax<Real>& entmax, const NearScores& near) {
  return find_threshold(entmax, static_cast<Real>(near.start), Real(0), [&](Real threshold) {
    return team.sum_of_parts<Excess<double>>([&](int part) {
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
class Weights {
 public:
  float tau;

  /// The weights that a solution gives; `origin` as in NearScores.
  template <typename Real>
  __device__ Weights(const Entmax<double>& entmax, float origin, const Solution<Real>& solution)
      : Weights(entmax, origin, solution.threshold, solution.mass,
                static_cast<float>(solution.threshold + entmax.gap * origin)) {}

  __device__ Weights(const Entmax<double>& entmax, float origin, double threshold, double mass, float tau)
      : tau(tau),
        square_(entmax.beta == 2),
        origin_(origin),
        gap_in_float_(static_cast<float>(entmax.gap)),
        threshold_in_float_(static_cast<float>(threshold)),
        per_mass_(reciprocal(static_cast<float>(mass))),
        entmax_(entmax),
        threshold_(threshold),
        mass_(mass) {}

  /// Returns whether fp32 is precise enough. Powers above 15 magnify its rounding too much.
  template <typename Real>
  __device__ static bool are_in_float(const Entmax<Real>& entmax) {
    return entmax.beta <= 15;
  }

  /// Returns the score at the threshold, tau / (alpha - 1).
  __device__ double least_score() const { return origin_ + threshold_ * entmax_.beta; }

  /// Returns the weight p of a score.
  __device__ float of(float score) const {
    if (!square_) return any_of(score);
    const float y = fmaxf(gap_in_float_ * (score - origin_) - threshold_in_float_, 0);  // NaN becomes 0
    return y * y * per_mass_;
  }

 private:
  __device__ ENTMAXKV_NOINLINE float any_of(float score) const {
    if (entmax_.is_softmax()) return expf(score - origin_) * per_mass_;
    return are_in_float(entmax_) ? power_of<float>(score) : power_of<double>(score);
  }

  template <typename Real>
  __device__ float power_of(float score) const {
    const Real y =
        static_cast<Real>(entmax_.gap) * (static_cast<Real>(score) - origin_) - static_cast<Real>(threshold_);
    return static_cast<float>(y > 0 ? power(y, static_cast<Real>(entmax_.beta)) / static_cast<Real>(mass_) : 0);
  }

  bool square_;  // beta is 2
  float origin_, gap_in_float_, threshold_in_float_, per_mass_;
  Entmax<double> entmax_;
  double threshold_, mass_;
};

/// Finds the weights of a head from its near tokens: any alpha, any number. If near.few(), the team must be
/// this block. All threads of the team call and all get the result.
__device__ ENTMAXKV_NOINLINE inline Weights find_any_weights(Team& team, const Entmax<double>& entmax,
                                                             NearScores near) {
  const float origin = near.origin;
  if (entmax.is_softmax()) {
    const auto mass = team.sum_of_parts<double>([&](int part) {
      double own = 0;
      near.visit(part, [&](const float (&run)[kRun]) {
        for (const float score : run) own += expf(score - origin);
      });
      return own;
    });
    return {entmax, origin, 0, mass, origin + logf(static_cast<float>(mass))};
  }
  const auto weights_in_float = [&](const Entmax<float>& real, auto square) {
    constexpr float kClose = 0x1p-8f;
    const auto solve = [&] {
      return !near.few()            ? solve_many<square>(team, real, near)
             : near.count > kOfWarp ? solve_by<square, kTeamThreads>(real, near)
                                    : solve_by_warp<square>(real, near);
    };
    Solution<float> solution = solve();
    // With many tokens just above the threshold, fp32 needs a closer origin. The best score is as close as can be.
    if (near.start == 0 && solution.mass < kClose * solution.slope) {
      __syncthreads();  // all warps have read the solution of solve_by_warp
      const float below = 0x1p-21f * (fabsf(origin) + real.beta);
      near.origin = origin + solution.threshold * real.beta - below;
      solution = solve();
    }
    return Weights(entmax, near.origin, solution);
  };
  if (!Weights::are_in_float(entmax)) return {entmax, origin, solve_many<false>(team, entmax, near)};
  return entmax.beta == 2 ? weights_in_float(Entmax<float>(entmax), std::true_type{})  // alpha = 1.5
                          : weights_in_float(Entmax<float>(entmax), std::false_type{});
}

/// Does what find_any_weights does. The usual case has code of its own, as short as possible: code that runs once waits
/// for instructions (bench/NOTES.md).
__device__ inline Weights find_weights(Team& team, const Entmax<double>& entmax, const NearScores& near) {
  if (entmax.beta != 2 || near.count > kOfWarp) return find_any_weights(team, entmax, near);
  constexpr float kLeastMove = 0x1p-26f;  // of so few tokens none has a weight that smaller moves change
  const Solution<float> solution = solve_by_warp<true>(Entmax<float>(entmax), near, kLeastMove);
  return {entmax, near.origin, solution};
}

}  // namespace entmaxkv::cuda
