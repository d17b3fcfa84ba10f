// Which tokens of a row are new.
#pragma once

#include "../common/sizes.cuh"

namespace entmaxkv::cuda {

/// The new tokens of a row: never more than k and v hold, whatever `lengths` says, or than the cache has room for.
struct NewTokens {
  int first, end;

  __device__ NewTokens(const AppendKv& op, int64_t row) : first(max(0, op.seq_lens[row])) {
    const int tokens = op.lengths ? max(0, min(op.lengths[row], op.tokens)) : op.tokens;
    end = min(first + tokens, op.max_pages * op.page_size);
  }
};

}  // namespace entmaxkv::cuda
