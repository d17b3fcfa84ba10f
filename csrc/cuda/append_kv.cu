// append_kv on the GPU.
//   k, v [batch, tokens, kv_heads, head_dim] -> slots seq_lens[row] ... of the row's pages, and their statistics
// Grid (page that a row can touch, KV head, row); a block owns one page of one KV head, a thread one dimension.
//   1. copy: each new key and value is read and written once, coalesced over the dimensions
//   2. summarise: the page's keys, old ones included, are read back, so that the statistics depend on the page's
//      content alone
//   3. advance: seq_lens moves in a launch of its own, when every block has read the old lengths and no page is
//      unfinished
#include "device.cuh"
#include "kernels.h"

namespace entmaxkv::cuda {

namespace {

template <typename T>
__global__ void append_page(AppendKv op) {
  const int kv_head = blockIdx.y;
  const int64_t row = blockIdx.z;
  const int d = threadIdx.x;
  const int first = op.seq_lens[row];
  const int end = min(first + (op.lengths ? op.lengths[row] : op.tokens), op.max_pages * op.page_size);
  const int page = first / op.page_size + blockIdx.x;
  const int start = max(first, page * op.page_size);
  const int stop = min(end, (page + 1) * op.page_size);
  if (start >= stop || d >= op.head_dim) return;
  const int64_t physical = op.page_table.row(row)[page];
  for (int token = start; token < stop; ++token) {
    const int slot = token % op.page_size;
    op.k_pages.at<T>(physical, kv_head, slot)[d] = op.k.at<T>(row, token - first, kv_head)[d];
    op.v_pages.at<T>(physical, kv_head, slot)[d] = op.v.at<T>(row, token - first, kv_head)[d];
  }

  const PageStatistics& statistics = op.statistics;
  if (!statistics.k_min && !statistics.k_mean) return;
  const int tokens = stop - page * op.page_size;
  float low = to_float(op.k_pages.at<T>(physical, kv_head, 0)[d]), high = low, sum = low;
  for (int slot = 1; slot < tokens; ++slot) {
    const float key = to_float(op.k_pages.at<T>(physical, kv_head, slot)[d]);
    low = fminf(low, key);
    high = fmaxf(high, key);
    sum += key;
  }
  if (statistics.k_min) {
    statistics.k_min.at<T>(physical, kv_head)[d] = from_float<T>(low);
    statistics.k_max.at<T>(physical, kv_head)[d] = from_float<T>(high);
  }
  if (statistics.k_mean) {
    const float mean = sum / tokens;
    float squares = 0;
    for (int slot = 0; slot < tokens; ++slot) {
      const float distance = to_float(op.k_pages.at<T>(physical, kv_head, slot)[d]) - mean;
      squares += distance * distance;
    }
    statistics.k_mean.at<T>(physical, kv_head)[d] = from_float<T>(mean);
    statistics.k_std.at<T>(physical, kv_head)[d] = from_float<T>(sqrtf(squares / tokens));
  }
}

__global__ void advance(AppendKv op) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= op.batch) return;
  op.seq_lens[row] = min(op.seq_lens[row] + (op.lengths ? op.lengths[row] : op.tokens), op.max_pages * op.page_size);
}

}  // namespace

void append_kv(const AppendKv& op, cudaStream_t stream) {
  if (op.batch == 0 || op.tokens == 0) return;
  const int most_pages = (op.tokens - 1) / op.page_size + 2;  // that one row can touch
  const dim3 grid(most_pages, op.kv_heads, op.batch);
  const int threads = (op.head_dim + 31) / 32 * 32;
  dispatch(op.dtype, [&](auto element) { append_page<decltype(element)><<<grid, threads, 0, stream>>>(op); });
  check_launch("append_kv");
  advance<<<(op.batch + 127) / 128, 128, 0, stream>>>(op);
  check_launch("append_kv");
}

}  // namespace entmaxkv::cuda
