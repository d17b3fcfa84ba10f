// How score_pages and score_gaussian divide their work among warps, and read two statistics of every page.
#pragma once

#include "matrix_product.cuh"

namespace entmaxkv::cuda {

/// The pages of one row that a warp scores for the query heads of a group: the tiles first, first + step, ... of 32
/// pages. blockIdx.x is the group, because neighbouring groups' statistics are neighbours in memory: their blocks run
/// at the same time.
struct PageTiles : HeadGroup {
  int64_t row;
  int seq_len;
  int used;  // pages in use by the row
  int max_pages;
  int first, step;  // in tiles
  const int32_t* table;

  /// Returns the launch configuration.
  template <typename T, typename Layout, typename Op>
  static Grid grid(const Op& op) {
    using Slots = ScanRing<T, Layout>;
    const int tiles = ceil_div(op.max_pages, kTileRows), lists = op.batch * HeadGroup::per_row(op);
    const int at_once =
        std::max(1, kScanBlocks<Layout> * multiprocessors() / lists);  // blocks per list that run at once
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

  /// Returns the first page of this warp's nth tile.
  __device__ int page(int nth) const { return (first + nth * step) * kTileRows; }

  /// Returns how many of this warp's tiles begin before `page`.
  __device__ int tiles_upto(int page) const { return max(0, ceil_div(ceil_div(page, kTileRows) - first, step)); }

  /// Returns a TileStream of the tiles with pages in use. Tile 2 n has the rows of `one` of this warp's nth tile of
  /// pages, and tile 2 n + 1 those of `other`.
  template <typename T, typename Layout>
  __device__ auto stream(const Rows& one, const Rows& other, int head_dim) const {
    const auto lookup = [*this](int n) {
      return table[min(page(n / 2) + static_cast<int>(threadIdx.x % 32), max_pages - 1)];
    };
    const auto row_of = [*this, one, other](int n, int physical) {
      const int there = __shfl_sync(kAllLanes, physical, 0);  // the tile's first page is in use
      if (page(n / 2) + static_cast<int>(threadIdx.x % 32) >= used) physical = there;
      // Computes both addresses: a choice of the Rows by n would put them into local memory.
      const T *of_one = one.at<T>(physical, kv_head), *of_other = other.at<T>(physical, kv_head);
      return n % 2 ? of_other : of_one;
    };
    return TileStream(ScanRing<T, Layout>{}, Upto{2 * tiles_upto(used)}, head_dim, lookup, row_of);
  }

  /// Writes value(i, j) for page Products::row(i) of the nth tile and head Products::head(j), or `unused` if the page
  /// is not in use. All lanes call.
  template <typename Op, typename Value>
  __device__ void write(const Op& op, float* to, int nth, float unused, Value value) const {
    const int its_page = page(nth) + Products::row(0);
    float* to_page = to + (row * op.q_heads + first_head + Products::head(0)) * op.max_pages + its_page;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float its_value = value(i, j);  // computed always, which avoids a branch
        if (Products::head(j) < heads && its_page + i < op.max_pages) {
          to_page[j * op.max_pages + i] = its_page + i < used ? its_value : unused;
        }
      }
    }
  }

  /// Writes `unused` for the tiles without any page in use. All lanes call.
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

  /// Returns the position of the first token of page Products::row(i) of the nth tile, relative to the query's
  /// position.
  __device__ int oldest(int nth, int i, int page_size) const {
    return (page(nth) + Products::row(i)) * page_size - (seq_len - 1);
  }
};

}  // namespace entmaxkv::cuda
