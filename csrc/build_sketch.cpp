#include "backend.h"

namespace entmaxkv {

void build_sketch(Tensor k_pages, Tensor page_table, Tensor seq_lens, Tensor codes, Tensor norms) {
  Arguments args("build_sketch");
  BuildSketch op;
  take_keys(args, op, k_pages);
  op.sketch = sketch_of(args, codes, norms);
  take_cache(args, op, page_table, seq_lens);
  run(backend::build_sketch, op, k_pages);
}

ENTMAXKV_OP(build_sketch,
            "(Tensor k_pages, Tensor page_table, Tensor seq_lens, Tensor(a!) codes, Tensor(b!) norms) -> ()")

}  // namespace entmaxkv
