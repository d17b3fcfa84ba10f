// parallel_for of the extension, in torch's threads.
#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace entmaxkv::cpu {

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task);
  });
}

}  // namespace entmaxkv::cpu
