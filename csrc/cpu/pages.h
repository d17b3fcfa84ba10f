// What the ops on pages share: which pages are in use, and how the work on them is divided.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "rows.h"

namespace entmaxkv::cpu {

inline int pages_in_use(int seq_len, int page_size) { return (seq_len + page_size - 1) / page_size; }

/// The tokens in a row's logical page; 0 or negative if it is behind the last token.
inline int tokens_in_page(int page, int seq_len, int page_size) {
  return std::min(page_size, seq_len - page * page_size);
}

/// Ends a selection's list for one (row, KV head) after `count` entries.
inline void end_list(const Selection& selection, int64_t row_head, int count) {
  int32_t* selected = selection.row(row_head);
  std::fill(selected + count, selected + selection.max_selected, -1);
  selection.counts[row_head] = count;
}

/// Computes the statistics of a physical page that holds `tokens` > 0 keys.
template <typename T>
void summarise_page(const Rows& k_pages, const PageStatistics& statistics, int64_t page, int kv_head, int tokens,
                    int head_dim);

/// Calls body(physical page, kv_head, tokens) for every page in use and each KV head, in parallel. tokens > 0 is the
/// number of tokens in the page.
template <typename Op, typename Body>
void for_each_page(const Op& op, Body body) {
  parallel_for(int64_t{op.batch} * op.kv_heads * op.max_pages, [&](int64_t task) {
    const int page = task % op.max_pages;
    const int kv_head = task / op.max_pages % op.kv_heads;
    const int64_t row = task / op.max_pages / op.kv_heads;
    const int tokens = tokens_in_page(page, op.seq_lens[row], op.page_size);
    if (tokens > 0) body(int64_t{op.page_table.row(row)[page]}, kv_head, tokens);
  });
}

/// Up to kPages successive logical pages of one row, for one KV head.
struct PageTile {
  static constexpr int kPages = 256;

  int64_t row;
  int kv_head;
  int first;  // logical page
  int width;  // pages of the tile that the page table has room for
  int used;   // pages of the tile that hold tokens; they come first

  /// rows[i] = the statistics of the tile's page i, for the pages in use.
  template <typename T>
  void gather(const Rows& statistics, const PageTable& page_table, const T** rows) const {
    const int32_t* physical = page_table.row(row) + first;
    for (int i = 0; i < used; ++i) rows[i] = statistics.at<T>(physical[i], kv_head);
  }
};

/// Calls body(tile) for tiles that cover the whole page table of every row, for each KV head, in parallel.
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
