#include "backend.h"

namespace entmaxkv {

void page_stats(Tensor k_pages, Tensor page_table, Tensor seq_lens, Optional k_min, Optional k_max, Optional k_mean,
                Optional k_std) {
  Arguments args("page_stats");
  PageStats op;
  take_keys(args, op, k_pages);
  op.statistics = statistics_of(args, k_pages, k_min, k_max, k_mean, k_std);
  take_cache(args, op, page_table, seq_lens);
  run(backend::page_stats, op, k_pages);
}

ENTMAXKV_OP(page_stats,
            "(Tensor k_pages, Tensor page_table, Tensor seq_lens, Tensor(a!)? k_min, Tensor(b!)? k_max, "
            "Tensor(c!)? k_mean, Tensor(d!)? k_std) -> ()")

}  // namespace entmaxkv
