// select_gaussian on the GPU.
//   mean, std [batch, q_heads, max_pages] -> selected [batch, kv_heads, max_pages] ascending, counts [batch, kv_heads]
//   1. threshold: a block per query head finds where the page mixture expects weights that sum to 1,
//      sum_pages tokens E[(z - tau)_+^beta] = 1 with z ~ N((alpha-1) mean, (alpha-1)^2 std^2), by Newton steps from
//      the left (entmax.h); the best page mean minus 1 lies left of it, by Jensen's inequality
//   2. collect: a block per KV head lists the pages that any head of the group wants, and the last page
#include "../gaussian.h"
#include "kernels.h"
#include "page_list.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kThreads = 512;
constexpr double kFloatRangeBeta = 4;  // beyond, the powers of wide spreads may leave fp32's range

/// A head wants the pages whose expected best z, from (alpha-1) centre on, is above `least`.
struct Threshold {
  float gap;     // alpha - 1
  float centre;  // the best page mean
  float least;
};

/// The threshold, from (alpha-1) `best` on, of the mixture of a row's pages. All threads call.
template <typename Real>
__device__ Real solve_mixture(const Entmax<Real>& entmax, const float* mean, const float* std, float best, int seq_len,
                              int page_size) {
  Real tau = -1;
  constexpr int kMostSteps = 32;  // a guard: steps stop once they no longer move tau
  for (int step = 0; step < kMostSteps; ++step) {
    Excess<double> own;
    for (int page = threadIdx.x; page * page_size < seq_len; page += kThreads) {
      Excess<Real> excess;
      add_expected<Real>(excess, entmax.gap * (mean[page] - best) - tau, entmax.gap * std[page], entmax.beta,
                         min(page_size, seq_len - page * page_size));
      own = own + Excess<double>{excess.mass, excess.slope};
    }
    const Excess<double> all = sum<kThreads>(own);
    const Real move = entmax.step({static_cast<Real>(all.mass), static_cast<Real>(all.slope)});
    if (!(move > Real(1e-6))) break;
    tau += move;
  }
  return tau;
}

__global__ void __launch_bounds__(kThreads, 1) solve(SelectGaussian op, Threshold* thresholds) {
  take_turn();
  const int head = blockIdx.x;
  const int64_t row = blockIdx.y;
  const int64_t at = row * op.q_heads + head;
  const float* mean = op.mean + at * op.max_pages;
  const float* std = op.std + at * op.max_pages;
  const int seq_len = length_of(op, row);
  const Entmax<double> entmax(op.alpha.of(head));
  Threshold threshold{static_cast<float>(entmax.gap), 0, kNothing};
  if (!entmax.is_softmax() && op.margin < -kNothing) {
    float best = kNothing;
    for (int page = threadIdx.x; page * op.page_size < seq_len; page += kThreads) best = fmaxf(best, mean[page]);
    best = largest<kThreads>(best);
    double tau;
    if (entmax.beta <= kFloatRangeBeta) {
      tau = solve_mixture<float>(Entmax<float>(entmax), mean, std, best, seq_len, op.page_size);
    } else {
      tau = solve_mixture<double>(entmax, mean, std, best, seq_len, op.page_size);
    }
    threshold.centre = best;
    threshold.least = static_cast<float>(tau - op.margin);
  }
  if (threadIdx.x == 0) thresholds[at] = threshold;
}

__global__ void __launch_bounds__(kThreads, 1) collect(SelectGaussian op, const Threshold* thresholds) {
  take_turn();
  const int64_t row = blockIdx.y;
  const int64_t list = row * op.kv_heads + blockIdx.x;
  const int used = ceil_div(length_of(op, row), op.page_size);
  const auto page_best = static_cast<float>(op.page_best);
  int32_t* selected = op.selection.row(list);
  const int count = collect_pages<kThreads>(selected, 0, used, [&](int page) {
    bool wanted = page == used - 1;
    for (int h = 0; h < op.group; ++h) {
      const int64_t head = list * op.group + h;
      const Threshold threshold = thresholds[head];
      const int64_t at = head * op.max_pages + page;
      const float best = threshold.gap * (op.mean[at] - threshold.centre + op.std[at] * page_best);
      wanted |= threshold.least == kNothing || best > threshold.least;
    }
    return wanted;
  });
  for (int to = count + threadIdx.x; to < op.selection.max_selected; to += kThreads) selected[to] = -1;
  if (threadIdx.x == 0) op.selection.counts[list] = count;
}

}  // namespace

int64_t workspace_bytes(const SelectGaussian& op) {
  return int64_t{op.batch} * op.q_heads * static_cast<int64_t>(sizeof(Threshold));
}

void select_gaussian(const SelectGaussian& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  auto* thresholds = static_cast<Threshold*>(workspace);
  launch("select_gaussian", solve, {dim3(op.q_heads, op.batch), kThreads}, stream, op, thresholds);
  launch("select_gaussian", collect, {dim3(op.kv_heads, op.batch), kThreads}, stream, op, thresholds);
}

}  // namespace entmaxkv::cuda
