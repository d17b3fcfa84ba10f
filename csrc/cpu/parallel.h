// Threads come from whoever embeds the core: torch's pool in the extension, std::thread in the plain library.
#pragma once

#include <cstdint>
#include <functional>

namespace entmaxkv::cpu {

/// Calls body(0) ... body(tasks - 1), in any order and in parallel; an exception in one of them is rethrown.
void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body);

}  // namespace entmaxkv::cpu
