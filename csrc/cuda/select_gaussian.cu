// select_gaussian on the GPU.
//   mean, std [batch, q_heads, max_pages] -> selected [batch, kv_heads, max_pages] ascending, counts [batch, kv_heads]
// Grid (blocks of a cluster, KV head, row); a cluster works for one list of pages, each of its blocks for a slice.
//   1. threshold of each query head: where the page mixture expects weights that sum to 1,
//      sum_pages tokens E[(z - tau)_+^beta] = 1 with z ~ N((alpha-1) mean, (alpha-1)^2 std^2), by Newton's steps
//      (entmax.h). A sample of the pages, each standing for others, says where to begin.
//   2. collect: the pages that any head of the group wants, and the last page, in ascending order
#include "../gaussian.h"
#include "kernels.h"
#include "page_list.cuh"
#include "team.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kWarps = kThreads / 32;  // of a block; those of head h are h, h + heads, ...
constexpr int kSlice = 256;            // pages of a block, while the cluster can grow
constexpr double kFloatRangeBeta = 4;  // beyond, the powers of wide spreads may leave fp32's range

/// The pages of one head: their scores are normal.
struct Mixture {
  const float *mean, *std;
  int pages;  // in use
  int seq_len, page_size;
  float centre;  // the best mean, from which thresholds count

  /// Adds what `copies` of a page expect above a threshold.
  template <typename Real>
  __device__ void add(Excess<Real>& excess, const Entmax<Real>& entmax, int page, Real threshold, Real copies) const {
    add_expected<Real>(excess, entmax.gap * (mean[page] - centre) - threshold, entmax.gap * std[page], entmax.beta,
                       copies * min(page_size, seq_len - page * page_size));
  }

  /// A lane's part of what the pages begin, begin + step, ... before end expect above a threshold.
  template <typename Real>
  __device__ ENTMAXKV_NOINLINE Excess<double> excess(const Entmax<Real>& entmax, double threshold, int begin, int end,
                                                     int step) const {
    Excess<Real> own;
    for (int page = begin; page < end; page += step) add(own, entmax, page, static_cast<Real>(threshold), Real(1));
    return {own.mass, own.slope};
  }

  /// Where a sample of the pages puts the threshold. All lanes of a warp call.
  template <typename Real>
  __device__ ENTMAXKV_NOINLINE Real guess(const Entmax<Real>& entmax) const {
    constexpr int kSample = 64, kMostSteps = 32;
    const int sample = min(pages, kSample);
    Real threshold = -1;
    for (int step = 0; step < kMostSteps; ++step) {
      Excess<Real> own;
      for (int nth = threadIdx.x % 32; nth < sample; nth += 32) {
        add(own, entmax, static_cast<int>(int64_t{nth} * pages / sample), threshold, Real(pages) / sample);
      }
      const Real move = entmax.step(sum<32>(own));
      if (!(move > Real(1e-3))) break;
      threshold += move;
    }
    return threshold;
  }
};

/// A head wants the pages whose expected best z, from (alpha-1) centre on, is above `least`. Read 16 bytes at a time.
struct alignas(16) Threshold {
  float gap;     // alpha - 1
  float centre;  // the best page mean
  float least;
};

/// Calls take(total), by thread h for head h, with the combination of the values of its warps in all blocks. All
/// threads of the cluster call. Of two calls that follow each other the first one's values have been read when the
/// barrier of the second one opens: they alternate between two turns.
template <typename Value, typename Combine, typename Take>
__device__ void reduce_heads(int turn, int heads, Value value, Combine combine, Take take) {
  __shared__ Value s_warps[kWarps], s_heads[2][kWarps];
  const int thread = threadIdx.x;
  for (int distance = 16; distance > 0; distance /= 2) value = combine(value, shuffle_xor(value, distance));
  if (thread % 32 == 0) s_warps[thread / 32] = value;
  __syncthreads();
  if (thread < heads) {
    value = s_warps[thread];
    for (int warp = thread + heads; warp < kWarps; warp += heads) value = combine(value, s_warps[warp]);
    s_heads[turn][thread] = value;
  }
  cluster::sync();
  if (thread < heads) {
    Value each[cluster::kMostBlocks];
#pragma unroll
    for (int rank = 0; rank < cluster::kMostBlocks; ++rank) {
      each[rank] = cluster::of(min(rank, cluster::size() - 1), s_heads[turn][thread]);
    }
    value = each[0];
#pragma unroll
    for (int rank = 1; rank < cluster::kMostBlocks; ++rank) {
      if (rank < cluster::size()) value = combine(value, each[rank]);
    }
    take(value);
  }
  __syncthreads();
}

/// Finds the thresholds of heads first ... first + heads - 1 of a row, by the pages begin ... end - 1 and those of the
/// cluster's other blocks. All threads of the cluster call.
__device__ void find_thresholds(const SelectGaussian& op, int64_t row, int first, int heads, int begin, int end,
                                Threshold* s_thresholds) {
  constexpr double kStill = 3e-4;  // the next step, of the order of its square, would not show in fp32
  constexpr int kMostSteps = 32;   // a guard
  __shared__ float s_centre[kWarps];
  __shared__ double s_tau[kWarps];
  __shared__ bool s_moving[kWarps];
  __shared__ int s_any_moving;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int head = first + warp % heads;
  const int own_begin = begin + warp / heads * 32 + lane, own_step = ceil_div(kWarps - warp % heads, heads) * 32;
  const Entmax<double> entmax(op.alpha.of(head));
  const int64_t at = (row * op.q_heads + head) * op.max_pages;
  const int seq_len = length_of(op, row);
  Mixture mixture{op.mean + at, op.std + at, ceil_div(seq_len, op.page_size), seq_len, op.page_size, kNothing};
  const bool in_float = entmax.beta <= kFloatRangeBeta;

  for (int page = own_begin; page < end; page += own_step) mixture.centre = fmaxf(mixture.centre, mixture.mean[page]);
  reduce_heads(
      0, heads, mixture.centre, [](float a, float b) { return fmaxf(a, b); },
      [&](float best) { s_centre[thread] = best; });
  mixture.centre = s_centre[warp % heads];
  if (warp < heads) {
    const bool wanted = !entmax.is_softmax() && op.margin < -kNothing;
    double tau = -1;
    if (wanted) {
      tau = in_float ? mixture.guess(Entmax<float>(entmax)) : mixture.guess(entmax);
    }
    if (lane == 0) {
      s_tau[warp] = tau;
      s_moving[warp] = wanted;
      s_thresholds[warp] = {static_cast<float>(entmax.gap), mixture.centre, kNothing};
    }
  }
  if (thread == 0) s_any_moving = true;
  __syncthreads();
  for (int step = 0; s_any_moving && step < kMostSteps; ++step) {
    const double tau = s_tau[warp % heads];
    Excess<double> own;
    if (s_moving[warp % heads]) {
      own = in_float ? mixture.excess(Entmax<float>(entmax), tau, own_begin, end, own_step)
                     : mixture.excess(entmax, tau, own_begin, end, own_step);
    }
    reduce_heads((step + 1) % 2, heads, own, [](const auto& a, const auto& b) { return a + b; },
                 [&](const auto& all) {
                   if (thread == 0) s_any_moving = false;
                   if (!s_moving[thread]) return;
                   const Entmax<double> its_entmax(op.alpha.of(first + thread));
                   // A step from the right lands left of the solution. The best mean minus 1 lies left of it by
                   // Jensen's inequality.
                   const double next = all.mass > 1e-3 ? fmax(s_tau[thread] + its_entmax.step(all), -1.0) : -1.0;
                   s_moving[thread] = fabs(next - s_tau[thread]) > kStill;
                   s_tau[thread] = next;
                   s_thresholds[thread].least = static_cast<float>(next - op.margin);
                 });
    if (thread < heads && s_moving[thread]) s_any_moving = true;
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads, 1) select(SelectGaussian op, int slice_pages) {
  take_turn();
  auto* s_thresholds = reinterpret_cast<Threshold*>(dynamic_shared());  // [group]
  const int64_t row = blockIdx.z;
  const int64_t list = row * op.kv_heads + blockIdx.y;
  const int used = ceil_div(length_of(op, row), op.page_size);
  const int begin = min(cluster::rank() * slice_pages, used), end = min(begin + slice_pages, used);
  for (int h = 0; h < op.group; h += kWarps) {
    find_thresholds(op, row, blockIdx.y * op.group + h, min(kWarps, op.group - h), begin, end, s_thresholds + h);
  }
  const auto page_best = static_cast<float>(op.page_best);
  const auto wanted = [&](int page) {
    bool wanted = page == used - 1;
    for (int h = 0; h < op.group; ++h) {
      const Threshold threshold = s_thresholds[h];
      const int64_t at = (list * op.group + h) * op.max_pages + page;
      const float best = threshold.gap * (op.mean[at] - threshold.centre + op.std[at] * page_best);
      wanted |= threshold.least == kNothing || best > threshold.least;
    }
    return wanted;
  };
  int own = 0;
  for (int page = begin + static_cast<int>(threadIdx.x); page < end; page += kThreads) own += wanted(page);
  Team team = Team::cluster();
  const Team::Part part = team.part(sum<kThreads>(own));
  cluster::arrive();  // this block reads no other's memory any more
  int32_t* selected = op.selection.row(list);
  collect_pages<kThreads>(selected + part.before, begin, end, wanted);
  const int thread = cluster::rank() * kThreads + static_cast<int>(threadIdx.x);
  for (int to = part.total + thread; to < op.selection.max_selected; to += cluster::size() * kThreads)
    selected[to] = -1;
  if (thread == 0) op.selection.counts[list] = part.total;
  cluster::wait();
}

}  // namespace

void select_gaussian(const SelectGaussian& op, cudaStream_t stream) {
  if (op.batch == 0) return;
  int blocks = 1;
  const auto room = [&] { return 2LL * blocks * op.kv_heads * op.batch <= multiprocessors(); };
  while (blocks < cluster::most_blocks() && blocks * kSlice < op.max_pages && room()) blocks *= 2;
  const int shared = op.group * static_cast<int>(sizeof(Threshold));
  launch("select_gaussian", select, {dim3(blocks, op.kv_heads, op.batch), kThreads, blocks, shared}, stream, op,
         ceil_div(op.max_pages, blocks));
}

}  // namespace entmaxkv::cuda
