// How score_pages and score_gaussian divide their work, and read the two statistics of every page.
#pragma once

#include "../common/matrix_product.cuh"

namespace entmaxkv::cuda {

/// The pages of one row that a warp scores for the query heads of a group: every step-th tile of 32. Blocks of
/// neighbouring groups, whose statistics are neighbours in memory, run side by side.
struct PageTiles : HeadGroup {
  int64_t row;
  int seq_len;
  int used;  // pages of the row
  int max_pages;
  int first, step;  // tiles
  const int32_t* table;

  template <typename T, typename Layout, typename Op>
  static Grid grid(const Op& op) {
    using Slots = ScanRing<T, Layout>;
    const int tiles = ceil_div(op.max_pages, kTileRows), lists = op.batch * HeadGroup::per_row(op);
    const int at_once = std::max(1, kScanBlocks<Layout> * multiprocessors() / lists);  // blocks of a list
    const int blocks = std::min(ceil_div(tiles, Slots::kWarps), at_once);
    return {dim3(HeadGroup::per_row(op), blocks, op.batch), 32 * Slots::kWarps, 1, Slots::kBytes};
  }

  template <typename Op>
  __device__ explicit PageTiles(const Op& op)
      : HeadGroup(op, blockIdx.x),
        row(blockIdx.z),
        seq_len(length_of(op, row)),
        max_pages(op.max_pages),
        table(op.page_table.row(row)) {
    used = ceil_div(seq_len, op.page_size);
    const int warps = blockDim.x / 32;
    first = blockIdx.y * warps + threadIdx.x / 32;
    step = gridDim.y * warps;
  }

  /// The first page of this warp's nth tile.
  __device__ int page(int nth) const { return (first + nth * step) * kTileRows; }

  /// Tiles of this warp up to a page.
  __device__ int tiles_upto(int page) const { return max(0, ceil_div(ceil_div(page, kTileRows) - first, step)); }

  /// The rows of one and the other statistic, in turn, of all tiles with pages in use.
  template <typename T, typename Layout>
  __device__ auto stream(const Rows& one, const Rows& other, int head_dim) const {
    const auto lookup = [*this](int n) {
      return table[min(page(n / 2) + static_cast<int>(threadIdx.x % 32), max_pages - 1)];
    };
    const auto row_of = [*this, one, other](int n, int physical) {
      const int there = __shfl_sync(kAllLanes, physical, 0);  // the tile's first page is in use
      if (page(n / 2) + static_cast<int>(threadIdx.x % 32) >= used) physical = there;
      // Both, as registers have no addresses to choose from.
      const T *of_one = one.at<T>(physical, kv_head), *of_other = other.at<T>(physical, kv_head);
      return n % 2 ? of_other : of_one;
    };
    return TileStream(ScanRing<T, Layout>{}, Upto{2 * tiles_upto(used)}, head_dim, lookup, row_of);
  }

  /// Writes value(i, j) for page Products::row(i) of the nth tile and head Products::head(j), or what stands for a page
  /// not in use.
  template <typename Op, typename Value>
  __device__ void write(const Op& op, float* to, int nth, float unused, Value value) const {
    const int its_page = page(nth) + Products::row(0);
    float* to_page = to + (row * op.q_heads + first_head + Products::head(0)) * op.max_pages + its_page;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float its_value = value(i, j);  // no branch
        if (Products::head(j) < heads && its_page + i < op.max_pages) {
          to_page[j * op.max_pages + i] = its_page + i < used ? its_value : unused;
        }
      }
    }
  }

  /// Writes what stands for a page not in use into the tiles that have no other.
  template <typename Op>
  __device__ void write_unused(const Op& op, float* to, float unused) const {
#pragma unroll 1
    for (int nth = tiles_upto(used); nth < tiles_upto(op.max_pages); ++nth) {
      const int its_page = page(nth) + static_cast<int>(threadIdx.x % 32);
      for (int h = 0; h < heads && its_page < op.max_pages; ++h) {
        to[(row * op.q_heads + first_head + h) * op.max_pages + its_page] = unused;
      }
    }
  }

  /// Position of a page's first token, from the query's on.
  __device__ int oldest(int nth, int i, int page_size) const {
    return (page(nth) + Products::row(i)) * page_size - (seq_len - 1);
  }
};

}  // namespace entmaxkv::cuda
