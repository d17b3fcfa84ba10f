// The tokens that a KV head of a row attends to: those of the selected pages, or all, in ascending order.
#pragma once

#include "tile.cuh"

namespace entmaxkv::cuda {

/// The tokens that one KV head of one row attends to.
struct TokenList {
  const int32_t* selected;  // null: all pages
  int room;                 // of `selected`
  const int32_t* table;
  int table_pages;
  int page_size, page_bits;
  int seq_len;
  int tokens;

  /// The list, if its tokens have been counted.
  __device__ TokenList(const SparseDecode& op, int64_t row, int kv_head, int tokens)
      : selected(nullptr), table(op.page_table.row(row)), page_size(op.page_size), tokens(tokens) {
    if (op.selection) selected = op.selection.row(row * op.kv_heads + kv_head);
    room = op.selection.max_selected;
    table_pages = op.max_pages;
    page_bits = __ffs(page_size) - 1;
    seq_len = length_of(op, row);
  }

  __device__ TokenList(const SparseDecode& op, int64_t row, int kv_head) : TokenList(op, row, kv_head, 0) {
    int pages = (seq_len + page_size - 1) >> page_bits;
    if (op.selection) pages = max(0, min(op.selection.counts[row * op.kv_heads + kv_head], room));
    if (pages == 0) return;
    const int of_last = min(page_size, seq_len - logical(pages - 1) * page_size);
    tokens = max(0, (pages - 1) * page_size + of_last);
  }

  __device__ int tiles() const { return ceil_div(tokens, kTileRows); }
  __device__ int logical(int nth) const { return selected ? selected[nth] : nth; }

  /// The value of the token at a place of the list.
  template <typename T>
  __device__ const T* value(const Rows& v_pages, int kv_head, int place) const {
    return v_pages.at<T>(table[logical(place >> page_bits)], kv_head, place & (page_size - 1));
  }
};

/// A token of a tile, one for each lane; beyond the end of the list the tile's first one.
struct Token {
  int place;
  int logical, physical;  // page

  /// All lanes call.
  __device__ Token(const TokenList& list, int tile) {
    const int own = tile * kTileRows + static_cast<int>(threadIdx.x % 32);
    // Looked up before it is known how many tokens there are, and bounded in case that it is none.
    const int own_logical =
        max(0, min(list.selected ? list.selected[min(own >> list.page_bits, list.room - 1)] : own >> list.page_bits,
                   list.table_pages - 1));
    const int own_physical = list.table[own_logical];
    const int first_logical = __shfl_sync(kAllLanes, own_logical, 0);
    const int first_physical = __shfl_sync(kAllLanes, own_physical, 0);
    const bool there = own < list.tokens;
    place = there ? own : tile * kTileRows;
    logical = there ? own_logical : first_logical;
    physical = there ? own_physical : first_physical;
  }

  __device__ int slot(const TokenList& list) const { return place & (list.page_size - 1); }
  __device__ int position(const TokenList& list) const { return logical * list.page_size + slot(list); }

  /// Whether it is this lane's in the tile, not one that stands in.
  __device__ bool belongs_to(int tile) const { return place == tile * kTileRows + static_cast<int>(threadIdx.x % 32); }

  template <typename T>
  __device__ const T* key(const Rows& k_pages, int kv_head, const TokenList& list) const {
    return k_pages.at<T>(physical, kv_head, slot(list));
  }
};

}  // namespace entmaxkv::cuda
