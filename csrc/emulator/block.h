// The threads of one block, as fibers: in random order from one meeting to the next, one at a time.
#pragma once
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace d2v {
namespace emulator {

constexpr int WARP = 32;
constexpr int SLOT = 8;                      // words that a lane can hand to its warp at once
constexpr int FAILED = 999;                  // returned by launch(); error_text() has the reason
constexpr size_t MAX_SHARED = 163 * 1024;    // of a block on sm_80
constexpr size_t CANARY = 64;                // bytes around shared memory that nobody may change

// Threads that meet: the last to arrive opens the way for all. Two generations of what they brought are kept.
struct Group {
  int size = 0, arrived = 0, generation = 0;
  const char* what = nullptr;  // the operation of those that wait
  int first = 0;               // the thread that came first
  std::vector<int> waiting;
  struct Meeting {
    std::vector<uint32_t> words;  // [size, SLOT]
    std::vector<float> a, b;      // operands of a matrix product, decoded once
  } meetings[2];
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Thread {
  Fiber fiber;
  const char* at = "its start";  // the operation it waits in
  std::vector<Copy> open;        // asynchronous copies since the last commit
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  int index[3] = {0, 0, 0};
  int grid[3] = {1, 1, 1};
  int num_threads = 0;
  std::vector<Thread> threads;
  std::vector<Group> warps;
  Group all;
  std::unique_ptr<unsigned char[]> memory;  // shared memory; with canaries unless a sanitizer watches the ends
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<int> runnable;
};

struct State {
  Block block;
  int current = 0;
  Fiber host;
  bool from_host = false;  // the next fiber to start is started by the host
  char started = 0, ended = 0;  // order between host and threads, for ThreadSanitizer
  std::vector<std::unique_ptr<Stack>> stacks;
  Identities identities;
  const std::function<void()>* body = nullptr;
  std::string kernel, error;
  bool recording = false;
  std::string launches;
  uint64_t seed = 1, random = 1;
  std::mutex mutex;
};

inline State state;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

D2V_UNOBSERVED int thread() { return state.current; }
D2V_UNOBSERVED int lane() { return state.current % WARP; }
inline Thread& self() {
  const Unobserved quiet;
  return state.block.threads[size_t(state.current)];
}
inline Group& warp() {
  const Unobserved quiet;
  return state.block.warps[size_t(state.current / WARP)];
}

inline std::string place(int thread) {
  const int* index = state.block.index;
  return "kernel " + state.kernel + ", block (" + std::to_string(index[0]) + ", " + std::to_string(index[1]) + ", " +
         std::to_string(index[2]) + "), thread " + std::to_string(thread);
}

// Ends the launch with an error that says where.
[[noreturn]] inline void fail(const std::string& what) {
  throw Failure("emulator: " + place(state.current) + ": " + what);
}

inline uint64_t random_below(uint64_t bound) {  // xorshift64*
  uint64_t& x = state.random;
  x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
  return ((x * 0x2545f4914f6cdd1dull) >> 33) % bound;
}

// Some thread that can run, made the current one; the host when there is none.
inline Fiber& choose() {
  const Unobserved quiet;
  auto& runnable = state.block.runnable;
  if (runnable.empty() || !state.error.empty()) return state.host;
  std::swap(runnable[size_t(random_below(runnable.size()))], runnable.back());
  state.current = runnable.back();
  runnable.pop_back();
  return self().fiber;
}
D2V_UNOBSERVED void run_another(bool last) {
  Fiber& from = self().fiber;
  Fiber& to = choose();
  if (&to != &from) switch_to(from, to, last);
}

// Puts down what this thread brings. True when it must wait, or lets others go first.
template <class Decode>
bool arrive(Group& group, Group::Meeting& meeting, int member, const char* what, const uint32_t* words, int count,
            Decode decode) {
  const Unobserved quiet;
  const int me = state.current;
  if (group.arrived == 0) {
    group.what = what;
    group.first = me;
  } else if (std::strcmp(group.what, what) != 0) {
    fail(std::string("is at ") + what + ", while thread " + std::to_string(group.first) + " waits at " + group.what);
  }
  meeting.words.resize(size_t(group.size) * SLOT);
  if (count) std::memcpy(&meeting.words[size_t(member) * SLOT], words, 4 * size_t(count));
  if (++group.arrived < group.size) {
    self().at = what;
    group.waiting.push_back(me);
    return true;
  }
  decode(meeting);
  group.arrived = 0;
  ++group.generation;
  auto& runnable = state.block.runnable;
  runnable.insert(runnable.end(), group.waiting.begin(), group.waiting.end());
  group.waiting.clear();
  if (random_below(2)) return false;
  runnable.push_back(me);
  return true;
}

D2V_UNOBSERVED int generation(const Group& group) { return group.generation; }

// Waits for the group. `decode`: done once, by the last to arrive, with what all brought. Returns that.
template <class Decode>
const Group::Meeting& meet(Group& group, int member, const char* what, const uint32_t* words, int count,
                           Decode decode) {
  auto& meeting = group.meetings[generation(group) & 1];
  signal(&meeting);
  signal(&state.ended);  // a deadlock may end this thread here
  if (arrive(group, meeting, member, what, words, count, decode)) run_another(false);
  wait(&meeting);
  return meeting;
}
inline const Group::Meeting& meet(Group& group, int member, const char* what, const uint32_t* words = nullptr,
                                  int count = 0) {
  return meet(group, member, what, words, count, [](Group::Meeting&) {});
}

D2V_UNOBSERVED const std::function<void()>& enter_thread() {
  arrived(self().fiber, state.from_host ? &state.host : nullptr);
  state.from_host = false;
  return *state.body;
}
D2V_UNOBSERVED void leave_thread() {
  self().at = nullptr;
  run_another(true);
}
D2V_UNOBSERVED void run_thread() {
  const auto& body = enter_thread();
  wait(&state.started);
  try {
    body();
  } catch (const Failure& failure) {
    const Unobserved quiet;
    if (state.error.empty()) state.error = failure.what();
  }
  signal(&state.ended);
  leave_thread();
}

inline void check_canaries() {
#if !defined(__SANITIZE_ADDRESS__)
  const Block& block = state.block;
  for (size_t i = 0; i < CANARY; ++i) {
    if (block.memory[i] != 0xa5) throw Failure("emulator: " + place(0) + " or another wrote before shared memory");
    if (block.shared[block.shared_bytes + i] != 0xa5) {
      throw Failure("emulator: " + place(0) + " or another wrote past the " + std::to_string(block.shared_bytes) +
                    " bytes of shared memory");
    }
  }
#endif
}

inline void make_shared_memory(size_t bytes) {
  Block& block = state.block;
#if defined(__SANITIZE_ADDRESS__)
  block.memory.reset(new unsigned char[bytes]);
  block.shared = block.memory.get();
#else
  block.memory.reset(new unsigned char[bytes + 2 * CANARY]);
  std::memset(block.memory.get(), 0xa5, bytes + 2 * CANARY);
  block.shared = block.memory.get() + CANARY;
#endif
  block.shared_bytes = bytes;
  std::memset(block.shared, 0xff, bytes);  // NaN in every format
}

inline void report_deadlock() {
  const Block& block = state.block;
  int waiting = 0, example = -1;
  for (size_t t = 0; t < block.threads.size(); ++t) {
    if (!block.threads[t].at) continue;
    ++waiting;
    if (example < 0) example = int(t);
  }
  if (!waiting) return;
  throw Failure("emulator: deadlock: " + place(example) + " waits at " + block.threads[size_t(example)].at + " (" +
                std::to_string(waiting) + " of " + std::to_string(block.threads.size()) +
                " threads wait, the others have ended)");
}

inline void run_block(int num_threads, size_t shared_bytes) {
  const Unobserved quiet;  // nothing orders the blocks: what two of them do to the same address is a race
  Block& block = state.block;
  make_shared_memory(shared_bytes);
  block.num_threads = num_threads;
  block.threads = std::vector<Thread>(size_t(num_threads));
  block.warps = std::vector<Group>(size_t((num_threads + WARP - 1) / WARP));
  for (size_t w = 0; w < block.warps.size(); ++w) block.warps[w].size = std::min(WARP, num_threads - int(w) * WARP);
  block.all = Group{};
  block.all.size = num_threads;
  block.runnable.resize(size_t(num_threads));
  std::iota(block.runnable.begin(), block.runnable.end(), 0);
  while (int(state.stacks.size()) < num_threads) state.stacks.emplace_back(new Stack);
  for (int t = 0; t < num_threads; ++t) {
    prepare(block.threads[size_t(t)].fiber, *state.stacks[size_t(t)], run_thread, state.identities.next());
  }
  state.current = int(random_below(uint64_t(num_threads)));
  std::swap(block.runnable[size_t(state.current)], block.runnable.back());
  block.runnable.pop_back();
  state.from_host = true;
  switch_to(state.host, self().fiber);
  for (auto& thread : block.threads) state.identities.take_back(thread.fiber, thread.at == nullptr);
  if (!state.error.empty()) throw Failure(state.error);
  report_deadlock();
  check_canaries();
}

// The name of a kernel, where the dynamic linker knows it.
inline std::string kernel_name(const void* kernel) {
  Dl_info found{};
  if (!dladdr(kernel, &found) || !found.dli_sname || found.dli_saddr != kernel) return "(without a visible name)";
  int status = 0;
  char* readable = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? readable : found.dli_sname;
  std::free(readable);
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);  // of a template, the type of the result is part of the name
  return name.substr(0, name.find('('));
}

// Every block once, in random order. Returns 0, or FAILED with the reason in error_text().
inline int launch(const void* kernel, const int (&grid)[3], int num_threads, size_t shared_bytes,
                  const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.kernel = kernel_name(kernel);
  if (state.recording) {
    state.launches += state.kernel + "\t" + std::to_string(int64_t(grid[0]) * grid[1] * grid[2]) + "\t" +
                      std::to_string(num_threads) + "\t" + std::to_string(shared_bytes) + "\n";
    return 0;
  }
  state.body = &body;
  state.error.clear();
  state.random = state.seed * 0x9e3779b97f4a7c15ull | 1;
  std::memcpy(state.block.grid, grid, sizeof(grid));
  std::vector<int64_t> order(size_t(grid[0]) * size_t(grid[1]) * size_t(grid[2]));
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[size_t(random_below(i))]);
  signal(&state.started);
  int result = 0;
  try {
    if (num_threads < 1 || num_threads > 1024) throw Failure("emulator: kernel " + state.kernel + ": bad block size");
    if (shared_bytes > MAX_SHARED) {
      throw Failure("emulator: kernel " + state.kernel + ": " + std::to_string(shared_bytes) +
                    " bytes of shared memory, sm_80 has " + std::to_string(MAX_SHARED));
    }
    for (const int64_t i : order) {
      state.block.index[0] = int(i % grid[0]);
      state.block.index[1] = int(i / grid[0] % grid[1]);
      state.block.index[2] = int(i / grid[0] / grid[1]);
      run_block(num_threads, shared_bytes);
    }
  } catch (const Failure& failure) {
    state.error = failure.what();
    result = FAILED;
  }
  wait(&state.ended);
  return result;
}

inline const char* error_text(int code) {
  if (code == FAILED) return state.error.c_str();
  return code == 1 ? "invalid argument" : "unknown error";
}

}  // namespace emulator
}  // namespace d2v
