// Runs CUDA kernels on the CPU: every thread of a block has a stack, and they take turns (x86-64).
#include <cuda_runtime_api.h>

#include <cstdio>
#include <vector>

EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

/// Saves the registers that a callee must keep, stores the stack pointer in *from, and goes on where `to` was left.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.globl emulation_switch
emulation_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace emulation {

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kSavedRegisters = 6;

/// Threads that wait for each other; the last to arrive starts the next generation.
struct Barrier {
  int members = 0, arrived = 0;
  long generation = 0;
};

struct Thread {
  std::vector<char> stack = std::vector<char>(kStackBytes);
  void* stack_pointer = nullptr;
  bool done = false;
  const Barrier* barrier = nullptr;  // what it waits for, until the generation is over
  long generation = 0;

  bool waits() const { return barrier && barrier->generation == generation; }
};

struct Warp : Barrier {
  Call call = Call::kNone;
  uint64_t values[2][32];  // of even and of odd generations
};

std::vector<Thread> threads;
std::vector<Warp> warps;
Barrier block;
void* scheduler;
const std::function<void()>* running;
long progress;  // barriers passed and threads ended

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated block (%d, %d, %d), thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
               what);
  std::abort();
}

void pause() {
  const EmulatedIndex self = threadIdx;
  emulation_switch(&threads[self.x].stack_pointer, scheduler);
}

void pass_if_complete(Barrier& barrier) {
  if (barrier.arrived < barrier.members || barrier.members == 0) return;
  barrier.arrived = 0;
  ++barrier.generation;
  ++progress;
}

void wait(Barrier& barrier) {
  Thread& self = threads[threadIdx.x];
  self.barrier = &barrier;
  self.generation = barrier.generation;
  ++barrier.arrived;
  pass_if_complete(barrier);
  if (self.waits()) pause();
}

void run_thread() {
  (*running)();
  threads[threadIdx.x].done = true;
  ++progress;
  Warp& warp = warps[threadIdx.x / 32];
  if (warp.arrived > 0) fail("ends while lanes of its warp wait for it");
  --warp.members;
  --block.members;
  pass_if_complete(block);
  pause();
}

/// A stack that emulation_switch can return into: run_thread at its top, below it the saved registers.
void* fresh_stack(std::vector<char>& stack) {
  auto top = reinterpret_cast<uintptr_t>(stack.data() + stack.size()) / 16 * 16;
  auto* pointer = reinterpret_cast<void**>(top);
  *--pointer = nullptr;  // run_thread never returns
  *--pointer = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < kSavedRegisters; ++i) *--pointer = nullptr;
  return pointer;
}

void run_block(int size) {
  block = {size};
  warps.assign(size / 32, {});
  for (Warp& warp : warps) warp.members = 32;
  for (int i = 0; i < size; ++i) {
    threads[i].done = false;
    threads[i].barrier = nullptr;
    threads[i].stack_pointer = fresh_stack(threads[i].stack);
  }
  while (block.members > 0) {
    const long before = progress;
    for (int i = 0; i < size; ++i) {
      if (threads[i].done || threads[i].waits()) continue;
      threadIdx = {i, 0, 0};
      emulation_switch(&scheduler, threads[i].stack_pointer);
    }
    if (progress == before) fail("all threads wait");
  }
}

}  // namespace

const uint64_t* exchange(Call call, uint64_t value) {
  Warp& warp = warps[threadIdx.x / 32];
  if (warp.members < 32) fail("a warp function after lanes have ended");
  if (warp.arrived > 0 && warp.call != call) fail("lanes of a warp call different functions");
  warp.call = call;
  uint64_t* values = warp.values[warp.generation % 2];
  values[lane()] = value;
  wait(warp);
  return values;
}

void run(dim3 grid, int size, const std::function<void()>& kernel) {
  running = &kernel;
  gridDim = {static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z)};
  blockDim = {size, 1, 1};
  if (size % 32) fail("a block of broken warps");
  if (static_cast<int>(threads.size()) < size) threads.resize(size);
  for (int z = 0; z < gridDim.z; ++z) {
    for (int y = 0; y < gridDim.y; ++y) {
      for (int x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        run_block(size);
      }
    }
  }
}

}  // namespace emulation

void __syncthreads() { emulation::wait(emulation::block); }
