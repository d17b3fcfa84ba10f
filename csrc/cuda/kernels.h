// One function per op; every function takes the params struct that its front door has filled and checked, launches on
// `stream`, and does not wait.
#pragma once

#include <cuda_runtime_api.h>

#include "../ops.h"

namespace entmaxkv::cuda {

void append_kv(const AppendKv& op, cudaStream_t stream);
void page_stats(const PageStats& op, cudaStream_t stream);

}  // namespace entmaxkv::cuda
