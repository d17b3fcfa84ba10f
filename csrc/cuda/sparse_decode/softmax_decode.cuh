// sparse_decode and dense_decode where alpha = 1 in every head: every token has weight, so that its value is read along
// with its key.
#pragma once

#include "../kernels.h"

namespace entmaxkv::cuda {

int64_t softmax_workspace_bytes(const SparseDecode& op);
void softmax_decode(const SparseDecode& op, void* workspace, cudaStream_t stream);

}  // namespace entmaxkv::cuda
