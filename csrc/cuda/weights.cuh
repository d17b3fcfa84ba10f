// From the scores of one head to its weights, by one block: pack what is within beta of the best score, solve the
// threshold on it, pack the weights of what is above.
#pragma once

#include "device.cuh"

namespace entmaxkv::cuda {

constexpr int kThreads = 512;  // of the block
constexpr int kRun = 4;        // successive entries that a thread takes at once

struct Entry {
  float score;
  int32_t place;
};

/// Fills scores and places with map(score) and place of those entries 0 ... count - 1 for which that is not kNothing,
/// in their order; returns how many. read(i) may take entry i from scores and places themselves, at i or behind it:
/// nothing is overwritten before it has been read. All threads call.
template <typename Read, typename Map>
__device__ int pack(float* scores, int32_t* places, int count, Read read, Map map) {
  int kept = 0;
  for (int first = 0; first < count; first += kThreads * kRun) {
    Entry entries[kRun];
    int own = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int from = first + static_cast<int>(threadIdx.x) * kRun + i;
      entries[i] = {kNothing, 0};
      if (from < count) {
        entries[i] = read(from);
        entries[i].score = map(entries[i].score);
      }
      own += entries[i].score != kNothing;
    }
    int more;
    int to = kept + exclusive_scan<kThreads>(own, more);
    kept += more;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (entries[i].score == kNothing) continue;
      scores[to] = entries[i].score;
      places[to++] = entries[i].place;
    }
  }
  __syncthreads();
  return kept;
}

/// A head's scores within beta of the best one. Few stay in registers, many are read again each time.
class Candidates {
 public:
  __device__ Candidates(const float* scores, int count) : scores_(scores), count_(count) { load(0); }

  /// Calls body(score) for all of this thread's. All threads call.
  template <typename Body>
  __device__ void visit(Body body) {
    for (int first = 0; first < count_; first += kThreads * kRun) {
      if (count_ > kThreads * kRun) load(first);
#pragma unroll
      for (int i = 0; i < kRun; ++i) body(run_[i]);
    }
  }

 private:
  __device__ void load(int first) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int entry = first + static_cast<int>(threadIdx.x) * kRun + i;
      run_[i] = entry < count_ ? scores_[entry] : kNothing;
    }
  }

  const float* scores_;
  int count_;
  float run_[kRun];
};

/// A threshold, and the mass of the tokens above it.
template <typename Real>
struct Solution {
  Real threshold, mass;  // threshold relative to (alpha-1) best
};

/// Newton's steps from the left (entmax.h). All threads call.
template <typename Real>
__device__ Solution<Real> solve_threshold(const Entmax<Real>& entmax, float best, Candidates& candidates) {
  constexpr Real kStill = sizeof(Real) == 4 ? Real(1e-7) : Real(1e-12);  // relative to the threshold
  constexpr int kMostSteps = 64;                                         // a guard: convergence is quadratic
  Solution<Real> solution{-1, 1};
  for (int step = 0; step < kMostSteps; ++step) {
    Excess<double> own;
    candidates.visit([&](float score) {
      const Real y = entmax.gap * (static_cast<Real>(score) - best) - solution.threshold;
      if (!(y > 0)) return;
      Excess<Real> one;
      one.add(y, entmax.beta);
      own = own + Excess<double>{one.mass, one.slope};
    });
    own = sum<kThreads>(own);
    solution.mass = static_cast<Real>(own.mass);
    const Real move = entmax.step({solution.mass, static_cast<Real>(own.slope)});
    if (!(move > kStill * fabs(solution.threshold))) break;
    solution.threshold += move;
  }
  return solution;
}

template <typename Real>
__device__ int weigh_in(const Entmax<double>& exact, float best, float* scores, int32_t* places, int count,
                        float& tau) {
  const Entmax<Real> entmax(exact);
  Candidates candidates(scores, count);
  const auto read = [=](int i) { return Entry{scores[i], places[i]}; };
  const auto unless_zero = [](float weight) { return weight > 0 ? weight : kNothing; };
  if (entmax.is_softmax()) {
    double own = 0;
    candidates.visit([&](float score) { own += expf(score - best); });
    const auto mass = static_cast<float>(sum<kThreads>(own));
    tau = best + logf(mass);
    return pack(scores, places, count, read, [=](float score) { return unless_zero(expf(score - best) / mass); });
  }
  const Solution<Real> solution = solve_threshold(entmax, best, candidates);
  tau = static_cast<float>(solution.threshold + exact.gap * best);
  return pack(scores, places, count, read, [=](float score) {
    const Real y = entmax.gap * (static_cast<Real>(score) - best) - solution.threshold;
    return unless_zero(static_cast<float>(y > 0 ? power(y, entmax.beta) / solution.mass : 0));
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
