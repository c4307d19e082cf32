#include "emulator.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define MILKERNELS_ASAN 1
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#include <ucontext.h>
#define MILKERNELS_UCONTEXT 1
#endif

namespace milkernels::emulator {

dim3 grid_size, block_size;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kFirstFrames = 8 << 10;  // more than fiber_main and what it calls need of a stack
constexpr int kLanes = 32;

#ifdef MILKERNELS_UCONTEXT
using Context = ucontext_t;
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#else
// ucontext asks the kernel for the signal mask at each switch; this saves what a call must keep, on the stack.
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void milkernels_switch_stack(void** from, void* to);
asm(R"(
.text
.globl milkernels_switch_stack
.hidden milkernels_switch_stack
.type milkernels_switch_stack, @function
milkernels_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size milkernels_switch_stack, .-milkernels_switch_stack
)");
void switch_context(Context& from, Context& to) { milkernels_switch_stack(&from.stack_pointer, to.stack_pointer); }
#endif

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Fiber {
  Context context;
  unsigned char* stack = nullptr;
  Thread place;
  State state = State::kReady;
  unsigned mask = 0;                      // of the warp barrier it waits at
  int turn = 0;                           // which of two slots its warp exchanges by
  std::vector<std::vector<Copy>> groups;  // committed copies, the oldest first
  std::vector<Copy> open;                 // not yet committed
};

struct Warp {
  uint64_t slots[2][kLanes];
};

// The block that runs.
std::vector<Fiber> fibers;
std::vector<std::unique_ptr<unsigned char[]>> stacks;  // kept, as new ones cost more than many a kernel
std::vector<Warp> warps;
std::unique_ptr<unsigned char[]> shared;
const std::function<void()>* body = nullptr;
Fiber* running = nullptr;
Context scheduler;
Order order = Order::kForward;
bool dry = false;
int64_t launches = 0;
std::string failure;

#ifdef MILKERNELS_ASAN
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
#endif

int index_of(const Fiber& fiber) { return static_cast<int>(fiber.place.thread.x); }

void entered() {
#ifdef MILKERNELS_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
}

// Back to the scheduler, which comes back unless the fiber is done.
void leave(bool done) {
  Fiber& me = *running;
#ifdef MILKERNELS_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(done ? nullptr : &fake, scheduler_stack, scheduler_size);
#endif
  switch_context(me.context, scheduler);
#ifdef MILKERNELS_ASAN
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#endif
  (void)done;
}

void fiber_main() {
  entered();
  try {
    (*body)();
    if (!running->open.empty()) failure = "asynchronous copies that were not committed";
  } catch (const std::exception& error) {
    failure = error.what();
  }
  running->state = State::kDone;
  leave(true);
}

void prepare(Fiber& fiber) {
#ifdef MILKERNELS_ASAN
  // The fiber before this one left it for good, with the marks of its first frames; the others have returned.
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack + kStack - kFirstFrames, kFirstFrames);
#endif
#ifdef MILKERNELS_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#else
  // As if fiber_main had been called: the stack pointer is 8 off a multiple of 16 once its address is popped.
  const uintptr_t top = reinterpret_cast<uintptr_t>(fiber.stack + kStack) & ~uintptr_t{15};
  void** p = reinterpret_cast<void**>(top) - 2;
  *p = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--p = nullptr;
  fiber.context.stack_pointer = p;
#endif
}

void resume(Fiber& fiber) {
  running = &fiber;
#ifdef MILKERNELS_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
#endif
  switch_context(scheduler, fiber.context);
#ifdef MILKERNELS_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  running = nullptr;
}

// Lets those go on for whom nobody is missing any more; false if there is none.
bool release() {
  bool any = false;
  const int count = static_cast<int>(fibers.size());
  for (int first = 0; first < count; first += kLanes) {
    const int end = std::min(first + kLanes, count);
    for (int i = first; i < end; ++i) {
      if (fibers[i].state != State::kAtWarp) continue;
      const unsigned mask = fibers[i].mask;
      bool all = true;
      for (int j = first; j < first + kLanes; ++j) {
        if (mask >> (j - first) & 1)
          all = all && j < end && fibers[j].state == State::kAtWarp && fibers[j].mask == mask;
      }
      for (int j = first; all && j < end; ++j) {
        if (mask >> (j - first) & 1) fibers[j].state = State::kReady, any = true;
      }
    }
  }
  if (any) return true;
  // Threads that have returned are not waited for.
  for (const Fiber& fiber : fibers) {
    if (fiber.state != State::kAtBlock && fiber.state != State::kDone) return false;
  }
  for (Fiber& fiber : fibers) {
    if (fiber.state == State::kAtBlock) fiber.state = State::kReady, any = true;
  }
  return any;
}

void run_block(const std::vector<int>& turns) {
  for (;;) {
    bool ran = false;
    for (int i : turns) {
      if (fibers[i].state != State::kReady) continue;
      resume(fibers[i]);
      ran = true;
      if (!failure.empty()) throw std::runtime_error("milkernels: emulated kernel: " + failure);
    }
    if (ran) continue;
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::kDone; })) return;
    if (!release()) throw std::runtime_error("milkernels: emulated kernel: a barrier that not all threads reach");
  }
}

void wait_at(State state, unsigned mask) {
  running->state = state;
  running->mask = mask;
  leave(false);
}

}  // namespace

void set_order(Order wanted) { order = wanted; }
void set_dry(bool on) { dry = on; }
int64_t launch_count() { return launches; }
const Thread& self() { return running->place; }
unsigned char* shared_memory() { return shared.get(); }

void run(dim3 grid, dim3 block, int64_t shared_bytes, const std::function<void()>& kernel) {
  const int threads = static_cast<int>(block.x);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024 || threads % kLanes != 0 || shared_bytes > (227 << 10)) {
    throw std::runtime_error("milkernels: emulated kernel: invalid configuration");
  }
  ++launches;
  if (dry) return;
  grid_size = grid;
  block_size = block;
  body = &kernel;
  failure.clear();
  // Those of a run that failed were left where they stood.
  if (!std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::kDone; }))
    stacks.clear();
  while (static_cast<int>(stacks.size()) < threads) stacks.emplace_back(new unsigned char[kStack]);
  fibers.resize(threads);
  warps.assign(threads / kLanes, {});
  std::vector<int> turns(threads);
  std::iota(turns.begin(), turns.end(), 0);
  std::mt19937 random(static_cast<unsigned>(launches));
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        if (order == Order::kReverse && x + y + z == 0) std::reverse(turns.begin(), turns.end());
        if (order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random);
        // Exactly what was asked for, so that a byte more is seen; NaN as every type but the integers reads it.
        shared.reset(new unsigned char[shared_bytes]);
        std::memset(shared.get(), 0xff, shared_bytes);
        for (int t = 0; t < threads; ++t) {
          Fiber& fiber = fibers[t];
          fiber.stack = stacks[t].get();
          fiber.place = {dim3(t, 0, 0), dim3(x, y, z)};
          fiber.state = State::kReady;
          fiber.turn = 0;
          fiber.groups.clear();
          fiber.open.clear();
          prepare(fiber);
        }
        run_block(turns);
      }
    }
  }
}

void block_barrier() { wait_at(State::kAtBlock, 0); }
void warp_barrier(unsigned mask) { wait_at(State::kAtWarp, mask); }

uint64_t exchange(unsigned mask, uint64_t value, int from) {
  Fiber& me = *running;
  auto& slots = warps[index_of(me) / kLanes].slots[me.turn ^= 1];
  slots[index_of(me) % kLanes] = value;
  warp_barrier(mask);
  return slots[from];
}

unsigned ballot(unsigned mask, bool value) {
  Fiber& me = *running;
  auto& slots = warps[index_of(me) / kLanes].slots[me.turn ^= 1];
  slots[index_of(me) % kLanes] = value;
  warp_barrier(mask);
  unsigned bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<unsigned>(slots[lane] != 0 && mask >> lane & 1) << lane;
  return bits;
}

void copy_async(void* to, const void* from, int bytes, bool used) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || (used && reinterpret_cast<uintptr_t>(from) % bytes != 0)) {
    throw std::runtime_error("an asynchronous copy of " + std::to_string(bytes) + " bytes that is not aligned");
  }
  running->open.push_back({to, used ? from : nullptr, bytes});
}

void commit_copies() {
  running->groups.push_back(std::move(running->open));
  running->open.clear();
}

void wait_for_copies(int pending) {
  auto& groups = running->groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.from != nullptr) std::memcpy(copy.to, copy.from, copy.bytes);
      else std::memset(copy.to, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace milkernels::emulator
