// Stacks to switch between, and what the sanitizers must be told about it. Nothing here knows about CUDA.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Accesses of the emulator to its own state are no races of the kernel.
#define D2V_UNOBSERVED __attribute__((no_sanitize_thread)) inline

namespace d2v {
namespace emulator {

constexpr size_t STACK = 64 << 10;

// Memory of one fiber; what lies below the stack cannot be touched.
class Stack {
 public:
  Stack() : guard_(size_t(sysconf(_SC_PAGESIZE))) {
    base_ = static_cast<char*>(mmap(nullptr, guard_ + STACK, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_, guard_, PROT_NONE)) throw std::bad_alloc();
  }
  ~Stack() { munmap(base_, guard_ + STACK); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  char* bottom() const { return base_ + guard_; }
  char* top() const { return bottom() + STACK; }

 private:
  size_t guard_;
  char* base_;
};

// A place to return to: a fiber's stack, or (without one) whoever called it.
struct Fiber {
  Stack* stack = nullptr;
#if defined(__x86_64__)
  void* pointer = nullptr;  // of the stack, below the saved registers
#else
  ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* thread = nullptr;
#endif
};

#if defined(__x86_64__)
// Saves what a function call must keep, swaps the stack pointers, and returns on the other stack.
__attribute__((naked, noinline)) inline void swap_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n\t"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#endif

// `entry` runs on the fiber's stack at the first switch to it, and never returns. `identity`: of a fiber that has
// ended, or null.
inline void prepare(Fiber& fiber, Stack& stack, void (*entry)(), [[maybe_unused]] void* identity) {
  fiber.stack = &stack;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack.bottom(), STACK);  // frames of the last fiber here may not have ended
  fiber.bottom = stack.bottom();
  fiber.size = STACK;
  fiber.fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  // new memory: on the same stack, threads of two blocks would seem to race
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(stack.bottom(), STACK, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) throw std::bad_alloc();
  fiber.thread = identity ? identity : __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack.top());
  *--top = nullptr;  // so that the stack pointer is where it is after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack.bottom();
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

// The first thing on a new stack, and the first after a switch back. `from`: who switched, if its stack is not known.
D2V_UNOBSERVED void arrived(Fiber& here, Fiber* from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(here.fake_stack, &bottom, &size);
  if (from) from->bottom = bottom, from->size = size;
#else
  (void)here, (void)from;
#endif
}

// Goes on where `to` stopped; returns when somebody switches back. `last`: nobody will.
D2V_UNOBSERVED void switch_to(Fiber& from, Fiber& to, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.size);
#else
  (void)last;
#endif
#if defined(__SANITIZE_THREAD__)
  if (!from.stack) from.thread = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  swap_stacks(&from.pointer, to.pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived(from, nullptr);
}

// What ThreadSanitizer knows a fiber by. To make one takes long, so that they are used again, but late: threads of two
// blocks with the same identity do not race.
class Identities {
 public:
  void* next() {
    if (free_.size() < KEPT) return nullptr;
    void* oldest = free_.front();
    free_.pop_front();
    return oldest;
  }
  // `whole`: the fiber came to its end, and can start again.
  void take_back([[maybe_unused]] const Fiber& fiber, [[maybe_unused]] bool whole) {
#if defined(__SANITIZE_THREAD__)
    if (whole) free_.push_back(fiber.thread);
    else __tsan_destroy_fiber(fiber.thread);
#endif
  }

 private:
  static constexpr size_t KEPT = 1024;
  std::deque<void*> free_;
};

// Order that ThreadSanitizer cannot see by itself: all that came before any `signal` comes before what follows `wait`.
inline void signal(void* object) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(object);
#else
  (void)object;
#endif
}
inline void wait(void* object) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(object);
#else
  (void)object;
#endif
}

// While it lives, ThreadSanitizer ignores accesses of this fiber: those of the emulator to its own state.
struct Unobserved {
#if defined(__SANITIZE_THREAD__)
  Unobserved() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unobserved() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unobserved() {}
#endif
};

}  // namespace emulator
}  // namespace d2v
