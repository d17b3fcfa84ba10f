// sparse_decode and dense_decode for alpha = 1 in every head. Every token has weight, so its value is read together
// with its key.
#pragma once

#include "../kernels.h"

namespace entmaxkv::cuda {

int64_t softmax_workspace_bytes(const SparseDecode& op);
void softmax_decode(const SparseDecode& op, void* workspace, cudaStream_t stream);

}  // namespace entmaxkv::cuda
