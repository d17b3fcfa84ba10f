// How kernels use threads. The extension takes them from torch's pool (parallel_torch.cpp), the library without torch
// starts them with std::jthread (parallel_std.cpp).
#pragma once

#include <cstdint>
#include <functional>

namespace entmaxkv::cpu {

/// Calls body(0) ... body(tasks - 1), in any order and in parallel. Rethrows an exception of any of these calls.
void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body);

}  // namespace entmaxkv::cpu
