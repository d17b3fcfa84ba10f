// What the ops on pages share: which pages are in use, and how work on them is divided.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "rows.h"

namespace entmaxkv::cpu {

inline int pages_in_use(int seq_len, int page_size) { return (seq_len + page_size - 1) / page_size; }

inline int tokens_in_page(int page, int seq_len, int page_size) {
  return std::min(page_size, seq_len - page * page_size);
}

/// Renews the statistics of a physical page that holds `tokens` > 0 keys.
template <typename T>
void summarise_page(const Rows& k_pages, const PageStatistics& statistics, int64_t page, int kv_head, int tokens,
                    int head_dim);

/// Up to kPages successive logical pages of one row and KV head.
struct PageTile {
  static constexpr int kPages = 256;

  int64_t row;
  int kv_head;
  int first;  // logical page
  int width;  // pages of the page table
  int used;   // of them in use

  template <typename T>
  void gather(const Rows& statistics, const PageTable& page_table, const T** rows) const {
    const int32_t* physical = page_table.row(row) + first;
    for (int i = 0; i < used; ++i) rows[i] = statistics.at<T>(physical[i], kv_head);
  }
};

/// Calls body(tile) for the whole page table of every row and KV head, in parallel.
template <typename Op, typename Body>
void for_each_page_tile(const Op& op, Body body) {
  const int max_pages = op.max_pages;
  const int tiles = (max_pages + PageTile::kPages - 1) / PageTile::kPages;
  parallel_for(int64_t{op.batch} * op.kv_heads * tiles, [&](int64_t task) {
    PageTile tile;
    tile.row = task / tiles / op.kv_heads;
    tile.kv_head = static_cast<int>(task / tiles % op.kv_heads);
    tile.first = static_cast<int>(task % tiles) * PageTile::kPages;
    tile.width = std::min(PageTile::kPages, max_pages - tile.first);
    tile.used = std::clamp(pages_in_use(op.seq_lens[tile.row], op.page_size) - tile.first, 0, tile.width);
    body(tile);
  });
}

}  // namespace entmaxkv::cpu
