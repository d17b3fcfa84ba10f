// select_pages on the GPU.
//   scores [batch, q_heads, max_pages] -> selected [batch, kv_heads, max_selected] ascending, counts [batch, kv_heads]
// Grid (blocks of a cluster, KV head, row): a cluster per list of pages, a block per slice of the list. Scores are read
// once, if the shared memory holds those of a slice.
//   1. rate: merit of a page = max_h (score_h - best_h - excess_h). This is the logarithm of its page softmax
//      (page_softmax.h) in the best head, up to a constant. The last page is always selected: its merit is infinite.
//   2. find_worst_selected: finds the worst selected page, which has rank `count` in the order of falling merit.
//      a. Each thread has a best page. A page is a candidate if it is no worse than the page of rank `count` among
//         these. Other pages cannot be selected. All blocks send each other their candidates.
//      b. Each block finds the page of that rank among the candidates (page_ranks.cuh). If there are too many
//         candidates, the blocks first narrow all pages down together.
//   3. collect: writes the pages up to the threshold in ascending order.
#include "../page_softmax.h"
#include "common/copy.cuh"
#include "common/sizes.cuh"
#include "kernels.h"
#include "select_pages/page_ranks.cuh"

namespace entmaxkv::cuda {

namespace {

using namespace page_ranks;
using cluster::kMostBlocks;
constexpr int kSlice = 2560;           // most pages of a slice, unless the cluster already has the most blocks
constexpr int kEager = kStride;        // pages of a slice that are read before the row's length is known
constexpr int kMostScores = 4 * 8192;  // scores that a block keeps
constexpr int kListed = 4096;          // candidates that fit the lists of a cluster's blocks
constexpr int kFewListed = 256;        // pages left after narrowing all pages, if there are more candidates
static_assert(kFewListed <= kListed / kMostBlocks && kMostBlocks <= kWarps);

/// Assigns the blocks of the cluster, a power of two, to the warps of this block: a thread handles the items first,
/// first + step, ... of block `rank`.
struct Part {
  int rank, first, step;

  __device__ Part() {
    const int warp = threadIdx.x / 32, size_bits = __ffs(cluster::size()) - 1;
    rank = warp & (cluster::size() - 1);
    first = (warp >> size_bits) * 32 + threadIdx.x % 32;
    step = kRankThreads >> size_bits;
  }
};

/// Tells all blocks: for each block `rank` of the cluster, threads of this block call send(rank, i) for each i < count,
/// and one thread calls announce(rank). All threads call.
template <typename Send, typename Announce>
__device__ void tell_all(int count, Send send, Announce announce) {
  const Part part;
#pragma unroll 1
  for (int i = part.first; i < count; i += part.step) send(part.rank, i);
  if (threadIdx.x / 32 < cluster::size() && threadIdx.x % 32 == 0) announce(part.rank);
}

/// A list of pages in the shared memory of each block of the cluster, sorted by the block whose slice has the page.
struct List {
  Order* orders;  // [cluster::size()][room]
  int* counts;    // [cluster::size()]
  int room;

  /// Calls body(merit, page) for this thread's pages of the list. The threads of one block visit the whole list.
  template <typename Body>
  __device__ void visit(Body body) const {
    const Part part;
#pragma unroll 1
    for (int i = part.first; i < counts[part.rank]; i += part.step) {
      const Order order = orders[part.rank * room + i];
      body(merit_of(order), static_cast<int>(order));
    }
  }

  /// Returns the number of pages, or -1 if some block has more than `room`.
  __device__ int count() const {
    int sum = 0;
#pragma unroll 1
    for (int rank = 0; rank < cluster::size(); ++rank) {
      if (counts[rank] > room) return -1;
      sum += counts[rank];
    }
    return sum;
  }

  /// Fills the lists of all blocks with the pages with selects(merit, page). All threads of the cluster call. Each
  /// call takes a mailbox of its own.
  template <typename Selects>
  __device__ void fill(const Slice& slice, cluster::Mailbox& s_box, Selects selects) const {
    const int rank = cluster::rank();
    Order* own = orders + rank * room;
    const int count = slice.collect(selects, [&](int place, int page) {
      if (place < room) own[place] = order_of(slice.merits[page - slice.begin], page);
    });
    if (threadIdx.x == 0) counts[rank] = count;
    __syncthreads();
    if (cluster::size() == 1) return;
    const int sent = count <= room ? count : 0;
    tell_all(
        sent,
        [&](int to, int i) {
          if (to != rank) s_box.send(to, own[i], own[i]);
        },
        [&](int to) {
          if (to != rank) s_box.send(to, counts[rank], count);
          s_box.announce(to, to != rank ? static_cast<int>(sizeof(int) + sizeof(Order) * sent) : 0);
        });
    s_box.wait(0);
  }
};

/// A block's shared memory.
struct Shared {
  Histogram histogram;
  cluster::Mailbox extremes_box, sums_box, list_boxes[2];
  int listed[kMostBlocks];
  int selected;
};

/// What `rate` finds out about merits: this thread's best finite merit, and a range such that every thread's finite
/// best merit is at least -range, up to rounding.
struct Rating {
  float best, range;
};

using Sum = unsigned long long;  // a sum of page_softmax::weight

/// The page scores of a list, and what a block of the cluster computes from them.
struct Scores {
  const float* data;  // [group][max_pages]
  int group, max_pages;
  int tile_pages;     // pages of a slice whose scores fit the shared memory
  float* s_scores;    // [group][tile_pages]
  Sum* s_sums;        // [2][group] each head's sum of its pages' weights: of this block, of all blocks
  float* s_extremes;  // [2][2][group] of this block, of all blocks: each head's best score, and the negated worst of
                      // the threads' finite best scores. As ordered() until all blocks' are known.
  float* s_excess;    // [group] page_softmax::excess of each head

  __device__ uint32_t& s_ordered(int i) const { return reinterpret_cast<uint32_t*>(s_extremes)[i]; }

  /// Starts to copy the scores of pages begin + from ... begin + to - 1 to s_scores. kAligned: 16 bytes at a time, and
  /// each thread copies the words that it reads later. All threads call.
  template <bool kAligned>
  __device__ void read(int begin, int from, int to) const {
    constexpr int kRun = kAligned ? 4 : 1;
#pragma unroll 1
    for (int h = 0; h < group; ++h) {
      const float* head = data + int64_t{h} * max_pages + begin;
      float* s_head = s_scores + h * tile_pages;
#pragma unroll 1
      for (int i = from + kRun * static_cast<int>(threadIdx.x); i < to; i += kRun * kRankThreads) {
        if (kAligned) {
          copy_async(*reinterpret_cast<uint4*>(s_head + i), head + i, true);
        } else {
          copy_async(s_head[i], head + i);
        }
      }
    }
    commit_copies();
  }

  /// Waits for the copies, and sets the scores of the last word from page `to` on to NaN, which no maximum or sum
  /// counts. All threads call.
  template <bool kAligned>
  __device__ void finish_reading(int to) const {
    wait_for_copies<0>();
    if (!kAligned) __syncthreads();
    if (to % 4 == 0 || to / 4 % kRankThreads != static_cast<int>(threadIdx.x)) return;
#pragma unroll 1
    for (int h = 0; h < group; ++h) {
      for (int i = to; i % 4; ++i) s_scores[h * tile_pages + i] = kUndefined;
    }
  }

  /// Adds the tile's first `pages` pages to this block's extremes. All threads call.
  __device__ void find_extremes(int pages) const {
#pragma unroll 1
    for (int h = 0; h < group; ++h) {
      float best = kNothing;
#pragma unroll 1
      for (int i = 4 * static_cast<int>(threadIdx.x); i < pages; i += kStride) {
        const Word word = Word::load(s_scores + h * tile_pages + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) best = fmaxf(best, word.of[j]);
      }
      const uint32_t largest = __reduce_max_sync(kAllLanes, ordered(best));
      const uint32_t negated = __reduce_max_sync(kAllLanes, ordered(best > kNothing ? -best : kNothing));
      if (threadIdx.x % 32 == 0) {
        atomicMax(&s_ordered(h), largest);
        atomicMax(&s_ordered(group + h), negated);
      }
    }
  }

  /// Adds the tile's first `pages` pages to this block's sums of weights. All threads call.
  __device__ void find_sums(const float* s_best, int pages) const {
#pragma unroll 1
    for (int h = 0; h < group; ++h) {
      const float best = s_best[h];
      Sum sum = 0;
#pragma unroll 1
      for (int i = 4 * static_cast<int>(threadIdx.x); i < pages; i += kStride) {
        const Word word = Word::load(s_scores + h * tile_pages + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += page_softmax::weight(page_softmax::distance(word.of[j], best));
      }
      sum = sum_upto(sum);
      if (threadIdx.x % 32 == 31) atomicAdd(&s_sums[h], sum);
    }
  }

  /// Computes each head's excess from the sums of all blocks. All threads call, and then a barrier.
  __device__ void find_excess(const Sum* s_sum) const {
#pragma unroll 1
    for (int h = threadIdx.x; h < group; h += kRankThreads) {
      const int32_t own = page_softmax::logarithm(s_sum[h]);
      int32_t least = own;
#pragma unroll 4
      for (int other = 0; other < group; ++other) least = min(least, page_softmax::logarithm(s_sum[other]));
      s_excess[h] = page_softmax::excess(own, least);
    }
  }

  /// Writes the merits of pages begin ... end - 1, which are in s_scores. The merit of page `last` is infinite. Returns
  /// this thread's best other merit. All threads call.
  __device__ float find_merits(const float* s_best, int begin, int end, int last, float* merits) const {
    float best_merit = kNothing;
#pragma unroll 1
    for (int page = begin + 4 * static_cast<int>(threadIdx.x); page < end; page += kStride) {
      Word merit{kNothing, kNothing, kNothing, kNothing};
#pragma unroll 4
      for (int h = 0; h < group; ++h) {
        const float best = s_best[h], excess = s_excess[h];
        const Word word = Word::load(s_scores + h * tile_pages + (page - begin));
#pragma unroll
        for (int i = 0; i < 4; ++i) merit.of[i] = fmaxf(merit.of[i], page_softmax::distance(word.of[i], best) - excess);
      }
      if (page + 4 > last) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (page + i == last) merit.of[i] = kNothing;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) best_merit = fmaxf(best_merit, merit.of[i]);
      merit.store(merits + (page - begin));
      if (page <= last && last < page + 4) merits[last - begin] = -kNothing;
    }
    return best_merit;
  }

  /// Step 1: writes the merits of the slice. The copy of its first kEager pages has been started. Three passes over the
  /// slice find the extremes, the sums and the merits. All threads of the cluster call.
  template <bool kAligned>
  __device__ Rating rate(const Slice& slice, int last, Shared& s) const {
    Rating rating{kNothing, -kNothing};
    const int size = cluster::size(), extremes = 2 * group, of_all = size == 1 ? 0 : 1;
    float* s_best = s_extremes + of_all * extremes;
    Sum* s_sum = s_sums + of_all * group;
#pragma unroll 1
    for (int pass = 0; pass < 3; ++pass) {
#pragma unroll 1
      for (int tile = slice.begin; tile < slice.end; tile += tile_pages) {
        const int end = min(tile + tile_pages, slice.end);
        if (pass == 0 || tile_pages < slice.end - slice.begin) {
          if (!kAligned) __syncthreads();  // all threads have read the last tile's scores
          read<kAligned>(tile, pass == 0 && tile == slice.begin ? min(kEager, tile_pages) : 0, end - tile);
          finish_reading<kAligned>(end - tile);
        }
        if (pass == 0) {
          find_extremes(end - tile);
        } else if (pass == 1) {
          find_sums(s_best, end - tile);
        } else {
          rating.best = fmaxf(rating.best, find_merits(s_best, tile, end, last, slice.merits + (tile - slice.begin)));
        }
      }
      if (pass == 2) break;
      __syncthreads();
      if (pass == 0) {
        if (size > 1) {
          tell_all(
              extremes, [&](int to, int i) { s.extremes_box.raise(to, s_ordered(extremes + i), s_ordered(i)); },
              [&](int to) { s.extremes_box.announce(to, extremes * static_cast<int>(sizeof(float))); });
          s.extremes_box.wait(0);
        }
        for (int i = threadIdx.x; i < extremes; i += kRankThreads)
          s_best[i] = from_ordered(s_ordered(of_all * extremes + i));
      } else {
        if (size > 1) {
          tell_all(
              group, [&](int to, int h) { s.sums_box.add(to, s_sum[h], s_sums[h]); },
              [&](int to) { s.sums_box.announce(to, group * static_cast<int>(sizeof(Sum))); });
          s.sums_box.wait(0);
        }
        find_excess(s_sum);
      }
      __syncthreads();
    }
#pragma unroll 4
    for (int h = 0; h < group; ++h) {
      const float range = s_best[h] + s_best[group + h] + s_excess[h];
      if (range >= 0) rating.range = fminf(rating.range, range);
    }
    return rating;
  }
};

/// The worst selected page, and where this block writes its selected pages.
struct Threshold {
  Order order;
  int before;  // selected pages of the blocks of lower rank
};

/// Step 2: finds the page of rank target_rank. All threads of the cluster call and all get the result.
__device__ Threshold find_worst_selected(const Slice& slice, Order* s_orders, Shared& s, int target_rank,
                                         const Rating& rating) {
  const int size = cluster::size(), rank = cluster::rank(), thread = threadIdx.x;
  const Steps steps(rating.range);
  if (size == 1 && slice.end <= kSlice) {  // counting all pages is as fast as finding candidates
    return {pick(slice, s.histogram, steps, slice.end, target_rank), 0};
  }
  if (rating.best > kNothing) s.histogram.add(steps.of(rating.best));
  const float least = steps.least(s.histogram.find(1, target_rank).index);
  const List list{s_orders, s.listed, kListed >> (__ffs(size) - 1)};
  list.fill(slice, s.list_boxes[0], [=](float merit, int) { return merit >= least; });
  int count = list.count(), listed_rank = target_rank;
  const bool all_listed = count >= 0;
  if (!all_listed) {
    Narrowing narrowing{steps};
    listed_rank = narrowing.narrow(slice, s.histogram, size, kListed, target_rank, kFewListed);
    list.fill(slice, s.list_boxes[1], [&](float merit, int page) { return narrowing.has(merit, page); });
    count = list.count();
  }
  const Order threshold = pick(list, s.histogram, steps, count, listed_rank);
  if (size == 1) return {threshold, 0};
  int before = 0;
  if (all_listed) {
    if (thread == 0) s.selected = 0;
    const bool lower = Part().rank < rank;
    list.visit([&](float merit, int page) { before += lower && order_of(merit, page) <= threshold; });
    before = __reduce_add_sync(kAllLanes, before);
    __syncthreads();  // s.selected is 0
    if (thread % 32 == 0) atomicAdd(&s.selected, before);
    __syncthreads();
    return {threshold, s.selected};
  }
  const int own =
      slice.collect([&](float merit, int page) { return order_of(merit, page) <= threshold; }, [](int, int) {});
  if (thread == 0) s.selected = own;
  cluster::sync();
#pragma unroll 1
  for (int other = 0; other < rank; ++other) before += cluster::of(other, s.selected);
  cluster::sync();  // all blocks have read s.selected
  return {threshold, before};
}

template <bool kAligned>
__global__ void __launch_bounds__(kRankThreads, 1)
    select(SelectPages op, int slice_pages, int tile_pages, float* workspace) {
  wait_for_previous_kernel();
  __shared__ Shared s;
  auto* s_orders = reinterpret_cast<Order*>(dynamic_shared());
  auto* s_sums = reinterpret_cast<Sum*>(s_orders + kListed);
  auto* s_scores = reinterpret_cast<float*>(s_sums + 2 * op.group);
  float* s_extremes = s_scores + tile_pages * op.group;
  const int thread = threadIdx.x, rank = cluster::rank(), size = cluster::size();
  if (thread == 0) {
    s.extremes_box.open();
    s.sums_box.open();
    for (cluster::Mailbox& box : s.list_boxes) box.open();
  }
#pragma unroll 1
  for (int i = thread; i < 4 * op.group; i += kRankThreads) {
    s_extremes[i] = 0;  // below every value of ordered()
    if (i < 2 * op.group) s_sums[i] = 0;
  }
  s.histogram.clear();
  if (size > 1) cluster::arrive();
  const int64_t row = blockIdx.z, list = row * op.kv_heads + blockIdx.y;
  const float* data = op.scores + list * op.group * op.max_pages;
  const Scores scores{data,     op.group, op.max_pages, tile_pages,
                      s_scores, s_sums,   s_extremes,   s_extremes + 4 * op.group};
  const int room = op.max_pages - rank * slice_pages;
  scores.read<kAligned>(rank * slice_pages, 0, min(min(kEager, tile_pages), room));
  const int seq_len = length_of(op, row), page_bits = log2_of(op.page_size);
  const int last = (seq_len - 1) >> page_bits;
  const int64_t left = op.budget - (seq_len - last * op.page_size);
  const int others = last < 0 ? 0 : static_cast<int>(max(int64_t{0}, min(left >> page_bits, int64_t{last})));
  const int count = last < 0 ? 0 : others + 1;
  const bool choice = 0 < others && others < last;

  const int begin = min(rank * slice_pages, last + 1), end = min(begin + slice_pages, last + 1);
  float* merits = slice_pages <= tile_pages ? s_scores : workspace + list * ceil_div(op.max_pages, 4) * 4 + begin;
  const Slice slice{begin, end, merits};
  int32_t* selected = op.selection.row(list);
  if (size > 1) {
    cluster::wait();
  } else {
    __syncthreads();
  }
  if (choice) {
    const Rating rating = scores.rate<kAligned>(slice, last, s);
    const Threshold threshold = find_worst_selected(slice, s_orders, s, count, rating);
    const float worst = merit_of(threshold.order);
    const int worst_page = static_cast<int>(threshold.order);
    int32_t* to = selected + threshold.before;
    slice.collect([&](float merit, int page) { return merit > worst || (merit == worst && page <= worst_page); },
                  [&](int place, int page) { to[place] = page; });
  }
#pragma unroll 1
  for (int to = (choice ? count : 0) + rank * kRankThreads + thread; to < op.selection.max_selected;
       to += size * kRankThreads) {
    selected[to] = to >= count ? -1 : others > 0 ? to : last;
  }
  if (rank == 0 && thread == 0) op.selection.counts[list] = count;
  wait_for_copies<0>();  // if rate was not called
}

/// Returns how many blocks a cluster has.
int blocks_of(const SelectPages& op) {
  int blocks = 1;
  while (blocks < cluster::most_blocks() && blocks * kSlice < op.max_pages) blocks *= 2;
  return blocks;
}

/// Returns how many pages a slice has, a multiple of 4.
int slice_pages(const SelectPages& op) { return ceil_div(ceil_div(op.max_pages, 4), blocks_of(op)) * 4; }

constexpr int kOfHead = 2 * sizeof(Sum) + 5 * sizeof(float);  // bytes of shared memory per head, beside its scores

/// Returns for how many pages a block keeps scores in shared memory.
int tile_pages(const SelectPages& op) {
  constexpr int kOthers = sizeof(Shared) + 2048 + kListed * sizeof(Order);
  const int room = device_property(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kOthers - kOfHead * op.group;
  const int fitting = std::min(kMostScores, room / static_cast<int>(sizeof(float))) / op.group / 4 * 4;
  return std::min(slice_pages(op), std::max(fitting, 4));  // a launch with more heads than fit fails
}

}  // namespace

int64_t workspace_bytes(const SelectPages& op) {
  if (slice_pages(op) <= tile_pages(op)) return 0;
  return int64_t{op.batch} * op.kv_heads * ceil_div(op.max_pages, 4) * 4 * static_cast<int64_t>(sizeof(float));
}

void select_pages(const SelectPages& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  const int blocks = blocks_of(op), pages = tile_pages(op);
  const int shared =
      kListed * static_cast<int>(sizeof(Order)) + (kOfHead + pages * static_cast<int>(sizeof(float))) * op.group;
  const bool aligned = op.max_pages % 4 == 0 && reinterpret_cast<uintptr_t>(op.scores) % 16 == 0;
  launch("select_pages", aligned ? select<true> : select<false>,
         {dim3(blocks, op.kv_heads, op.batch), kRankThreads, blocks, shared}, stream, op, slice_pages(op), pages,
         static_cast<float*>(workspace));
}

}  // namespace entmaxkv::cuda
