// From the scores of one head to its weights, by one block: pack what is within beta of the best score, solve the
// threshold on it, pack the weights of what is above.
#pragma once

#include "device.cuh"

namespace entmaxkv::cuda {

constexpr int kThreads = 512;  // of the block
constexpr int kRun = 4;        // entries, kThreads apart, that a thread takes at once

struct Entry {
  float score;
  int32_t place;
};

/// Fills scores and places with those entries read(i), i < count, whose score is not kNothing, in their order;
/// returns how many. read may take entry i from scores and places themselves, at i or behind it: nothing is overwritten
/// before it has been read. All threads call.
template <typename Read>
__device__ int pack(float* scores, int32_t* places, int count, Read read) {
  int kept = 0;
  for (int first = 0; first < count; first += kThreads * kRun) {
    Entry entries[kRun];
    bool wanted[kRun];
#pragma unroll
    for (int nth = 0; nth < kRun; ++nth) {
      const int i = first + nth * kThreads + static_cast<int>(threadIdx.x);
      entries[nth] = {kNothing, 0};
      if (i < count) entries[nth] = read(i);
      wanted[nth] = entries[nth].score != kNothing;
    }
    const Places<kThreads, kRun> to(wanted);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (!wanted[i]) continue;
      scores[kept + to.place[i]] = entries[i].score;
      places[kept + to.place[i]] = entries[i].place;
    }
    kept += to.count;
  }
  __syncthreads();
  return kept;
}

/// A head's scores.
struct Candidates {
  const float* scores;
  int count;

  /// Calls body(run) for all that fall to this one of kTeam threads, kItems at once, kNothing where there are no more.
  template <int kTeam, int kItems, typename Body>
  __device__ void visit(Body body) const {
    for (int first = threadIdx.x; first < count; first += kTeam * kItems) {
      float run[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) run[i] = first + i * kTeam < count ? scores[first + i * kTeam] : kNothing;
      body(run);
    }
  }
};

/// A threshold, and the mass of the tokens above it.
template <typename Real>
struct Solution {
  Real threshold, mass;  // threshold relative to (alpha-1) best
};

/// Newton's steps from the left (entmax.h), by kTeam threads: the block, or its first warp. They all call.
template <int kTeam, int kItems, bool kSquare, typename Real>
__device__ Solution<Real> solve_by(const Entmax<Real>& entmax, float best, const Candidates& candidates) {
  constexpr Real kStill = sizeof(Real) == 4 ? Real(1e-7) : Real(1e-12);  // relative to the threshold
  constexpr int kMostSteps = 64;                                         // a guard: convergence is quadratic
  Solution<Real> solution{-1, 1};
  for (int step = 0; step < kMostSteps; ++step) {
    Excess<double> own;
    candidates.visit<kTeam, kItems>([&](const float (&run)[kItems]) {
      Excess<Real> few;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const Real y = entmax.gap * (static_cast<Real>(run[i]) - best) - solution.threshold;
        if constexpr (kSquare) {
          few.add(max(y, Real(0)), Real(2));  // no branch
        } else if (y > 0) {
          few.add(y, entmax.beta);
        }
      }
      own = own + Excess<double>{few.mass, few.slope};
    });
    own = sum<kTeam>(own);
    solution.mass = static_cast<Real>(own.mass);
    const Real move = entmax.step({solution.mass, static_cast<Real>(own.slope)});
    if (!(move > kStill * fabs(solution.threshold))) break;
    solution.threshold += move;
  }
  return solution;
}

template <bool kSquare, typename Real>
__device__ Solution<Real> solve_threshold(const Entmax<Real>& entmax, float best, const Candidates& candidates) {
  constexpr int kFew = 16;  // of a lane
  if (candidates.count > 32 * kFew) return solve_by<kThreads, kRun, kSquare>(entmax, best, candidates);
  __shared__ Solution<Real> s_solution;
  if (threadIdx.x < 32) {
    const Solution<Real> solution = solve_by<32, kFew, kSquare>(entmax, best, candidates);
    if (threadIdx.x == 0) s_solution = solution;
  }
  __syncthreads();
  return s_solution;
}

template <typename Real>
__device__ int weigh_in(const Entmax<double>& exact, float best, float* scores, int32_t* places, int count,
                        float& tau) {
  const Entmax<Real> entmax(exact);
  const Candidates candidates{scores, count};
  const auto pack_by = [&](auto weight_of) {
    return pack(scores, places, count, [&](int i) {
      const float weight = weight_of(scores[i]);
      return Entry{weight > 0 ? weight : kNothing, places[i]};
    });
  };
  if (entmax.is_softmax()) {
    double own = 0;
    candidates.visit<kThreads, kRun>([&](const float (&run)[kRun]) {
      for (const float score : run) own += expf(score - best);
    });
    const auto mass = static_cast<float>(sum<kThreads>(own));
    tau = best + logf(mass);
    return pack_by([=](float score) { return expf(score - best) / mass; });
  }
  const bool square = entmax.beta == 2;  // alpha = 1.5
  const Solution<Real> solution =
      square ? solve_threshold<true>(entmax, best, candidates) : solve_threshold<false>(entmax, best, candidates);
  tau = static_cast<float>(solution.threshold + exact.gap * best);
  return pack_by([=](float score) {
    const Real y = entmax.gap * (static_cast<Real>(score) - best) - solution.threshold;
    return static_cast<float>(y > 0 ? power(y, entmax.beta) / solution.mass : 0);
  });
}

/// Turns the scores within beta of `best` into the weights of those above the threshold; returns how many, and tau.
/// All threads call.
__device__ inline int weigh(const Entmax<double>& entmax, float best, float* scores, int32_t* places, int count,
                            float& tau) {
  constexpr double kFloatBeta = 15;  // beyond, powers magnify the rounding of fp32 too much
  if (entmax.is_softmax() || entmax.beta <= kFloatBeta) {
    return weigh_in<float>(entmax, best, scores, places, count, tau);
  }
  return weigh_in<double>(entmax, best, scores, places, count, tau);
}

}  // namespace entmaxkv::cuda
