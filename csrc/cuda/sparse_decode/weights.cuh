// The threshold of one head from the scores of its near tokens, and the weight of a score, by a team.
#pragma once

#include "../../entmax.h"
#include "team.cuh"

namespace entmaxkv::cuda {

constexpr int kRun = 16;          // scores that a lane reads at once, where near tokens are many
constexpr int kFewTokens = 4096;  // near tokens for which there is room in a block's shared memory
constexpr int kOfWarp = 256;      // near tokens that one warp solves where powers take long

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

/// Improves a threshold until it is right in double precision. excess_at(t) returns the sums at a trial threshold. The
/// sums of fp32 depend on the near tokens without weight, which change their order, and on the origin. In double
/// precision these change nothing that is left after rounding to fp32.
template <typename ExcessAt>
__device__ double polished(const Entmax<double>& entmax, double threshold, ExcessAt excess_at) {
#pragma unroll 1
  for (int step = 0; step < 4; ++step) {
    const double move = entmax.step(excess_at(threshold));
    threshold += move;
    if (!(fabs(move) > 0x1p-40)) break;
  }
  return threshold;
}

/// Finds the threshold, relative to (alpha-1) origin, from few near tokens with kSolvers threads, a block or a warp.
/// All these threads call and all get the result.
template <bool kSquare, int kSolvers>
__device__ double solve_by(const Entmax<double>& entmax, const NearScores& near) {
  constexpr float kLeastMove = 0x1p-21f;  // the rest is done in double precision
  const Entmax<float> in_float(entmax);
  const Solution<float> solution = find_threshold(in_float, near.start, kLeastMove, [&](float threshold) {
    Excess<float> own;
#pragma unroll(kSquare ? 4 : 1)
    for (int i = threadIdx.x; i < near.count; i += kSolvers) {
      add_if_above<kSquare>(own, in_float.gap * (near.scores[i] - near.origin), threshold, in_float.beta);
    }
    return sum<kSolvers>(own);
  });
  return polished(entmax, solution.threshold, [&](double threshold) {
    Excess<double> own;
#pragma unroll(kSquare ? 2 : 1)
    for (int i = threadIdx.x; i < near.count; i += kSolvers) {
      add_if_above<kSquare>(own, entmax.gap * (double{near.scores[i]} - near.origin), threshold, entmax.beta);
    }
    return sum<kSolvers>(own);
  });
}

/// Solves for few near tokens by one warp. All threads of the block call and all get the result.
template <bool kSquare>
__device__ double solve_by_warp(const Entmax<double>& entmax, const NearScores& near) {
  __shared__ double s_threshold;
  __syncthreads();  // all warps have read the last one
  if (threadIdx.x < 32) {
    const double threshold = solve_by<kSquare, 32>(entmax, near);
    if (threadIdx.x == 0) s_threshold = threshold;
  }
  __syncthreads();
  return s_threshold;
}

/// The sums of any number of near tokens at a trial threshold. All threads of the team call and all get the result.
template <bool kSquare, typename Real>
__device__ ENTMAXKV_NOINLINE Excess<double> excess_of_many(Team& team, const Entmax<Real>& entmax,
                                                           const NearScores& near, Real threshold) {
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
}

/// Finds the threshold from any number of near tokens, relative to (alpha-1) origin: first in Real. All threads of the
/// team call and all get the result.
template <bool kSquare, typename Real>
__device__ double solve_many(Team& team, const Entmax<double>& entmax, const NearScores& near) {
  const Entmax<Real> real(entmax);
  const Solution<Real> solution = find_threshold(real, static_cast<Real>(near.start), Real(0), [&](Real threshold) {
    return excess_of_many<kSquare, Real>(team, real, near, threshold);
  });
  return polished(entmax, solution.threshold,
                  [&](double threshold) { return excess_of_many<kSquare, double>(team, entmax, near, threshold); });
}

/// The weights of a head as a function of the score.
class Weights {
 public:
  float tau;

  /// The weights above a threshold, which is relative to (alpha-1) origin. The score at the threshold is rounded to
  /// multiples of 2^-34, unless scores are huge: so what is left of other orders of sums changes no weight.
  __device__ Weights(const Entmax<double>& entmax, float origin, double threshold)
      : Weights(entmax, origin, threshold, static_cast<float>(threshold + entmax.gap * origin)) {
    constexpr double kRound = 1.5 * 0x1p18;
    const double least = least_score();
    if (!(fabs(least) < 0x1p16)) return;
    origin_ = least + kRound - kRound;
    threshold_ = 0;
  }

  /// Returns the weights of softmax, exp(score - best) / mass.
  static __device__ Weights of_softmax(const Entmax<double>& entmax, float best, double mass) {
    return {entmax, best, mass, best + logf(static_cast<float>(mass))};
  }

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
    const float y = fmaxf(static_cast<float>(excess(score)), 0);  // NaN becomes 0
    return y * y;
  }

 private:
  __device__ Weights(const Entmax<double>& entmax, double origin, double threshold_or_mass, float tau)
      : tau(tau), square_(entmax.beta == 2), origin_(origin), entmax_(entmax), threshold_(threshold_or_mass) {}

  __device__ double excess(float score) const { return entmax_.gap * (double{score} - origin_) - threshold_; }

  __device__ ENTMAXKV_NOINLINE float any_of(float score) const {
    if (entmax_.is_softmax()) return expf(score - static_cast<float>(origin_)) / static_cast<float>(threshold_);
    const double y = excess(score);
    if (!(y > 0)) return 0;
    return are_in_float(entmax_) ? power(static_cast<float>(y), static_cast<float>(entmax_.beta))
                                 : static_cast<float>(power(y, entmax_.beta));
  }

  bool square_;    // beta is 2
  double origin_;  // of softmax, the best score
  Entmax<double> entmax_;
  double threshold_;  // of softmax, the mass
};

/// Finds the weights of a head from its near tokens: any alpha, any number. If near.few(), the team must be
/// this block. All threads of the team call and all get the result.
__device__ ENTMAXKV_NOINLINE inline Weights find_any_weights(Team& team, const Entmax<double>& entmax,
                                                             const NearScores& near) {
  const float origin = near.origin;
  if (entmax.is_softmax()) {
    const auto mass = team.sum_of_parts<double>([&](int part) {
      double own = 0;
      near.visit(part, [&](const float (&run)[kRun]) {
        for (const float score : run) own += expf(score - origin);
      });
      return own;
    });
    return Weights::of_softmax(entmax, origin, mass);
  }
  const auto threshold = [&] {
    if (!Weights::are_in_float(entmax)) return solve_many<false, double>(team, entmax, near);
    if (entmax.beta == 2) return solve_many<true, float>(team, entmax, near);  // they are not few
    if (!near.few()) return solve_many<false, float>(team, entmax, near);
    return near.count > kOfWarp ? solve_by<false, kTeamThreads>(entmax, near) : solve_by_warp<false>(entmax, near);
  };
  return {entmax, origin, threshold()};
}

/// Does what find_any_weights does. The usual case has code of its own, as short as possible: code that runs once waits
/// for instructions (bench/NOTES.md).
__device__ inline Weights find_weights(Team& team, const Entmax<double>& entmax, const NearScores& near) {
  if (entmax.beta != 2 || !near.few()) return find_any_weights(team, entmax, near);
  return {entmax, near.origin, solve_by_warp<true>(entmax, near)};
}

}  // namespace entmaxkv::cuda
