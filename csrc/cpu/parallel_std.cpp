// parallel_for of the library without torch: threads take task after task.
#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#include "parallel.h"

namespace entmaxkv::cpu {

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body) {
  const int64_t workers = std::min<int64_t>(tasks, std::max(1u, std::thread::hardware_concurrency()));
  std::atomic<int64_t> next{0};
  std::vector<std::exception_ptr> errors(workers);
  const auto work = [&](int64_t worker) {
    try {
      for (int64_t task; (task = next++) < tasks;) body(task);
    } catch (...) {
      errors[worker] = std::current_exception();
      next = tasks;
    }
  };
  std::vector<std::jthread> threads;  // the destructor joins them, also after an exception
  for (int64_t worker = 1; worker < workers; ++worker) threads.emplace_back(work, worker);
  if (workers > 0) work(0);
  threads.clear();
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace entmaxkv::cpu
