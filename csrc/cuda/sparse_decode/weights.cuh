// The threshold of one head from the scores of its near tokens, and the weight of a score.
#pragma once

#include "../../entmax.h"
#include "../common/fast_math.cuh"
#include "team.cuh"

namespace entmaxkv::cuda {

constexpr int kFewTokens = 4096;  // near tokens for which there is room in a block's shared memory

/// Returns how far below the best score of a head a score with weight is at most, with room for rounding.
template <typename Real>
__device__ float reach_of(const Entmax<Real>& entmax) {
  return static_cast<float>(entmax.beta) * (1 + 0x1p-22f);
}

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
};

/// The threads of one warp, as a Team.
struct Warp {
  static constexpr int kThreads = 32;

  template <typename Value>
  static __device__ Value sum(const Value& value) {
    return cuda::sum<kThreads>(value);
  }
};

/// Few scores in shared memory, for `solvers`: a Team of one block, or a Warp.
template <typename Solvers>
struct FewScores {
  Solvers& solvers;
  const float* scores;
  int count;

  /// Returns the sum of what add(own, score) adds up for all scores, and for some that are kNothing. All threads of the
  /// solvers call and all get the result.
  template <typename Value, typename Add>
  __device__ Value sum(Add add) const {
    constexpr int kAtOnce = 4;
    Value own{};
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kAtOnce * Solvers::kThreads) {
      float some[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = begin + n * Solvers::kThreads + static_cast<int>(threadIdx.x);
        some[n] = i < count ? scores[i] : kNothing;
      }
#pragma unroll
      for (const float score : some) add(own, score);
    }
    return solvers.sum(own);
  }
};

/// Scores that the blocks of a team divide; each(use) calls use(score) for those of this block. As FewScores.
template <typename Each>
struct TeamScores {
  Team& team;
  Each each;

  template <typename Value, typename Add>
  __device__ Value sum(Add add) const {
    Value own{};
    each([&](float score) { add(own, score); });
    return team.sum(own);
  }
};
template <typename Each>
TeamScores(Team&, Each) -> TeamScores<Each>;

/// What tokens above a trial threshold add up to, and how many they are.
struct CountedExcess : Excess<float> {
  float count = 0;

  __device__ friend CountedExcess operator+(const CountedExcess& a, const CountedExcess& b) {
    return {{a.mass + b.mass, a.slope + b.slope}, a.count + b.count};
  }
};

/// Entmax with approximate powers: their relative error is about 2^-21 beta.
template <bool kSquare>  // beta is 2
struct RoughEntmax : Entmax<float> {
  static constexpr float kMostBeta = 64;  // beyond, the error is too large

  __device__ explicit RoughEntmax(const Entmax<float>& entmax) : Entmax<float>(entmax) {}

  /// Adds a token of excess y, if y > 0.
  __device__ void add(Excess<float>& all, float y) const {
    const float excess = fmaxf(y, 0);
    float derivative = excess;
    if constexpr (!kSquare) derivative = y > 0 ? rough_power(y, beta - 1) : 0;
    all.slope += derivative;
    all.mass = fmaf(derivative, excess, all.mass);
  }

  __device__ void add(CountedExcess& all, float y) const {
    add(static_cast<Excess<float>&>(all), y);
    all.count += y > 0 ? 1 : 0;
  }

  /// Does what Entmax::step does, up to an absolute error of about 2^-20.
  __device__ float step(const Excess<float>& all) const {
    const float root = kSquare ? square_root(all.mass) : rough_power(all.mass, 1 - gap);
    return (all.mass - root) * reciprocal(all.slope);
  }

 private:
  static __device__ float rough_power(float x, float exponent) {
    return power_of_two(1.4426950408889634f * exponent * logarithm(fmaxf(x, 1e-30f)));
  }
};

/// Finds a threshold up to about 2^-18, from a `start` below it on, from scores; they are relative to `origin`. Ends
/// when a step moves it by no more than `least_move`, or is_enough(sums) where sums, a Sums, are those of the tokens
/// above. `scores` is as FewScores. All its threads call and all get the result.
template <bool kSquare, typename Sums, typename Scores, typename IsEnough>
__device__ float rough_threshold(const Entmax<float>& entmax, float origin, float start, float least_move,
                                 const Scores& scores, IsEnough is_enough) {
  constexpr int kMostSteps = 16;
  const RoughEntmax<kSquare> rough(entmax);
  float threshold = start;
#pragma unroll 1
  for (int step = 0; step < kMostSteps; ++step) {
    const auto all = scores.template sum<Sums>(
        [&](Sums& own, float score) { rough.add(own, fmaf(rough.gap, score - origin, -threshold)); });
    if (is_enough(all)) break;
    const float move = rough.step(all);
    if (!(move > 0)) break;  // NaN ends the search, too
    threshold += move;
    if (move <= least_move) break;
  }
  return threshold;
}

/// Improves a threshold until it is right in double precision. Sums in fp32 would depend on the near tokens without
/// weight, which change their order, and on the origin. In double precision these change nothing that is left after
/// rounding to fp32. `start` is below the threshold. `scores` and the threads that call are as for rough_threshold.
template <bool kSquare, typename Scores>
__device__ double polished(const Entmax<double>& entmax, float origin, double start, double threshold,
                           const Scores& scores) {
  constexpr double kLeastMove = 0x1p-30;  // convergence is quadratic
  constexpr int kMostSteps = 64;          // a guard
#pragma unroll 1
  for (int step = 0; step < kMostSteps; ++step) {
    const auto all = scores.template sum<Excess<double>>([&](Excess<double>& own, float score) {
      const double y = entmax.gap * (double{score} - origin) - threshold;
      if constexpr (kSquare) {
        own.add(max(y, 0.0), 2.0);  // max avoids a branch
      } else if (y > 0) {
        own.add(y, entmax.beta);
      }
    });
    if (all.mass == 0 && threshold > start) {  // the rough threshold is too high: all tokens are equal and very many
      threshold = start;
      continue;
    }
    double move;
    if constexpr (kSquare) {  // Entmax::step, with a divisor in fp32
      const float root = square_root(static_cast<float>(all.mass));
      move = (all.mass - 1) * (root * reciprocal((root + 1) * static_cast<float>(all.slope)));
    } else {
      move = entmax.step(all);
    }
    threshold += move;
    if (!(fabs(move) > kLeastMove)) break;
  }
  return threshold;
}

/// Finds the threshold of near tokens, relative to (alpha-1) origin. `scores` and the threads that call are as for
/// rough_threshold.
template <bool kSquare, typename Scores>
__device__ double threshold_of(const Entmax<double>& entmax, float origin, float start, const Scores& scores) {
  constexpr float kLeastMove = 0x1p-15f;  // the next step in fp32 would be less than its rounding
  float threshold = start;
  if (entmax.beta <= RoughEntmax<kSquare>::kMostBeta) {
    threshold = rough_threshold<kSquare, Excess<float>>(Entmax<float>(entmax), origin, start, kLeastMove, scores,
                                                        [](const Excess<float>&) { return false; });
  }
  return polished<kSquare>(entmax, origin, start, threshold, scores);
}

/// The weights of a head as a function of the score.
class Weights {
 public:
  float tau;

  /// The weights above a threshold, which is relative to (alpha-1) origin. The score at the threshold is rounded to
  /// multiples of 2^-34, unless it is 2^16 or more. So what is left of other orders of sums changes no weight.
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

  /// Returns the score at the threshold, tau / (alpha - 1).
  __device__ double least_score() const { return origin_ + threshold_ * entmax_.beta; }

  /// Returns the least score with weight, p > 0, infinity if there is none up to `best`. One up to `floor` must have
  /// none. All lanes of a warp call.
  __device__ float least_with_weight(float floor, float best) const {
    if (!(of(best) > 0)) return -kNothing;
    // Mostly all scores above the one at the threshold have weight, as no square underflows.
    if (square_ && threshold_ == 0 && origin_ != 0) return nextafterf(__double2float_rd(origin_), -kNothing);
    uint32_t none = ordered(floor), some = ordered(best);
#pragma unroll 1
    while (some - none > 1) {
      // Lane i tries the end of part i of 33 equal parts.
      const uint32_t step = max((some - none) / 33, 1u), tried = none + step * (threadIdx.x % 32 + 1);
      const uint32_t has = __ballot_sync(kAllLanes, tried >= some || of(from_ordered(tried)) > 0);
      const uint32_t lanes = has ? __ffs(has) - 1 : 32;  // those before the first with weight
      if (has) some = min(some, none + step * (lanes + 1));
      none += step * lanes;
    }
    return from_ordered(some);
  }

  /// Returns the weight p of a score.
  __device__ float of(float score) const {
    if (!square_) return any_of(entmax_, origin_, threshold_, score);
    const double excess = entmax_.gap * (score - origin_) - threshold_;
    const float y = fmaxf(static_cast<float>(excess), 0);  // NaN becomes 0
    return y * y;
  }

 private:
  __device__ Weights(const Entmax<double>& entmax, double origin, double threshold_or_mass, float tau)
      : tau(tau), square_(entmax.beta == 2), origin_(origin), entmax_(entmax), threshold_(threshold_or_mass) {}

  /// Its arguments are values, so that no Weights lies in memory.
  static __device__ ENTMAXKV_NOINLINE float any_of(Entmax<double> entmax, double origin, double threshold_or_mass,
                                                   float score) {
    if (entmax.is_softmax()) return expf(score - static_cast<float>(origin)) / static_cast<float>(threshold_or_mass);
    const double y = entmax.gap * (score - origin) - threshold_or_mass;
    if (!(y > 0)) return 0;
    const bool in_float = entmax.beta <= 15;  // powers above 15 magnify the rounding of fp32 too much
    return in_float ? power(static_cast<float>(y), static_cast<float>(entmax.beta))
                    : static_cast<float>(power(y, entmax.beta));
  }

  bool square_;    // beta is 2
  double origin_;  // of softmax, the best score
  Entmax<double> entmax_;
  double threshold_;  // of softmax, the mass
};

/// Finds the weights of near tokens, any alpha. `scores` and the threads that call are as for rough_threshold.
template <typename Scores>
__device__ Weights any_weights(const Entmax<double>& entmax, float origin, float start, const Scores& scores) {
  if (entmax.is_softmax()) {
    const auto mass = scores.template sum<double>([&](double& own, float score) { own += expf(score - origin); });
    return Weights::of_softmax(entmax, origin, mass);
  }
  return {entmax, origin,
          entmax.beta == 2 ? threshold_of<true>(entmax, origin, start, scores)
                           : threshold_of<false>(entmax, origin, start, scores)};
}

/// Finds the weights of a head from few near tokens, where find_weights does not.
__device__ ENTMAXKV_NOINLINE inline Weights find_any_weights(Entmax<double> entmax, NearScores near) {
  Team block = Team::block();
  return any_weights(entmax, near.origin, near.start, FewScores<Team>{block, near.scores, near.count});
}

/// Finds the weights of a head from few near tokens. The usual case, few of them and beta = 2, has one warp and code of
/// its own, as short as possible: code that runs once waits for instructions (bench/NOTES.md). All threads of the block
/// call and all get the result. Before another call there must be a barrier.
__device__ inline Weights find_weights(const Entmax<double>& entmax, const NearScores& near) {
  constexpr int kOfWarp = 512;
  if (entmax.beta != 2 || near.count > kOfWarp) return find_any_weights(entmax, near);
  __shared__ double s_threshold;
  if (threadIdx.x < 32) {
    Warp warp;
    const double threshold =
        threshold_of<true>(entmax, near.origin, near.start, FewScores<Warp>{warp, near.scores, near.count});
    if (threadIdx.x == 0) s_threshold = threshold;
  }
  __syncthreads();
  return {entmax, near.origin, s_threshold};
}

}  // namespace entmaxkv::cuda
