// sparse_decode and dense_decode of short lists: in one launch, without memory between kernels.
#pragma once

#include "../kernels.h"

namespace entmaxkv::cuda {

constexpr int kShort = 4096;  // most tokens of a short list

/// Returns whether all lists of the op are short, on a GPU that can decode them in one launch.
bool is_short(const SparseDecode& op);

/// Decodes short lists. `name` is that of the op, for error messages. `value_vectors` says whether value rows can be
/// read 16 bytes at a time.
void short_decode(const char* name, const SparseDecode& op, bool value_vectors, cudaStream_t stream);

}  // namespace entmaxkv::cuda
