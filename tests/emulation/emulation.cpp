// Runs CUDA kernels on the CPU: every thread of a block has a stack, and they take turns (x86-64). Each block of a
// cluster has an OS thread, and these take turns, too: shared variables are thread_local. Only one thread runs at a
// time.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <memory>
#include <semaphore>
#include <thread>
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

void fail(const char* what) {
  std::fprintf(stderr, "emulated block (%d, %d, %d), thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
               what);
  std::abort();
}

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kSavedRegisters = 6;
constexpr int kMostBlocks = 8;  // of a cluster

struct Thread {
  // Only the part of a stack that is used takes memory.
  std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  void* stack_pointer = nullptr;
  bool done = false;
  const Barrier* barrier = nullptr;  // what it waits for, until the generation is over
  long generation = 0;
  bool at_cluster = false;  // whether it has arrived at the cluster's barrier, in this generation, and must yet wait
  long cluster_generation = 0;

  bool waits() const { return barrier && barrier->generation == generation; }
};

struct Warp : Barrier {
  Call call = Call::kNone;
  uint64_t values[2][32];  // of even and of odd generations
};

/// A block of a cluster.
struct Block {
  EmulatedIndex index{};
  int rank = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier{};
  void* scheduler = nullptr;
  bool begun = false;
  const char* marker = nullptr;  // the address that `marker` has in its OS thread
  std::binary_semaphore turn{0};

  bool ended() const { return barrier.members == 0; }
};

/// The distance between two thread_local variables of this library is the same in every OS thread.
thread_local char marker;

std::vector<Block*> blocks;  // one per OS thread; they live as long as the process, as OS threads wait for them
std::binary_semaphore all_wait{0};
Block* block;  // the block that runs
int cluster_size;
Barrier cluster_barrier;
const std::function<void()>* running;
long progress;  // how often a thread was resumed

Thread& this_thread() { return block->threads[threadIdx.x]; }

void pass_if_complete(Barrier& barrier) {
  if (barrier.arrived < barrier.members || barrier.members == 0) return;
  barrier.arrived = 0;
  ++barrier.generation;
}

void pause() { emulation_switch(&this_thread().stack_pointer, block->scheduler); }

void wait_for(const Barrier& barrier, long generation) {
  Thread& self = this_thread();
  self.barrier = &barrier;
  self.generation = generation;
  if (self.waits()) pause();
}

void arrive_and_wait(Barrier& barrier) {
  const long generation = barrier.generation;
  ++barrier.arrived;
  pass_if_complete(barrier);
  wait_for(barrier, generation);
}

void run_thread() {
  (*running)();
  Thread& self = this_thread();
  self.done = true;
  Warp& warp = block->warps[threadIdx.x / 32];
  if (warp.arrived > 0) fail("ends while lanes of its warp wait for it");
  --warp.members;
  --block->barrier.members;
  pass_if_complete(block->barrier);
  if (self.at_cluster && self.cluster_generation == cluster_barrier.generation) --cluster_barrier.arrived;
  --cluster_barrier.members;
  pass_if_complete(cluster_barrier);
  pause();
}

/// A stack that emulation_switch can return into: run_thread at its top, below it the saved registers.
void* fresh_stack(char* stack) {
  auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) / 16 * 16;
  auto* pointer = reinterpret_cast<void**>(top);
  *--pointer = nullptr;  // run_thread never returns
  *--pointer = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < kSavedRegisters; ++i) *--pointer = nullptr;
  return pointer;
}

/// What an OS thread does: in each of its block's turns it runs the block until all threads wait or have ended.
[[noreturn]] void serve(Block& own) {
  own.marker = &marker;
  for (;;) {
    own.turn.acquire();
    own.begun = true;
    block = &own;
    blockIdx = own.index;
    for (long before = progress - 1; before != progress;) {
      before = progress;
      for (int i = 0; i < blockDim.x; ++i) {
        Thread& thread = own.threads[i];
        if (thread.done || thread.waits()) continue;
        threadIdx = {i, 0, 0};
        ++progress;
        emulation_switch(&own.scheduler, thread.stack_pointer);
      }
    }
    all_wait.release();
  }
}

/// Prepares a block for its first turn.
void prepare(int rank, const EmulatedIndex& index) {
  if (rank == static_cast<int>(blocks.size())) {
    blocks.push_back(new Block);
    std::thread(serve, std::ref(*blocks.back())).detach();
  }
  Block& own = *blocks[rank];
  own.index = index;
  own.rank = rank;
  own.begun = false;
  own.barrier = {blockDim.x};
  own.warps.assign(blockDim.x / 32, {});
  for (Warp& warp : own.warps) warp.members = 32;
  if (static_cast<int>(own.threads.size()) < blockDim.x) own.threads.resize(blockDim.x);
  for (Thread& thread : own.threads) {
    thread.done = thread.at_cluster = false;
    thread.barrier = nullptr;
    thread.stack_pointer = fresh_stack(thread.stack.get());
  }
}

/// Runs the cluster whose first block has the index `first`.
void run_cluster(const EmulatedIndex& first) {
  cluster_barrier = {cluster_size * blockDim.x};
  for (int rank = 0; rank < cluster_size; ++rank) prepare(rank, {first.x + rank, first.y, first.z});
  while (cluster_barrier.members > 0) {
    const long before = progress;
    for (int rank = 0; rank < cluster_size; ++rank) {
      if (blocks[rank]->ended()) continue;
      blocks[rank]->turn.release();
      all_wait.acquire();
    }
    if (progress == before) fail("all threads wait");
  }
}

}  // namespace

const uint64_t* exchange(Call call, uint64_t value) {
  Warp& warp = block->warps[threadIdx.x / 32];
  if (warp.members < 32) fail("a warp function after lanes have ended");
  if (warp.arrived > 0 && warp.call != call) fail("lanes of a warp call different functions");
  warp.call = call;
  uint64_t* values = warp.values[warp.generation % 2];
  values[lane()] = value;
  arrive_and_wait(warp);
  return values;
}

void run(dim3 grid, int size, int cluster, const std::function<void()>& kernel) {
  running = &kernel;
  gridDim = {static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z)};
  blockDim = {size, 1, 1};
  cluster_size = cluster;
  if (size % 32) fail("a block of broken warps");
  if (cluster < 1 || cluster > kMostBlocks || gridDim.x % cluster) fail("a grid of broken clusters");
  for (int z = 0; z < gridDim.z; ++z) {
    for (int y = 0; y < gridDim.y; ++y) {
      for (int x = 0; x < gridDim.x; x += cluster) run_cluster({x, y, z});
    }
  }
}

namespace cluster {

int rank() { return block->rank; }
int size() { return cluster_size; }

void arrive() {
  Thread& self = this_thread();
  if (self.at_cluster) fail("arrives twice at the cluster's barrier");
  self.at_cluster = true;
  self.cluster_generation = cluster_barrier.generation;
  ++cluster_barrier.arrived;
  pass_if_complete(cluster_barrier);
}

void wait() {
  Thread& self = this_thread();
  if (!self.at_cluster) fail("waits at the cluster's barrier without having arrived");
  self.at_cluster = false;
  wait_for(cluster_barrier, self.cluster_generation);
}

void* copy_of(int rank, const void* shared) {
  if (rank < 0 || rank >= cluster_size) fail("uses the memory of a block outside the cluster");
  const Block& other = *blocks[rank];
  if (!other.begun) fail("uses the memory of a block that has not begun");
  if (other.ended()) fail("uses the memory of a block that has ended");
  return const_cast<char*>(other.marker + (static_cast<const char*>(shared) - block->marker));
}

void Mailbox::receive(int bytes) {
  if (round_.arrived > round_.members) fail("more announcements in a round than blocks");
  missing_ -= bytes;
  if (missing_ == 0) pass_if_complete(round_);
}

void Mailbox::wait(int round) {
  if (round != round_.generation && round != round_.generation - 1) fail("waits for a later round of a mailbox");
  wait_for(round_, round);
}

}  // namespace cluster

}  // namespace emulation

void __syncthreads() { emulation::arrive_and_wait(emulation::block->barrier); }
