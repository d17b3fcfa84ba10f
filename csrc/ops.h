// The contract between the front doors (tensors) and the kernels (memory): one params struct per op.
// No torch, no CUDA. Every size is a count, every stride counts elements, and every last dimension is contiguous.
// Methods are constexpr so that device code can call them too.
#pragma once

#include <cstdint>

namespace entmaxkv {

constexpr int kMaxHeadDim = 256;
constexpr int kMinPageSize = 8;
constexpr int kMaxPageSize = 128;
constexpr int64_t kMostTokens = INT32_MAX - 4096;  // that a row has room for, so that kernels may round up

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

/// The sizes of a call; an op has those that its shapes name, the others are 0.
struct Sizes {
  int batch = 0, tokens = 0, q_heads = 0, kv_heads = 0, group = 0, head_dim = 0, page_size = 0, max_pages = 0;
};

/// Rows of head_dim elements of one Dtype, reached by up to three indices.
struct Rows {
  void* data = nullptr;
  int64_t stride[3] = {0, 0, 0};

  constexpr explicit operator bool() const { return data != nullptr; }

  template <typename T>
  constexpr T* at(int64_t i, int64_t j, int64_t k = 0) const {
    return static_cast<T*>(data) + i * stride[0] + j * stride[1] + k * stride[2];
  }
};

/// Logical page -> physical page of every row of the batch.
struct PageTable {
  const int32_t* data;  // [batch, max_pages]
  int64_t stride;

  constexpr const int32_t* row(int64_t batch) const { return data + batch * stride; }
};

/// Statistics of the keys of each physical page; a pair that the cache does not keep is empty.
struct PageStatistics {
  Rows k_min, k_max;   // [pages, kv_heads, head_dim]
  Rows k_mean, k_std;  // [pages, kv_heads, head_dim]
};

/// A code of 4 bits per coordinate of each key, in two planes of 2, and norms of what it loses (sketch.h); or nothing.
struct Sketch {
  uint8_t* codes = nullptr;  // [pages, kv_heads, 2, page_size, row_bytes]
  uint8_t* norms = nullptr;  // [pages, kv_heads, 3, page_size]: scale, norm of the coarse and of the fine distance

  constexpr explicit operator bool() const { return codes != nullptr; }

  /// A page's part of a plane of codes, and of one of the norms. `page_head` is page * kv_heads + kv_head.
  constexpr uint8_t* plane(int64_t page_head, int plane, int page_size, int row_bytes) const {
    return codes + (page_head * 2 + plane) * page_size * row_bytes;
  }
  constexpr uint8_t* norm(int64_t page_head, int which, int page_size) const {
    return norms + (page_head * 3 + which) * page_size;
  }
};

/// alpha of every query head: one value, or one per head. Behind a device's pointer nobody has checked the latter:
/// there a head of another alpha has no right result, and decodes to NaN.
struct Alpha {
  double value;
  const float* per_head;  // [q_heads] or null

  /// In 1 ... 2 whatever stands there, so that every search for a threshold ends.
  constexpr double of(int head) const {
    const double its = given(head);
    return its > 2 ? 2 : its >= 1 ? its : 1;
  }
  constexpr bool is_valid(int head) const { return given(head) >= 1 && given(head) <= 2; }

 private:
  constexpr double given(int head) const { return per_head ? per_head[head] : value; }
};

/// s_i = scale q.k_i + slope (i - position), position = seq_len - 1.
struct Scoring {
  float scale;
  const float* alibi_slopes;  // [q_heads] or null

  constexpr float slope(int head) const { return alibi_slopes ? alibi_slopes[head] : 0.0f; }
};

/// Writes `lengths[b]` new tokens and their sketch behind the `seq_lens[b]` present ones, renews the statistics of
/// the pages it touched, and only then writes the new lengths.
struct AppendKv : Sizes {
  Dtype dtype;
  Rows k, v;               // [batch, tokens, kv_heads, head_dim]
  const int32_t* lengths;  // [batch] or null: every row appends `tokens`
  Rows k_pages, v_pages;   // [pages, kv_heads, page_size, head_dim]
  PageStatistics statistics;
  Sketch sketch;
  PageTable page_table;
  const int32_t* seq_lens;  // [batch] before
  int32_t* new_seq_lens;    // [batch]; may be the memory of seq_lens
};

/// Renews the sketch of every key in the cache.
struct BuildSketch : Sizes {
  Dtype dtype;
  Rows k_pages;  // [pages, kv_heads, page_size, head_dim]
  Sketch sketch;
  PageTable page_table;
  const int32_t* seq_lens;  // [batch]
};

/// Renews the statistics of every page in use.
struct PageStats : Sizes {
  Dtype dtype;
  Rows k_pages;  // [pages, kv_heads, page_size, head_dim]
  PageStatistics statistics;
  PageTable page_table;
  const int32_t* seq_lens;  // [batch]
};

/// What the lower bound of a page's scores counts beside the upper one where pages are ranked: a box is wide for some
/// key or other in each dimension, and a rank by the bound alone prefers wide boxes.
constexpr float kRankLower = 0.25f;

/// scores[b, h, page] = (U + lower L) / (1 + lower), where U = scale sum_d max(q_d k_min_d, q_d k_max_d) + best ALiBi
/// bias of the page is an upper bound of every s_i of the page, and L the lower one. Pages behind the last token get
/// -inf.
struct ScorePages : Sizes {
  Dtype dtype;
  Rows q;             // [batch, q_heads, head_dim]
  Rows k_min, k_max;  // [pages, kv_heads, head_dim]
  PageTable page_table;
  const int32_t* seq_lens;  // [batch]
  Scoring scoring;
  float lower;
  float* scores;  // [batch, q_heads, max_pages]
};

/// mean[b, h, page] = scale q.k_mean, std^2 = scale^2 sum_d q_d^2 k_std_d^2, both with the ALiBi bias of the
/// page's tokens in it: the moments of s_i over the page. Pages behind the last token get -inf and 0.
struct ScoreGaussian : Sizes {
  Dtype dtype;
  Rows q;              // [batch, q_heads, head_dim]
  Rows k_mean, k_std;  // [pages, kv_heads, head_dim]
  PageTable page_table;
  const int32_t* seq_lens;  // [batch]
  Scoring scoring;
  float* mean;  // [batch, q_heads, max_pages]
  float* std;   // [batch, q_heads, max_pages]
};

/// Pages or tokens chosen for each KV head: logical indices, ascending. Or nothing chosen: every page.
struct Selection {
  int32_t* selected = nullptr;  // [batch, kv_heads, max_selected]
  int32_t* counts = nullptr;    // [batch, kv_heads]
  int max_selected = 0;
  bool by_token = false;

  constexpr explicit operator bool() const { return counts != nullptr; }

  constexpr int32_t* row(int64_t batch_head) const { return selected + batch_head * max_selected; }
};

/// The last page, then the pages that have most share in the page scores of some head, up to `budget` tokens.
struct SelectPages : Sizes {
  const float* scores;      // [batch, q_heads, max_pages]
  const int32_t* seq_lens;  // [batch]
  int64_t budget;           // tokens
  Selection selection;
};

/// The last page, and every page whose expected best score reaches the threshold that the page mixture
/// predicts: (alpha-1)(mean + std page_best) > tau - margin.
struct SelectGaussian : Sizes {
  const float* mean;        // [batch, q_heads, max_pages]
  const float* std;         // [batch, q_heads, max_pages]
  const int32_t* seq_lens;  // [batch]
  Alpha alpha;
  double page_best;  // standard score of the best of page_size tokens, at the wanted quantile
  double margin;     // in units of z
  Selection selection;
};

/// The tokens that may have weight, by the bounds of the sketch: those with s_i <= upper_i, upper_i > floor for some
/// head of the group, where floor is the threshold on the exact scores of some tokens, in s, and so at most that on
/// all. Of more than the selection has room for, those to which their bounds leave most weight. Where alpha = 1 the
/// floor is -inf, or, of a row with more tokens than there is room for, sketch::kBelow under the logsumexp of some
/// scores.
struct SelectSketch : Sizes {
  Dtype dtype;
  Rows q;        // [batch, q_heads, head_dim]
  Rows k_pages;  // [pages, kv_heads, page_size, head_dim]
  Sketch sketch;
  PageTable page_table;
  const int32_t* seq_lens;  // [batch]
  Alpha alpha;
  Scoring scoring;
  bool fine;      // both planes, or the first alone
  float certain;  // share of the proved error that bounds count: 1, or less where they only hold almost certainly
  Selection selection;
  float* delta_bound;  // [batch, q_heads] upper bound of the weight of the tokens that were left out
};

/// Exact alpha-entmax attention over the selected tokens, or those of the selected pages; over all when none are given.
struct SparseDecode : Sizes {
  Dtype dtype;
  Rows q;                 // [batch, q_heads, head_dim]
  Rows k_pages, v_pages;  // [pages, kv_heads, page_size, head_dim]
  PageTable page_table;
  const int32_t* seq_lens;  // [batch]
  Selection selection;      // nothing chosen: dense
  Alpha alpha;
  Scoring scoring;
  Rows out;          // [batch, q_heads, head_dim]
  float* tau;        // [batch, q_heads] in z; logsumexp(s) where alpha = 1
  int32_t* support;  // [batch, q_heads] tokens with p > 0
  int32_t* tokens;   // [batch, kv_heads] tokens whose keys were read
};

}  // namespace entmaxkv
