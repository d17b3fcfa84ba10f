// select_pages on the GPU.
//   scores [batch, q_heads, max_pages] -> selected [batch, kv_heads, max_selected] ascending, counts [batch, kv_heads]
// Grid (blocks of a cluster, KV head, row); a cluster works for one list of pages, each of its blocks for a slice.
//   1. merit of a page: the logarithm of its share in some head's page scores, but for what is the same for the group,
//      max_h (score_h - best_h - excess_h); the last page's is infinite. Scores are read once, if the shared memory
//      holds a slice's.
//   2. survivors: of a slice, the pages no worse than the wanted-th of the threads' own best pages. No other page of
//      it is wanted. All blocks tell each other theirs.
//   3. threshold: the last page that the budget pays for, in the order of falling merit, ties by rising page, of the
//      survivors. Each block counts them by equal steps, then by the next bits, until few are left to compare. Where
//      there are too many survivors (a large budget, many ties) the blocks together first count all pages like that.
//   4. collect: the pages up to the threshold in ascending order
#include "../page_softmax.h"
#include "common/copy.cuh"
#include "common/sizes.cuh"
#include "kernels.h"
#include "select_pages/page_ranks.cuh"

namespace entmaxkv::cuda {

namespace {

using namespace page_ranks;
using cluster::kMostBlocks;
constexpr int kSlice = 2560;           // pages of a block, while the cluster can grow
constexpr int kEager = kStride;        // pages of a slice that are read before the length is known
constexpr int kMostScores = 4 * 8192;  // that a block keeps
constexpr int kListed = 4096;          // survivors
constexpr int kFewListed = 256;        // of all pages, that are listed when there are too many survivors
static_assert(kFewListed <= kListed / kMostBlocks && kMostBlocks <= kWarps);

/// The blocks of the cluster, a power of two, shared out among the warps of this one: a thread takes the items first,
/// first + step, ... of one of them.
struct Part {
  int rank, first, step;

  __device__ Part() {
    const int warp = threadIdx.x / 32, size_bits = __ffs(cluster::size()) - 1;
    rank = warp & (cluster::size() - 1);
    first = (warp >> size_bits) * 32 + threadIdx.x % 32;
    step = kRankThreads >> size_bits;
  }
};

/// Calls send(rank, i) by some thread of this block for each i < count and each rank of the cluster, and
/// announce(rank).
template <typename Send, typename Announce>
__device__ void tell_all(int count, Send send, Announce announce) {
  const Part part;
#pragma unroll 1
  for (int i = part.first; i < count; i += part.step) send(part.rank, i);
  if (threadIdx.x / 32 < cluster::size() && threadIdx.x % 32 == 0) announce(part.rank);
}

/// Pages that all blocks of the cluster know of, and which block has them.
struct List {
  Order* orders;  // [cluster::size()][room]
  int* counts;    // [cluster::size()]
  int room;

  template <typename Body>
  __device__ void visit(Body body) const {
    const Part part;
#pragma unroll 1
    for (int i = part.first; i < counts[part.rank]; i += part.step) {
      const Order order = orders[part.rank * room + i];
      body(merit_of(order), static_cast<int>(order));
    }
  }

  /// How many there are; -1, if there is no room for some block's.
  __device__ int count() const {
    int sum = 0;
#pragma unroll 1
    for (int rank = 0; rank < cluster::size(); ++rank) {
      if (counts[rank] > room) return -1;
      sum += counts[rank];
    }
    return sum;
  }

  /// Fills it with the pages for which wanted(merit, page) holds. All threads call.
  template <typename Wanted>
  __device__ void fill(const Slice& slice, cluster::Mailbox& s_box, int round, Wanted wanted) const {
    const int rank = cluster::rank();
    Order* own = orders + rank * room;
    const int count = slice.collect(wanted, [&](int place, int page) {
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
    s_box.wait(round);
  }
};

/// A block's shared memory.
struct Shared {
  Histogram histogram;
  cluster::Mailbox extremes_box, sums_box, list_box;
  int listed[kMostBlocks];
  int selected;
};

/// This thread's best merit, and the distance of the worst finite one of all threads' best from 0, at most.
struct Rating {
  float best, range;
};

using Sum = unsigned long long;  // of page_softmax::weight

/// A list of pages, as a block of the cluster sees it.
struct Scores {
  const float* data;  // [group][max_pages]
  int group, max_pages;
  int tile_pages;     // whose scores there is room for
  float* s_scores;    // [group][tile_pages]
  Sum* s_sums;        // [2][group], of this block, then of all: of each head the sum of its pages' weights
  float* s_extremes;  // [2][2 group], likewise: the best score, and the negated worst of the threads' own best ones
                      // that are finite. At first as ordered() has them.
  float* s_excess;    // [group]

  __device__ uint32_t& s_ordered(int i) const { return reinterpret_cast<uint32_t*>(s_extremes)[i]; }

  /// Begins to read the scores of the pages begin + from ... begin + to - 1; those of its own words, where they are
  /// aligned.
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

  /// Ends that; from page to on the last word has no say.
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

  /// From the sums of all.
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

  /// Of pages begin ... end - 1; the last one's is infinite. Returns the best of the others.
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

  /// Finds the merits, when the slice's first kEager pages are being read. All threads call.
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
          if (!kAligned) __syncthreads();  // the last tile's scores have been read
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

/// The last page that the budget pays for, and where a block's pages go.
struct Threshold {
  Order order;
  int before;  // pages of blocks of lower rank that are selected
};

/// The wanted-th page in order. All threads call.
__device__ Threshold find_threshold(const Slice& slice, Order* s_orders, Shared& s, int wanted, const Rating& rating) {
  const int size = cluster::size(), rank = cluster::rank(), thread = threadIdx.x;
  const Steps steps(rating.range);
  if (size == 1 && slice.end <= kSlice) {  // all can be counted as fast as the threads' best
    return {pick(slice, s.histogram, steps, slice.end, wanted), 0};
  }
  if (rating.best > kNothing) s.histogram.add(steps.of(rating.best));
  const float least = steps.least(s.histogram.find(1, wanted).index);
  const List list{s_orders, s.listed, kListed >> (__ffs(size) - 1)};
  list.fill(slice, s.list_box, 0, [=](float merit, int) { return merit >= least; });
  int count = list.count(), wanted_listed = wanted;
  const bool all_listed = count >= 0;
  if (!all_listed) {
    Candidates candidates{steps};
    wanted_listed = candidates.narrow(slice, s.histogram, size, kListed, wanted, kFewListed);
    list.fill(slice, s.list_box, 1, [&](float merit, int page) { return candidates.have(merit, page); });
    count = list.count();
  }
  const Order threshold = pick(list, s.histogram, steps, count, wanted_listed);
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
  cluster::sync();  // they have been read
  return {threshold, before};
}

template <bool kAligned>
__global__ void __launch_bounds__(kRankThreads, 1)
    select(SelectPages op, int slice_pages, int tile_pages, float* workspace) {
  take_turn();
  __shared__ Shared s;
  auto* s_orders = reinterpret_cast<Order*>(dynamic_shared());
  auto* s_sums = reinterpret_cast<Sum*>(s_orders + kListed);
  auto* s_scores = reinterpret_cast<float*>(s_sums + 2 * op.group);
  float* s_extremes = s_scores + tile_pages * op.group;
  const int thread = threadIdx.x, rank = cluster::rank(), size = cluster::size();
  if (thread == 0) {
    s.extremes_box.open();
    s.sums_box.open();
    s.list_box.open();
  }
#pragma unroll 1
  for (int i = thread; i < 4 * op.group; i += kRankThreads) {
    s_extremes[i] = 0;  // below all that ordered() gives
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
    const Threshold threshold = find_threshold(slice, s_orders, s, count, rating);
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
  wait_for_copies<0>();  // if there was no choice
}

int blocks_of(const SelectPages& op) {
  int blocks = 1;
  while (blocks < cluster::most_blocks() && blocks * kSlice < op.max_pages) blocks *= 2;
  return blocks;
}

int slice_pages(const SelectPages& op) { return ceil_div(ceil_div(op.max_pages, 4), blocks_of(op)) * 4; }

constexpr int kOfHead = 2 * sizeof(Sum) + 5 * sizeof(float);  // bytes of a head, beside its scores

/// How many pages' scores a block keeps.
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
