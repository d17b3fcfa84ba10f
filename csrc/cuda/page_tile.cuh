// How score_pages and score_gaussian divide their work.
#pragma once

#include "tile.cuh"

namespace entmaxkv::cuda {

/// 32 successive logical pages of one row, a lane for each, and the query heads that one warp scores them for.
struct PageTile : HeadGroup {
  int64_t row;
  int seq_len;
  int page;          // of this lane
  int used;          // pages of the row
  int64_t physical;  // this lane's page; the tile's first one, for a page that is not in use

  template <typename Op>
  static Grid grid(const Op& op, int warps) {
    return {dim3(ceil_div(op.max_pages, kTileRows * warps), HeadGroup::per_row(op), op.batch), 32 * warps};
  }

  template <typename Op>
  __device__ explicit PageTile(const Op& op)
      : HeadGroup(op, blockIdx.y), row(blockIdx.z), page(blockIdx.x * blockDim.x + threadIdx.x) {
    const int own = op.page_table.row(row)[min(page, op.max_pages - 1)];  // does not wait for the length
    seq_len = length_of(op, row);
    used = ceil_div(seq_len, op.page_size);
    const int first = __shfl_sync(kAllLanes, own, 0);
    physical = in_use() ? own : first;
  }

  __device__ bool in_use() const { return page < used; }

  /// Whether any page of the warp is in use.
  __device__ bool any_in_use() const { return page - static_cast<int>(threadIdx.x % 32) < used; }

  /// This lane's row of a page statistic.
  template <typename T>
  __device__ const T* statistic(const Rows& statistics) const {
    return statistics.at<T>(physical, kv_head);
  }
};

}  // namespace entmaxkv::cuda
