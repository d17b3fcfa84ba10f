// The tokens that a KV head of a row attends to, in ascending order: the selected ones, those of the selected pages,
// or all.
#pragma once

#include "../common/matrix_product.cuh"

namespace entmaxkv::cuda {

/// The tokens that one KV head of one row attends to.
struct TokenList {
  const int32_t* selected;  // null: all pages
  const int32_t* table;
  int page_size, page_bits;
  int entry_bits;  // log2 of the tokens of an entry of the list, a page or one
  int seq_len;
  int tokens;

  __device__ TokenList() {}  // for shared memory

  __device__ TokenList(const SparseDecode& op, int64_t row, int kv_head)
      : selected(nullptr), table(op.page_table.row(row)), page_size(op.page_size), tokens(0) {
    page_bits = entry_bits = log2_of(page_size);
    seq_len = length_of(op, row);
    int entries = (seq_len + page_size - 1) >> page_bits;
    if (op.selection) {
      if (op.selection.by_token) entry_bits = 0;
      selected = op.selection.row(row * op.kv_heads + kv_head);
      entries = max(0, min(op.selection.counts[row * op.kv_heads + kv_head], op.selection.max_selected));
    }
    if (entries == 0) return;
    const int of_last = min(1 << entry_bits, seq_len - (entry(entries - 1) << entry_bits));
    tokens = max(0, ((entries - 1) << entry_bits) + of_last);
  }

  __device__ int tiles() const { return ceil_div(tokens, kTileRows); }

  /// Of the token at a place of the list.
  __device__ int position(int place) const {
    return (entry(place >> entry_bits) << entry_bits) + (place & ((1 << entry_bits) - 1));
  }
  __device__ int page(int place) const { return table[position(place) >> page_bits]; }
  __device__ int slot(int place) const { return (entry_bits > 0 ? place : position(place)) & (page_size - 1); }

  /// The key or value of the token at a place of the list, in pages [pages, kv_heads, page_size, head_dim].
  template <typename T>
  __device__ const T* row(const Rows& pages, int kv_head, int place) const {
    return pages.at<T>(page(place), kv_head, slot(place));
  }

  /// The keys of a warp's tiles, of which tile(n) is the nth. Lanes behind the end of the list take its last token.
  template <typename Slots, typename More, typename Tile>
  __device__ auto keys(const Rows& k_pages, int kv_head, int head_dim, More more, Tile tile) const {
    const auto place = [*this, tile](int n) {
      return min(tile(n) * kTileRows + static_cast<int>(threadIdx.x % 32), tokens - 1);
    };
    const auto lookup = [*this, place](int n) { return page(place(n)); };
    const auto row_of = [*this, place, k_pages, kv_head](int n, int physical) {
      return k_pages.at<typename Slots::T>(physical, kv_head, slot(place(n)));
    };
    return TileStream(Slots{}, more, head_dim, lookup, row_of);
  }

 private:
  __device__ int entry(int nth) const { return selected ? selected[nth] : nth; }
};

/// What makes scores of a lane's products.
struct LaneScoring {
  float scale;
  LaneSlopes slopes;
  bool biased;

  __device__ LaneScoring(const SparseDecode& op, const HeadGroup& group)
      : scale(op.scoring.scale), slopes(op.scoring, group), biased(op.scoring.alibi_slopes) {}

  /// Of the products of a tile of the list.
  __device__ void score(const TokenList& list, int tile, Products& products) const {
    float distance[4] = {};
    if (biased) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place = min(tile * kTileRows + Products::row(i), list.tokens - 1);
        distance[i] = static_cast<float>(list.position(place) - (list.seq_len - 1));
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) products.of[i][j] = fmaf(slopes.of[j], distance[i], scale * products.of[i][j]);
    }
  }
};

/// Tokens of the longest list that there is room for, in whole tiles.
inline int capacity_of(const SparseDecode& op) {
  const int entries = op.selection ? op.selection.max_selected : op.max_pages;
  return ceil_div(entries * (op.selection.by_token ? 1 : op.page_size), kTileRows) * kTileRows;
}

}  // namespace entmaxkv::cuda
