// The list of tokens that one (row, KV head) reads, in ascending order: the selected tokens, the tokens of the selected
// pages, or all tokens.
#pragma once

#include "../common/matrix_product.cuh"

namespace entmaxkv::cuda {

/// A row of NaN for every type of element and every head_dim.
struct UndefinedRow {
  static constexpr int kWords = kMaxHeadDim;
  uint32_t words[kWords];
};
__host__ __device__ constexpr UndefinedRow undefined_row() {
  UndefinedRow row{};
  for (uint32_t& word : row.words) word = ~0u;
  return row;
}
alignas(16) static __device__ const UndefinedRow kUndefinedRow = undefined_row();

/// The list of one (row, KV head). A place is an index in the list, a position is an index in the row. Selections and
/// page tables come from outside: a token whose page is not in the row, or not in the pool, has a key and a value of
/// NaN.
struct TokenList {
  const int32_t* selected;  // selected pages or tokens; null: all pages
  const int32_t* table;
  int page_size, page_bits;
  int entry_bits;  // log2 of the tokens per entry of `selected`
  int pages;       // physical pages
  int seq_len;     // tokens of the row
  int tokens;      // tokens of the list

  __device__ TokenList() {}  // for shared memory

  __device__ TokenList(const SparseDecode& op, int64_t row, int kv_head)
      : selected(nullptr), table(op.page_table.row(row)), page_size(op.page_size), pages(op.pages) {
    page_bits = entry_bits = log2_of(page_size);
    seq_len = tokens = length_of(op, row);
    if (!op.selection) return;
    if (op.selection.by_token) entry_bits = 0;
    const int64_t at = row * op.kv_heads + kv_head;
    selected = op.selection.row(at);
    const int entries = max(0, min(op.selection.counts[at], op.selection.max_selected));
    tokens = 0;
    if (entries == 0) return;
    const int of_entry = 1 << entry_bits;
    const int64_t of_last = seq_len - int64_t{selected[entries - 1]} * of_entry;
    // A last entry that is not in the row has a token, too, so that its NaN is not overlooked.
    tokens = (entries - 1) * of_entry + static_cast<int>(max(int64_t{1}, min(of_last, int64_t{of_entry})));
  }

  __device__ int tiles() const { return ceil_div(tokens, kTileRows); }

  /// Position, physical page and slot of the token at a place of the list.
  __device__ int position(int place) const {
    return (entry(place >> entry_bits) << entry_bits) + (place & ((1 << entry_bits) - 1));
  }
  __device__ int page(int place) const {
    const auto its_entry = static_cast<unsigned>(entry(place >> entry_bits));
    if (its_entry > static_cast<unsigned>(seq_len >> entry_bits)) return -1;  // its position could overflow
    const int at = position(place);
    return at < seq_len ? table[at >> page_bits] : -1;
  }
  __device__ int slot(int place) const { return (entry_bits > 0 ? place : position(place)) & (page_size - 1); }

  /// Returns whether the pool has a page.
  __device__ bool has_page(int physical) const {
    return static_cast<unsigned>(physical) < static_cast<unsigned>(pages);
  }

  /// Returns a row of `rows` [pages, kv_heads, page_size, head_dim], of NaN if there is no such page.
  template <typename T>
  __device__ const T* row(const Rows& rows, int kv_head, int physical, int slot) const {
    return has_page(physical) ? rows.at<T>(physical, kv_head, slot) : reinterpret_cast<const T*>(kUndefinedRow.words);
  }

  /// Returns the row of the token at a place of the list.
  template <typename T>
  __device__ const T* row(const Rows& rows, int kv_head, int place) const {
    return row<T>(rows, kv_head, page(place), slot(place));
  }

  /// Finds page * page_size + slot of the tokens at some places of the list, in the pool. There are no branches between
  /// the loads, so that all are on their way together.
  template <int kCount>
  __device__ void pool_rows(const int32_t (&places)[kCount], uint32_t (&rows)[kCount]) const {
    int entries[kCount], physical[kCount];
#pragma unroll
    for (int n = 0; n < kCount; ++n) entries[n] = places[n] >> entry_bits;
    if (selected) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) entries[n] = selected[entries[n]];
    }
    const int last = seq_len >> entry_bits, mask = (1 << entry_bits) - 1;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const uint32_t at = (static_cast<uint32_t>(entries[n]) << entry_bits) + (places[n] & mask);
      const bool is_in_row =
          static_cast<uint32_t>(entries[n]) <= static_cast<uint32_t>(last) && at < static_cast<uint32_t>(seq_len);
      rows[n] = at & (page_size - 1);
      physical[n] = is_in_row ? table[at >> page_bits] : -1;
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      rows[n] += has_page(physical[n]) ? static_cast<uint32_t>(physical[n]) << page_bits : 0;
    }
  }

  /// Does the same for one place.
  __device__ uint32_t pool_row(int place) const {
    const int32_t places[] = {place};
    uint32_t rows[1];
    pool_rows(places, rows);
    return rows[0];
  }

  /// Returns a TileStream of keys. The warp's nth tile is tile(n) of the list. A lane behind the end of the list takes
  /// its last token, or with whole runs the row at its own slot of the last token's page, whatever that holds.
  template <typename Slots, typename More, typename Tile>
  __device__ auto keys(const Rows& k_pages, int kv_head, int head_dim, More more, Tile tile,
                       uint64_t policy = read_once()) const {
    const auto place = [*this, tile](int n) {
      return min(tile(n) * kTileRows + static_cast<int>(threadIdx.x % 32), tokens - 1);
    };
    const auto lookup = [*this, place](int n) { return page(place(n)); };
    const auto row_of = [*this, place, tile, k_pages, kv_head](int n, int physical) {
      using T = typename Slots::T;
      if constexpr (Slots::kWholeRuns) {  // runs may go beyond the list's end, but not beyond a page
        const int slot = (tile(n) * kTileRows + static_cast<int>(threadIdx.x % 32)) & (page_size - 1);
        return typename Slots::Row{has_page(physical) ? k_pages.at<T>(physical, kv_head, slot) : nullptr,
                                   min(page_size, kTileRows)};
      } else {
        return row<T>(k_pages, kv_head, physical, slot(place(n)));
      }
    };
    return TileStream(Slots{}, more, head_dim, lookup, row_of, policy);
  }

 private:
  /// Returns the nth entry: a page, or a token's position.
  __device__ int entry(int nth) const { return selected ? selected[nth] : nth; }
};

/// Turns a lane's dot products into scores: scale and ALiBi bias.
struct LaneScoring {
  float scale;
  LaneSlopes slopes;
  bool biased;

  __device__ LaneScoring() {}

  __device__ LaneScoring(const SparseDecode& op, const HeadGroup& group)
      : scale(op.scoring.scale), slopes(op.scoring, group), biased(op.scoring.alibi_slopes) {}

  /// Replaces the products of a tile of the list by scores.
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

/// Returns the most tokens that a list can have, rounded up to four whole tiles.
inline int capacity_of(const SparseDecode& op) {
  const int entries = op.selection ? op.selection.max_selected : op.max_pages;
  return ceil_div(entries * (op.selection.by_token ? 1 : op.page_size), 4 * kTileRows) * 4 * kTileRows;
}

/// Returns how many bytes the keys of all lists have, if all are as long as they can be.
inline int64_t key_bytes(const SparseDecode& op) {
  const int64_t of_element = op.dtype == Dtype::kFloat32 ? 4 : 2;
  return int64_t{op.batch} * op.kv_heads * capacity_of(op) * op.head_dim * of_element;
}

}  // namespace entmaxkv::cuda
