// select_gaussian on the GPU.
//   mean, std [batch, q_heads, max_pages] -> selected [batch, kv_heads, max_pages] ascending, counts [batch, kv_heads]
//   1. select_for_heads: a bit for each page that a query head selects. Grid (blocks of a cluster, query head, row): a
//      cluster per head, a block per slice of the pages. A page is selected if its expected best score is above the
//      head's threshold less the margin. At the threshold tau, the expected weights of the page mixture sum to 1:
//      sum_pages tokens E[(z - tau)_+^beta] = 1 with z ~ N((alpha-1) mean, (alpha-1)^2 std^2) (gaussian.h). Each block
//      solves this for a sample of the pages. The search over all pages, by the cluster, starts at the sample's tau.
//   2. list: lists the pages that any head of a group selects, in ascending order. A block per (row, KV head).
#include "../gaussian.h"
#include "common/cluster.cuh"
#include "common/copy.cuh"
#include "common/fast_math.cuh"
#include "common/reduce.cuh"
#include "common/sizes.cuh"
#include "kernels.h"

namespace entmaxkv::cuda {

namespace {

constexpr int kHeadThreads = 256, kWarps = kHeadThreads / 32;
constexpr int kListThreads = 512;
constexpr int kSample = 1024;  // pages of the sample; a head with fewer pages uses them all
constexpr int kSlice = 4096;   // most pages of a slice, unless the cluster cannot have more blocks

constexpr int kPageBytes = 2 * sizeof(float);
constexpr int kMostShared = 96 << 10;  // bytes of shared memory that every GPU has for a block, and Hopper for two

/// Returns whether fp32 suffices. Larger powers of wide spreads may leave its range.
__host__ __device__ bool in_float(const Entmax<double>& entmax) { return entmax.beta <= 4; }

/// add_expected (gaussian.h) for beta = 1, 2, 3 or 4, without branches. The relative error is at most 1e-5, and 2e-6
/// where m > -6 t.
template <int kBeta>
__device__ void add_expected(Expected<float>& expected, float m, float t, float count) {
  // A_k = E[(r + x)_+^k] / k! of a standard normal x: A_-1 = phi(r), A_0 = Phi(r), k A_k = r A_(k-1) + A_(k-2).
  // For r < 0 the recurrence is evaluated downwards, where all terms are positive. It starts from a rational
  // approximation of the ratio A_4 / A_3, which is exact to within 5e-7.
  t = fmaxf(t, fmaxf(1e-6f * m, 1e-30f));  // a smaller spread makes no difference
  const float per_t = reciprocal(t), r = m * per_t, u = fminf(fabsf(r), 12);
  float a[6];  // a[k + 1] = A_k, k = -1 ... 4
  a[5] = fmaf(fmaf(fmaf(0.00241035f, u, 0.02791801f), u, 0.14998782f), u, 0.46999258f);
  a[4] = fmaf(fmaf(fmaf(fmaf(0.00241374f, u, 0.02775083f), u, 0.16558387f), u, 0.56683592f), u, 1.0f);
#pragma unroll
  for (int k = 4; k > 0; --k) a[k - 1] = fmaf(u, a[k], static_cast<float>(k) * a[k + 1]);
  const float density = power_of_two(fmaf(-0.72134752f * r, r, -1.32574806f));  // log2(e) / 2, log2(2 pi) / 2
  const float scale = density * reciprocal(a[0]);
#pragma unroll
  for (float& each : a) each *= scale;
  if (r > 0) {
    a[1] = 1 - a[1];
#pragma unroll
    for (int k = 1; k <= kBeta; ++k) a[k + 1] = fmaf(r, a[k], a[k - 1]) * (1.0f / static_cast<float>(k));
  }
  float factor = kBeta == 1 ? count * per_t : count;
#pragma unroll
  for (int k = 2; k < kBeta; ++k) factor *= static_cast<float>(k) * t;
  expected.bend = fmaf(factor, a[kBeta - 1], expected.bend);
  expected.slope = fmaf(factor *= t, a[kBeta], expected.slope);
  expected.mass = fmaf(factor * kBeta * t, a[kBeta + 1], expected.mass);
}

/// Pages of one head. The scores of a page's tokens are modelled as normal.
struct Mixture {
  const float *mean, *std;
  int count;
  int last;                        // index of the row's last page, if it is one of these pages
  float page_tokens, last_tokens;  // tokens of a page, and of the last page
  float centre;                    // thresholds are relative to this score

  /// Returns the sum over this thread's pages of what is expected above the threshold tau. kBeta 0: any beta.
  template <int kBeta, typename Real>
  __device__ Expected<Real> above(const Entmax<Real>& entmax, Real tau) const {
    constexpr int kRun = kBeta ? 4 : 1;  // pages that a thread handles at once
    Expected<Real> own;
#pragma unroll 1
    for (int first = threadIdx.x; first < count; first += kRun * kHeadThreads) {
      float means[kRun], stds[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const bool there = first + i * kHeadThreads < count;
        means[i] = there ? mean[first + i * kHeadThreads] : kNothing;
        stds[i] = there ? std[first + i * kHeadThreads] : 0;
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const Real m = entmax.gap * (means[i] - centre) - tau, t = entmax.gap * stds[i];
        const float tokens = first + i * kHeadThreads == last ? last_tokens : page_tokens;
        if constexpr (kBeta) {
          add_expected<kBeta>(own, m, t, tokens);
        } else {
          add_expected<Real>(own, m, t, entmax.beta, tokens);
        }
      }
    }
    return own;
  }

  /// Writes a bit for each of `room` pages to `bits`: 1 if the page is selected, 0 if not or if there is no such page.
  /// A page is selected if its expected best score mean + page_best std is above `least`, or if it is the last page;
  /// all pages are if `least` is kNothing. All threads of the block call.
  __device__ void select(float page_best, float least, int room, uint32_t* bits) const {
    constexpr int kRun = 4;  // pages that a thread handles at once
#pragma unroll 1
    for (int first = threadIdx.x; first < ceil_div(room, 32) * 32; first += kRun * kHeadThreads) {
      float best[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int page = first + i * kHeadThreads;
        best[i] = page < count ? mean[page] + std[page] * page_best : kNothing;
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int page = first + i * kHeadThreads;
        const bool selected = page < count && (least == kNothing || page == last || best[i] > least);
        const uint32_t mask = __ballot_sync(kAllLanes, selected);
        if (threadIdx.x % 32 == 0 && page < room) bits[page / 32] = mask;
      }
    }
  }
};

/// Returns tau - (alpha-1) centre. Each block first solves for the sample. If the sample is not all pages, the cluster
/// then solves for all pages, of which each block has a slice, from the sample's tau on. All threads of the cluster
/// call; the result is valid in all threads.
template <int kBeta, typename Real>
__device__ ENTMAXKV_NOINLINE double solve_mixture(const Entmax<double> any_entmax, const Mixture sample,
                                                  const Mixture& own, bool sample_is_all) {
  __shared__ Search<Real> s_search;
  __shared__ Expected<Real> s_parts[2][kWarps];
  __shared__ bool s_goes_on;
  const Entmax<Real> entmax(any_entmax);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Real least = -1;  // is left of tau by Jensen's inequality
  if (threadIdx.x == 0) s_search = {least};
  __syncthreads();
  Mixture mixture = sample;
  bool together = false;
  for (int turn = 0;; turn ^= 1) {
    const auto part = sum<32>(mixture.above<kBeta>(entmax, s_search.tau));
    if (lane == 0) s_parts[turn][warp] = part;
    if (together) {
      cluster::sync();
    } else {
      __syncthreads();
    }
    if (warp == 0) {
      Expected<Real> all;
      const int parts = together ? cluster::size() * kWarps : kWarps;
#pragma unroll 1
      for (int i = lane; i < parts; i += 32) {
        all = all + (together ? cluster::of(i / kWarps, s_parts[turn][i % kWarps]) : s_parts[turn][i]);
      }
      all = sum<32>(all);
      if (lane == 0) s_goes_on = s_search.advance(entmax, all);
    }
    __syncthreads();
    if (s_goes_on) continue;
    if (together || sample_is_all) return s_search.tau;
    together = true;
    mixture = own;
    if (threadIdx.x == 0) s_search = {least, s_search.tau};
    wait_for_copies<0>();  // no barrier: each thread reads only what it has copied itself
    __syncthreads();
  }
}

/// Calls solve_mixture with the fastest kBeta and Real for the head's alpha.
template <bool kInFloat>
__device__ double solve_mixture(const Entmax<double>& entmax, const Mixture& sample, const Mixture& own,
                                bool sample_is_all) {
  if constexpr (!kInFloat) {
    if (!in_float(entmax)) return solve_mixture<0, double>(entmax, sample, own, sample_is_all);
  }
  if (entmax.beta == 1) return solve_mixture<1, float>(entmax, sample, own, sample_is_all);
  if (entmax.beta == 2) return solve_mixture<2, float>(entmax, sample, own, sample_is_all);
  if (entmax.beta == 3) return solve_mixture<3, float>(entmax, sample, own, sample_is_all);
  if (entmax.beta == 4) return solve_mixture<4, float>(entmax, sample, own, sample_is_all);
  return solve_mixture<0, float>(entmax, sample, own, sample_is_all);
}

/// Starts to copy mean and std of the pages page(i), i < count, to shared memory, as one group of copies. All threads
/// call.
template <typename Page>
__device__ void load(float* s_mean, float* s_std, const float* mean, const float* std, int count, Page page) {
#pragma unroll 1  // here and below, short code: instruction fetches bound small kernels
  for (int i = threadIdx.x; i < count; i += kHeadThreads) {
    copy_async(s_mean[i], mean + page(i));
    copy_async(s_std[i], std + page(i));
  }
  commit_copies();
}

/// Step 1. kInFloat: fp32 suffices for every head.
template <bool kInFloat>
__global__ void __launch_bounds__(kHeadThreads, kInFloat ? 4 : 2)
    select_for_heads(SelectGaussian op, int slice_pages, int held_pages, uint32_t* bits) {
  wait_for_previous_kernel();
  const int64_t row = blockIdx.z, head = row * op.q_heads + blockIdx.y;
  const int seq_len = length_of(op, row), page_bits = log2_of(op.page_size);
  const int pages = (seq_len + op.page_size - 1) >> page_bits, last = pages - 1;
  const int begin = min(cluster::rank() * slice_pages, pages), end = min(begin + slice_pages, pages);
  const float *mean = op.mean + head * op.max_pages, *std = op.std + head * op.max_pages;
  const Entmax<double> entmax(op.alpha.of(blockIdx.y));
  const bool selects_all = entmax.is_softmax() || op.margin == -kNothing, sample_is_all = pages <= kSample;

  auto* s_sample = reinterpret_cast<float*>(dynamic_shared());  // mean, std [kSample]
  float* s_own = s_sample + 2 * kSample;                        // mean, std [held_pages]
  const auto page_tokens = static_cast<float>(op.page_size);
  const auto last_tokens = static_cast<float>(seq_len - (last << page_bits));
  Mixture sample{s_sample,    s_sample + kSample, min(pages, kSample), sample_is_all ? last : -1,
                 page_tokens, last_tokens};
  Mixture own{mean + begin, std + begin, end - begin, last - begin, page_tokens, last_tokens};
  if (!selects_all) {
    if (!sample_is_all) sample.page_tokens *= static_cast<float>(pages) / kSample;
    load(s_sample, s_sample + kSample, mean, std, sample.count,
         [&](int i) { return sample_is_all ? i : static_cast<int>(int64_t{i} * pages / kSample); });
    if (!sample_is_all && held_pages > 0) {
      load(s_own, s_own + held_pages, own.mean, own.std, own.count, [](int i) { return i; });
      own.mean = s_own;
      own.std = s_own + held_pages;
    } else {
      commit_copies();
    }
  }

  const int group_head = blockIdx.y % static_cast<unsigned>(op.group);
  int32_t* selected = op.selection.row(row * op.kv_heads + blockIdx.y / static_cast<unsigned>(op.group));
#pragma unroll 1
  for (int to = (group_head * cluster::size() + cluster::rank()) * kHeadThreads + static_cast<int>(threadIdx.x);
       to < op.max_pages; to += op.group * cluster::size() * kHeadThreads) {
    selected[to] = -1;
  }

  float least = kNothing;
  if (!selects_all && pages > 0) {
    wait_for_copies<1>();
    float best = kNothing;
#pragma unroll 1
    for (int i = threadIdx.x; i < sample.count; i += kHeadThreads) best = fmaxf(best, sample.mean[i]);
    best = reduce<kHeadThreads>(best, [](float a, float b) { return fmaxf(a, b); });
    sample.centre = own.centre = best;
    const double tau = solve_mixture<kInFloat>(entmax, sample, own, sample_is_all);
    least = static_cast<float>(own.centre + (tau - op.margin) * entmax.beta);
  }
  cluster::arrive();  // this block no longer reads other blocks' memory
  const int slice_begin = cluster::rank() * slice_pages;
  own.select(static_cast<float>(op.page_best), least, min(slice_pages, op.max_pages - slice_begin),
             bits + (head * ceil_div(op.max_pages, 32) + slice_begin / 32));
  cluster::wait();
}

/// Step 2.
__global__ void __launch_bounds__(kListThreads) list(SelectGaussian op, const uint32_t* bits) {
  wait_for_previous_kernel();
  __shared__ uint32_t s_masks[kListThreads];
  __shared__ int s_before[kListThreads];
  const int64_t list = int64_t{blockIdx.y} * op.kv_heads + blockIdx.x;
  const int thread = threadIdx.x, lane = thread % 32;
  const int turned = lane * (kListThreads / 32) + thread / 32;  // neighbouring words belong to different warps
  const int words = ceil_div(op.max_pages, 32);
  const auto group_bits = [&](int nth) {
    uint32_t mask = 0;
#pragma unroll 4
    for (int h = 0; h < op.group; ++h) {
      if (nth < words) mask |= bits[(list * op.group + h) * words + nth];
    }
    return mask;
  };
  int32_t* selected = op.selection.row(list);
  int count = 0;
  uint32_t next = group_bits(thread);
  for (int first = 0; first < words; first += kListThreads) {
    const uint32_t mask = next;
    next = group_bits(first + kListThreads + thread);
    int all;
    const int before = exclusive_scan<kListThreads>(__popc(mask), all);
    s_masks[thread] = mask;
    s_before[thread] = count + before;
    __syncthreads();
    // The lanes write the pages of one word together.
    const uint32_t own = s_masks[turned];
    for (uint32_t left = __ballot_sync(kAllLanes, own != 0); left; left &= left - 1) {
      const int from = __ffs(static_cast<int>(left)) - 1, word = __shfl_sync(kAllLanes, turned, from);
      const uint32_t its_mask = s_masks[word];
      const int to = s_before[word] + __popc(its_mask & ((1u << lane) - 1));
      if (its_mask >> lane & 1) selected[to] = (first + word) * 32 + lane;
    }
    count += all;
  }
  if (thread == 0) op.selection.counts[list] = count;
}

}  // namespace

int64_t workspace_bytes(const SelectGaussian& op) {
  return int64_t{op.batch} * op.q_heads * ceil_div(op.max_pages, 32) * static_cast<int64_t>(sizeof(uint32_t));
}

void select_gaussian(const SelectGaussian& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  int blocks = 1;
  // The number of blocks does not depend on the batch size, so that a row has the same bits alone and in a batch.
  const auto room = [&] { return blocks * op.q_heads <= multiprocessors(); };
  while (blocks < cluster::most_blocks() && blocks * kSlice < op.max_pages && room()) blocks *= 2;
  const int slice_pages = ceil_div(ceil_div(op.max_pages, blocks), 32) * 32;
  const bool held = op.max_pages > kSample && (kSample + slice_pages) * kPageBytes <= kMostShared;
  const int held_pages = held ? slice_pages : 0, shared = (kSample + held_pages) * kPageBytes;
  const bool all_in_float = !op.alpha.per_head && in_float(Entmax<double>(op.alpha.value));
  auto* bits = static_cast<uint32_t*>(workspace);
  launch("select_gaussian", all_in_float ? select_for_heads<true> : select_for_heads<false>,
         {dim3(blocks, op.q_heads, op.batch), kHeadThreads, blocks, shared}, stream, op, slice_pages, held_pages, bits);
  launch("select_gaussian", list, {dim3(op.kv_heads, op.batch), kListThreads}, stream, op, bits);
}

}  // namespace entmaxkv::cuda
