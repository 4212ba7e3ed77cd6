// The fibers behind cuda_runtime.h.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace {

constexpr size_t kStack = 64 << 10;
constexpr size_t kFence = 256;  // bytes before and after a block's shared memory
constexpr unsigned char kPoison = 0xff;  // a NaN in every float type

int g_max_cluster = 16;
bool g_reversed = false;
size_t g_shared_limit = 227 << 10;  // of an H100 block

struct Launch {
  int64_t blocks, threads, cluster, shared;
};
std::vector<Launch> g_launches;

[[noreturn]] void fail(const char *what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

// Stricter than the device, which forgets threads that have ended: all that start must reach it.
struct Barrier {
  unsigned expected = 0, arrived = 0;
  bool somebody_left = false;
  uint64_t generation = 0;
  uint64_t arrive() {
    if (somebody_left) fail("threads wait at a barrier that others never reach");
    const uint64_t mine = generation;
    if (++arrived == expected) {
      arrived = 0;
      ++generation;
    }
    return mine;
  }
  void leave() {
    if (arrived > 0) fail("threads wait at a barrier that others never reach");
    somebody_left = true;
  }
};

struct Warp {
  Barrier barrier;
  unsigned lanes = 0;
  uint32_t word[2][32];
};

struct alignas(16) Chunk {
  unsigned char byte[16];
};

struct Block {
  std::vector<Chunk> chunks;  // aligned as on the device
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char *memory() { return reinterpret_cast<unsigned char *>(chunks.data()); }
};

// A stack that runs one thread after another. ucontext starts it; from then on setjmp and longjmp switch, which unlike
// swapcontext make no system call: a reduction of 512 threads switches 30000 times.
struct Fiber {
  jmp_buf state;
  ucontext_t start;
  bool started = false;
  emulation::Thread thread;
  Block *block = nullptr;
  Warp *warp = nullptr;
  unsigned exchanges = 0;
  const Barrier *waiting = nullptr;
  uint64_t generation = 0, cluster_generation = 0;
  bool done = false;
};

jmp_buf g_scheduler;
ucontext_t g_unused;
Fiber *g_current = nullptr;
std::vector<Block> *g_cluster = nullptr;
Barrier g_cluster_barrier;
size_t g_shared = 0;
const std::function<void()> *g_kernel = nullptr;

void suspend() {
  if (_setjmp(g_current->state) == 0) _longjmp(g_scheduler, 1);
}

void resume(Fiber &fiber) {
  g_current = &fiber;
  if (_setjmp(g_scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void wait_for(const Barrier &barrier, uint64_t generation) {
  if (barrier.generation != generation) return;
  g_current->waiting = &barrier;
  g_current->generation = generation;
  suspend();
  g_current->waiting = nullptr;
}

void fiber_main() {
  for (;;) {
    (*g_kernel)();
    g_current->done = true;
    g_current->block->barrier.leave();
    g_current->warp->barrier.leave();
    g_cluster_barrier.leave();
    suspend();
  }
}

// Fibers live as long as the process: a kernel of 8192 threads touches 64 MB of stacks once.
Fiber &fiber_at(size_t i) {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  while (fibers.size() <= i) {
    fibers.push_back(std::make_unique<Fiber>());
    ucontext_t &start = fibers.back()->start;
    getcontext(&start);
    start.uc_stack.ss_sp = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start.uc_stack.ss_sp == MAP_FAILED) fail("no memory for another thread's stack");
    start.uc_stack.ss_size = kStack;
    start.uc_link = &g_unused;
    makecontext(&start, fiber_main, 0);
  }
  return *fibers[i];
}

void prepare_block(Block &block, unsigned threads) {
  block.chunks.resize((g_shared + 2 * kFence + sizeof(Chunk) - 1) / sizeof(Chunk));
  std::memset(block.memory(), kPoison, block.chunks.size() * sizeof(Chunk));
  block.barrier.expected = threads;
  block.warps.resize((threads + 31) / 32);
  for (unsigned warp = 0; warp < block.warps.size(); ++warp) {
    block.warps[warp].lanes = std::min(32u, threads - 32 * warp);
    block.warps[warp].barrier.expected = block.warps[warp].lanes;
  }
}

void check_fences(Block &block) {
  const auto intact = [&](size_t first) {
    return std::all_of(block.memory() + first, block.memory() + first + kFence,
                       [](unsigned char byte) { return byte == kPoison; });
  };
  if (!intact(0) || !intact(kFence + g_shared)) fail("a write outside the block's shared memory");
}

std::vector<Fiber *> prepare_threads(std::vector<Block> &cluster, unsigned first_block, unsigned blocks,
                                     unsigned threads) {
  std::vector<Fiber *> fibers;
  const unsigned size = static_cast<unsigned>(cluster.size());
  for (unsigned rank = 0; rank < size; ++rank) {
    prepare_block(cluster[rank], threads);
    for (unsigned i = 0; i < threads; ++i) {
      Fiber &fiber = fiber_at(fibers.size());
      fiber.thread = {{i, 0, 0}, {first_block + rank, 0, 0}, {threads}, {blocks}, rank, size};
      fiber.block = &cluster[rank];
      fiber.warp = &cluster[rank].warps[i / 32];
      fiber.exchanges = 0;
      fiber.waiting = nullptr;
      fiber.done = false;
      fibers.push_back(&fiber);
    }
  }
  if (g_reversed) std::reverse(fibers.begin(), fibers.end());
  return fibers;
}

void run_cluster(unsigned first_block, unsigned blocks, unsigned threads, unsigned size) {
  std::vector<Block> cluster(size);
  g_cluster = &cluster;
  g_cluster_barrier = Barrier{size * threads};
  const std::vector<Fiber *> fibers = prepare_threads(cluster, first_block, blocks, threads);
  for (size_t left = fibers.size(); left > 0;) {
    bool progress = false;
    for (Fiber *fiber : fibers) {
      if (fiber->done || (fiber->waiting != nullptr && fiber->waiting->generation == fiber->generation)) continue;
      progress = true;
      resume(*fiber);
      left -= fiber->done;
    }
    if (!progress) fail("threads wait at a barrier that others never reach");
  }
  for (Block &block : cluster) check_fences(block);
}

}  // namespace

namespace emulation {

const Thread &current() { return g_current->thread; }
void *shared_memory() { return g_current->block->memory() + kFence; }
void *shared_memory_of(const void *local, unsigned rank) {
  if (rank >= g_cluster->size()) fail("shared memory of a block outside the cluster");
  const ptrdiff_t offset = static_cast<const unsigned char *>(local) - g_current->block->memory();
  return (*g_cluster)[rank].memory() + offset;
}
void barrier_block() {
  Barrier &barrier = g_current->block->barrier;
  wait_for(barrier, barrier.arrive());
}
void barrier_warp() {
  Barrier &barrier = g_current->warp->barrier;
  wait_for(barrier, barrier.arrive());
}
void arrive_cluster() { g_current->cluster_generation = g_cluster_barrier.arrive(); }
void wait_cluster() { wait_for(g_cluster_barrier, g_current->cluster_generation); }

uint32_t exchange(uint32_t word, unsigned from_lane) {
  Warp &warp = *g_current->warp;
  if (warp.barrier.somebody_left || from_lane >= warp.lanes) fail("a shuffle with a lane that is not there");
  // Two slots in turn: a lane can be one exchange ahead of another, never two.
  const unsigned slot = g_current->exchanges++ % 2;
  warp.word[slot][g_current->thread.thread.x % 32] = word;
  barrier_warp();
  return warp.word[slot][from_lane];
}

void run(unsigned blocks, unsigned threads, unsigned cluster, size_t shared, const std::function<void()> &kernel) {
  g_launches.push_back({blocks, threads, cluster, static_cast<int64_t>(shared)});
  g_kernel = &kernel;
  g_shared = shared;
  for (unsigned first = 0; first < blocks; first += cluster) run_cluster(first, blocks, threads, cluster);
}

bool refuses(unsigned cluster, size_t shared) {
  return cluster > static_cast<unsigned>(g_max_cluster) || shared > g_shared_limit;
}
int max_cluster() { return g_max_cluster; }

}  // namespace emulation

#define EXPORT extern "C" __attribute__((visibility("default")))

// The largest cluster that a launch may have (1: a device without clusters), and whether threads run from the last on.
EXPORT void emulation_configure(int64_t max_cluster, int64_t reversed) {
  g_max_cluster = static_cast<int>(max_cluster);
  g_reversed = reversed != 0;
  g_launches.clear();
}

// Launches since then: how many, and blocks, threads, cluster and shared bytes of one.
EXPORT int64_t emulation_launches() { return static_cast<int64_t>(g_launches.size()); }
EXPORT void emulation_launch(int64_t index, int64_t *launch) {
  std::memcpy(launch, &g_launches[index], sizeof(Launch));
}
