// The front door that sparse_decode and dense_decode share. dense_decode has no selection, and reads every page.
#pragma once

#include "backend.h"

namespace entmaxkv {

/// On the host: checks that every selection is an ascending list of pages or tokens in use.
inline void check_selection(const Arguments& args, const SparseDecode& op) {
  for (int64_t row_head = 0; row_head < int64_t{op.batch} * op.kv_heads; ++row_head) {
    const int count = op.selection.counts[row_head];
    if (count < 0 || count > op.selection.max_selected) {
      args.fail("counts", "0 ... " + std::to_string(op.selection.max_selected), std::to_string(count));
    }
    const bool by_token = op.selection.by_token;
    const int unit = by_token ? 1 : op.page_size;
    const int used = (op.seq_lens[row_head / op.kv_heads] + unit - 1) / unit;
    for (int nth = 0; nth < count; ++nth) {
      const int index = op.selection.row(row_head)[nth];
      const int least = nth > 0 ? op.selection.row(row_head)[nth - 1] + 1 : 0;
      if (index >= least && index < used) continue;
      const std::string kind = by_token ? "tokens" : "pages";
      args.fail("selected", "ascending " + kind + " below " + std::to_string(used) + ", the " + kind + " in use",
                std::to_string(index));
    }
  }
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> decode_selection(
    Arguments& args, const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& page_table,
    const Tensor& seq_lens, const Optional& selected, const Optional& counts, double alpha, std::optional<double> scale,
    const Optional& alibi_slopes, const Optional& head_alpha, bool by_token) {
  SparseDecode op;
  take_keys(args, op, k_pages);
  op.v_pages = args.rows(v_pages, "v_pages [pages, kv_heads, page_size, head_dim]", k_pages);
  take_queries(args, op, q, page_table, seq_lens, k_pages, scale, alibi_slopes);
  if (selected) op.selection.selected = args.values<int32_t>(*selected, "selected [batch, kv_heads, max_selected]");
  op.selection.counts = args.snapshot<int32_t>(counts, "counts [batch, kv_heads]");
  op.selection.max_selected = args["max_selected"];
  op.selection.by_token = by_token;
  op.alpha = alpha_of(args, alpha, head_alpha);
  args.expect(int64_t{op.selection.max_selected} * (by_token ? 1 : op.page_size) <= kMostTokens, "max_selected",
              most_tokens_text(), op.selection.max_selected);
  args.expect(int64_t{op.pages} * op.page_size <= UINT32_MAX, "k_pages", "a pool of fewer than 2^32 tokens", op.pages);
  if (kOnHost && selected) check_selection(args, op);

  Tensor out = new_tensor(q, {op.batch, op.q_heads, op.head_dim}, q.scalar_type());
  Tensor tau = new_values(q, {op.batch, op.q_heads}, op.tau);
  Tensor support = new_values(q, {op.batch, op.q_heads}, op.support);
  Tensor tokens = new_values(q, {op.batch, op.kv_heads}, op.tokens);
  op.out = args.rows(out, "out [batch, q_heads, head_dim]", q);
  run(backend::sparse_decode, op, q);
  return {out, tau, support, tokens};
}

}  // namespace entmaxkv
