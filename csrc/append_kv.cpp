#include "backend.h"

namespace entmaxkv {

void append_kv(Tensor k, Tensor v, Optional lengths, Tensor k_pages, Tensor v_pages, Optional k_min, Optional k_max,
               Optional k_mean, Optional k_std, Tensor page_table, Tensor seq_lens, Optional codes, Optional norms) {
  Arguments args("append_kv");
  AppendKv op;
  op.dtype = args.element(k_pages, "k_pages");
  op.k = args.rows(k, "k [batch, tokens, kv_heads, head_dim]", k_pages);
  op.v = args.rows(v, "v [batch, tokens, kv_heads, head_dim]", k_pages);
  op.lengths = args.values<const int32_t>(lengths, "lengths [batch]");
  op.k_pages = args.written_rows(k_pages, "k_pages [pages, kv_heads, page_size, head_dim]", k_pages);
  op.v_pages = args.written_rows(v_pages, "v_pages [pages, kv_heads, page_size, head_dim]", k_pages);
  op.statistics = statistics_of(args, k_pages, k_min, k_max, k_mean, k_std);
  op.page_table = page_table_of(args, page_table);
  op.seq_lens = args.values<int32_t>(seq_lens, "seq_lens [batch]");
  op.sketch = sketch_of(args, codes, norms);
  static_cast<Sizes&>(op) = args.sizes();
  if (kOnHost && op.lengths) {
    for (int row = 0; row < op.batch; ++row) {
      args.expect(op.lengths[row] >= 0 && op.lengths[row] <= op.tokens, "lengths", "0 ... " + std::to_string(op.tokens),
                  op.lengths[row]);
    }
  }
  const auto first = [&](int row) { return int64_t{op.seq_lens[row]}; };
  const auto end = [&](int row) { return first(row) + (op.lengths ? op.lengths[row] : op.tokens); };
  check_lengths(args, first);
  check_lengths(args, end, " after the append, which is all that the cache has room for");
  check_pages(args, op.page_table, first, end);
  run(backend::append_kv, op, k_pages);
}

ENTMAXKV_OP(append_kv,
            "(Tensor k, Tensor v, Tensor? lengths, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!)? k_min, "
            "Tensor(d!)? k_max, Tensor(e!)? k_mean, Tensor(f!)? k_std, Tensor page_table, Tensor(g!) seq_lens, "
            "Tensor(h!)? codes=None, Tensor(i!)? norms=None) -> ()")

}  // namespace entmaxkv
