// The contract between the front doors, which check tensors, and the kernels, which work on memory: one struct of
// parameters per op. It needs neither torch nor CUDA. Methods are constexpr so that device code can call them.
//
// Sizes are counts, strides count elements, and the last dimension of every array is contiguous. The comment behind a
// pointer is the shape of its array. In formulas, i is a token's index in its row (0 is the oldest token), q one query
// head's query, k_i the token's key, s_i its score (Scoring), and z_i = (alpha-1) s_i (entmax.h).
#pragma once

#include <cstdint>

namespace entmaxkv {

constexpr int kMaxHeadDim = 256;
constexpr int kMinPageSize = 8;
constexpr int kMaxPageSize = 128;
/// The most tokens that a row may have room for. Kernels may round it up to a multiple of 4096 without overflow.
constexpr int64_t kMostTokens = INT32_MAX - 4096;

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

/// The sizes of a call. A size that no argument of the op has is 0.
struct Sizes {
  int batch = 0;      // rows, each a sequence of tokens
  int tokens = 0;     // new tokens of each row
  int q_heads = 0;    // query heads
  int kv_heads = 0;   // KV heads: heads of keys and values
  int group = 0;      // query heads that share one KV head: q_heads / kv_heads
  int head_dim = 0;   // coordinates of a query, a key or a value
  int page_size = 0;  // tokens of a page
  int max_pages = 0;  // pages of a row for which the page table has room
  int pages = 0;      // physical pages, to which the page table's ids point
};

/// An array of vectors, each of head_dim contiguous elements, that up to three indices reach.
struct Rows {
  void* data = nullptr;  // null: the array is absent
  int64_t stride[3] = {0, 0, 0};

  constexpr explicit operator bool() const { return data != nullptr; }

  template <typename T>
  constexpr T* at(int64_t i, int64_t j, int64_t k = 0) const {
    return static_cast<T*>(data) + i * stride[0] + j * stride[1] + k * stride[2];
  }
};

/// Where the pages of each row lie. Token i of a row is in its logical page i / page_size, at slot i % page_size. The
/// table maps logical pages to physical pages, which are the first index of the pools k_pages and v_pages.
struct PageTable {
  const int32_t* data;  // [batch, max_pages]; entries behind a row's last token may be anything
  int64_t stride;       // from row to row

  constexpr const int32_t* row(int64_t batch) const { return data + batch * stride; }
};

/// Statistics of each coordinate over the keys of a physical page. A cache keeps either pair, both or neither.
struct PageStatistics {
  Rows k_min, k_max;   // [pages, kv_heads, head_dim] the smallest and the largest
  Rows k_mean, k_std;  // [pages, kv_heads, head_dim] mean and population standard deviation
};

/// The key sketch: a code of 4 bits for each coordinate of each rotated key, and bounds of what the codes lose
/// (sketch.h). Plane 0 holds the high 2 bits of each code, plane 1 the low 2 bits. The pointers are null together.
struct Sketch {
  uint8_t* codes = nullptr;  // [pages, kv_heads, 2, page_size, row_bytes] plane 0 and plane 1
  uint8_t* norms = nullptr;  // [pages, kv_heads, 3, page_size] scale, coarse norm and fine norm

  constexpr explicit operator bool() const { return codes != nullptr; }

  /// One plane of one page: [page_size, row_bytes]. page_head = page * kv_heads + kv_head.
  constexpr uint8_t* plane(int64_t page_head, int plane, int page_size, int row_bytes) const {
    return codes + (page_head * 2 + plane) * page_size * row_bytes;
  }
  /// The scales (which = 0), coarse norms (1) or fine norms (2) of one page: [page_size].
  constexpr uint8_t* norm(int64_t page_head, int which, int page_size) const {
    return norms + (page_head * 3 + which) * page_size;
  }
};

/// The alpha of every query head. A front door checks that it is in 1 ... 2, except for values in a device's memory:
/// there, a head whose alpha is outside has no right result, and decodes to NaN.
struct Alpha {
  double value;           // alpha of all heads where per_head is null
  const float* per_head;  // [q_heads] or null

  /// The head's alpha, moved into 1 ... 2 if it is outside, so that every search for a threshold ends.
  constexpr double of(int head) const {
    const double alpha = given(head);
    return alpha > 2 ? 2 : alpha >= 1 ? alpha : 1;
  }
  constexpr bool is_valid(int head) const { return given(head) >= 1 && given(head) <= 2; }

 private:
  constexpr double given(int head) const { return per_head ? per_head[head] : value; }
};

/// How queries and keys make scores: s_i = scale q.k_i + slope (i - position), where position = seq_len - 1 is the
/// newest token. The second term is the ALiBi bias.
struct Scoring {
  float scale;
  const float* alibi_slopes;  // [q_heads]; null: all slopes are 0

  constexpr float slope(int head) const { return alibi_slopes ? alibi_slopes[head] : 0.0f; }
};

/// append_kv writes the first lengths[b] new tokens of row b, and their sketch, behind its seq_lens[b] tokens. It also
/// computes the statistics of every page that it wrote to. The new lengths are written last.
struct AppendKv : Sizes {
  Dtype dtype;             // dtype of keys, values and statistics
  Rows k, v;               // [batch, tokens, kv_heads, head_dim] new keys and values
  const int32_t* lengths;  // [batch] new tokens of each row; null: `tokens` in every row
  Rows k_pages, v_pages;   // [pages, kv_heads, page_size, head_dim]
  PageStatistics statistics;
  Sketch sketch;
  PageTable page_table;
  const int32_t* seq_lens;  // [batch] tokens of each row before the call
  int32_t* new_seq_lens;    // [batch] tokens of each row after it; may be the same memory as seq_lens
};

/// build_sketch computes the sketch of every key in the cache.
struct BuildSketch : Sizes {
  Dtype dtype;   // dtype of the keys
  Rows k_pages;  // [pages, kv_heads, page_size, head_dim]
  Sketch sketch;
  PageTable page_table;
  const int32_t* seq_lens;  // [batch] tokens of each row
};

/// page_stats computes the statistics of every page that holds tokens.
struct PageStats : Sizes {
  Dtype dtype;   // dtype of the keys and the statistics
  Rows k_pages;  // [pages, kv_heads, page_size, head_dim]
  PageStatistics statistics;
  PageTable page_table;
  const int32_t* seq_lens;  // [batch] tokens of each row
};

/// ScorePages::lower where pages are ranked. A rank by the upper bound alone would prefer pages whose keys differ much:
/// the range from k_min to k_max of such a page is wide, so its upper bound is high, whatever its keys are.
constexpr float kRankLower = 0.25f;

/// score_pages writes scores[b, h, page] = (U + lower L) / (1 + lower). U and L bound the scores of the page's tokens
/// from above and from below: L <= s_i <= U. For scale >= 0,
///     U = scale sum_d max(q_d k_min_d, q_d k_max_d) + the largest ALiBi bias in the page,
/// and L has the minima instead. Pages behind the last token get -inf.
struct ScorePages : Sizes {
  Dtype dtype;        // dtype of q and the statistics
  Rows q;             // [batch, q_heads, head_dim]
  Rows k_min, k_max;  // [pages, kv_heads, head_dim]
  PageTable page_table;
  const int32_t* seq_lens;  // [batch] tokens of each row
  Scoring scoring;
  float lower;    // 0 ... 1: how much L counts beside U
  float* scores;  // [batch, q_heads, max_pages] in units of s
};

/// score_gaussian writes the mean and the standard deviation of the scores s_i in each page:
///     mean = scale q.k_mean + mean ALiBi bias,   std^2 = scale^2 sum_d q_d^2 k_std_d^2 + variance of the ALiBi bias,
/// as if the coordinates of the keys were independent. Pages behind the last token get -inf and 0.
struct ScoreGaussian : Sizes {
  Dtype dtype;         // dtype of q and the statistics
  Rows q;              // [batch, q_heads, head_dim]
  Rows k_mean, k_std;  // [pages, kv_heads, head_dim]
  PageTable page_table;
  const int32_t* seq_lens;  // [batch] tokens of each row
  Scoring scoring;
  float* mean;  // [batch, q_heads, max_pages] in units of s
  float* std;   // [batch, q_heads, max_pages] in units of s
};

/// What a selector chose to be read of each row, for each KV head: logical pages, or tokens. Without counts there is no
/// selection, and every token is read.
struct Selection {
  int32_t* selected = nullptr;  // [batch, kv_heads, max_selected] ascending indices; selectors write -1 behind them
  int32_t* counts = nullptr;    // [batch, kv_heads] how many indices
  int max_selected = 0;         // indices for which there is room
  bool by_token = false;        // the indices are tokens, not logical pages

  constexpr explicit operator bool() const { return counts != nullptr; }

  /// The indices of one row and KV head. batch_head = row * kv_heads + kv_head.
  constexpr int32_t* row(int64_t batch_head) const { return selected + batch_head * max_selected; }
};

/// select_pages selects the last page of each row, and the pages with the largest merit, until their tokens would
/// exceed the budget. A page's merit is its largest page softmax for any head of the group (page_softmax.h).
struct SelectPages : Sizes {
  const float* scores;      // [batch, q_heads, max_pages] from score_pages
  const int32_t* seq_lens;  // [batch] tokens of each row
  int64_t budget;           // the most tokens in the selected pages of a row and KV head; the last page is always read
  Selection selection;      // the selected pages
};

/// select_gaussian selects the last page of each row, and every page whose best token is expected to reach a head's
/// threshold: (alpha-1) (mean + page_best std) > tau - margin. tau is the threshold that is expected if the scores of
/// each page are normal with that mean and std (gaussian.h).
struct SelectGaussian : Sizes {
  const float* mean;        // [batch, q_heads, max_pages] from score_gaussian, in units of s
  const float* std;         // [batch, q_heads, max_pages]
  const int32_t* seq_lens;  // [batch] tokens of each row
  Alpha alpha;
  double page_best;     // how many standard deviations above the mean the best of page_size tokens is taken to be
  double margin;        // in units of z
  Selection selection;  // the selected pages
};

/// select_sketch selects every token that may have weight, as far as the bounds of the sketch tell. Each head has
///     upper_i >= s_i  the bound of each token's score, from the sketch
///     floor           a lower bound of its threshold, in units of s: the threshold of some tokens' exact scores. More
///                     tokens can only raise the threshold.
/// A token with upper_i <= floor has no weight. All others, the candidates of any head of the group, are selected. If
/// there are more of them than the selection has room for, those with the largest merit are (sketch.h, Worth).
/// Where alpha = 1 every token has weight: the floor is -inf, and all tokens are candidates. Only in a row with more
/// tokens than there is room for, the floor is sketch::kBelow less than the logsumexp of some tokens' exact scores.
struct SelectSketch : Sizes {
  Dtype dtype;   // dtype of q and the keys
  Rows q;        // [batch, q_heads, head_dim]
  Rows k_pages;  // [pages, kv_heads, page_size, head_dim]
  Sketch sketch;
  PageTable page_table;
  const int32_t* seq_lens;  // [batch] tokens of each row
  Alpha alpha;
  Scoring scoring;
  bool fine;            // refine with plane 1; otherwise bounds come from plane 0 alone
  float error_factor;   // 0 ... 1: bounds count this much of the sketch's proved error; below 1, a bound may be wrong
  Selection selection;  // the selected tokens
  float* delta_bound;   // [batch, q_heads] the tokens that were not selected have at most this weight together
};

/// sparse_decode computes exact alpha-entmax attention, out = sum_i p_i v_i, over the tokens of the selection.
struct SparseDecode : Sizes {
  Dtype dtype;            // dtype of q, out, keys and values
  Rows q;                 // [batch, q_heads, head_dim]
  Rows k_pages, v_pages;  // [pages, kv_heads, page_size, head_dim]
  PageTable page_table;
  const int32_t* seq_lens;  // [batch] tokens of each row
  Selection selection;      // the pages or tokens to read; none: dense attention over all tokens
  Alpha alpha;
  Scoring scoring;
  Rows out;          // [batch, q_heads, head_dim]; 0 where no token is read, NaN where a score is NaN or infinite
  float* tau;        // [batch, q_heads] the threshold in units of z; where alpha = 1, the logsumexp of s
  int32_t* support;  // [batch, q_heads] how many tokens have weight p > 0
  int32_t* tokens;   // [batch, kv_heads] how many tokens' keys were read
};

}  // namespace entmaxkv
