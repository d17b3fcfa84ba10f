// The range of tokens that append_kv adds to a row.
#pragma once

#include "sizes.cuh"

namespace entmaxkv::cuda {

/// The new tokens of a row are at positions first ... end - 1. There are at most as many as k and v hold, whatever
/// `lengths` says, and as the row's page table has room for.
struct NewTokens {
  int first, end;

  __device__ NewTokens(const AppendKv& op, int64_t row) : first(max(0, op.seq_lens[row])) {
    const int tokens = op.lengths ? max(0, min(op.lengths[row], op.tokens)) : op.tokens;
    end = min(first + tokens, op.max_pages * op.page_size);
  }
};

}  // namespace entmaxkv::cuda
