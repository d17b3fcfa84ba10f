#include "backend.h"

namespace entmaxkv {

void build_sketch(Tensor k_pages, Tensor page_table, Tensor seq_lens, Tensor codes, Tensor norms) {
  Arguments args("build_sketch");
  BuildSketch op;
  op.dtype = args.element(k_pages, "k_pages");
  op.k_pages = args.rows(k_pages, "k_pages [pages, kv_heads, page_size, head_dim]", k_pages);
  op.sketch = sketch_of(args, codes, norms);
  op.page_table = page_table_of(args, page_table);
  op.seq_lens = args.snapshot<const int32_t>(seq_lens, "seq_lens [batch]");
  static_cast<Sizes&>(op) = args.sizes();
  check_cache(args, op.page_table, op.seq_lens);
  run(backend::build_sketch, op, k_pages);
}

ENTMAXKV_OP(build_sketch,
            "(Tensor k_pages, Tensor page_table, Tensor seq_lens, Tensor(a!) codes, Tensor(b!) norms) -> ()")

}  // namespace entmaxkv
