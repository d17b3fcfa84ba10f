// constants: the numbers that Python shares with the kernels. They are written down in C++ alone. The op takes
// no tensor, so one kernel in _C serves every device.
#include "check.h"

#ifndef USE_CUDA
namespace entmaxkv {

std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, double> constants() {
  return {kMaxHeadDim,    kMinPageSize, kMaxPageSize, sketch::kBlock, sketch::row_bytes(sketch::kBlock),
          sketch::kExact, kSoftmaxGap,  kRankLower};
}

STABLE_TORCH_LIBRARY_FRAGMENT(entmaxkv, m) {
  m.def(
      "constants() -> (int max_head_dim, int min_page_size, int max_page_size, int sketch_block, "
      "int sketch_block_bytes, int exact_scores, float softmax_gap, float rank_lower)");
}
STABLE_TORCH_LIBRARY_IMPL(entmaxkv, CompositeExplicitAutograd, m) { m.impl("constants", TORCH_BOX(&constants)); }

}  // namespace entmaxkv
#endif
