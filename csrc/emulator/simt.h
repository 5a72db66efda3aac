// Runs a kernel on the CPU: every thread of a block is a fiber, and barriers, shuffles and warp-wide matrix instructions
// wait for their group as the hardware does. Same names as kernels/simt.cuh.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define D2V_DEVICE inline
#define D2V_KERNEL
#define D2V_BOUNDS(threads, blocks_per_sm)

namespace d2v {

struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Words2 {
  uint32_t x, y;
};

namespace emulator {

constexpr int WARP = 32;
constexpr int SLOT = 8;  // words that a lane can hand to its warp at once
constexpr size_t STACK = 256 << 10;

// threads that meet: the last to arrive opens the way for all; two generations of what they brought are kept
struct Group {
  int size = 0, arrived = 0, generation = 0;
  std::vector<uint32_t> slots[2];
};
struct Copy {
  void* to;
  const void* from;
  bool valid;
};
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // committed asynchronous copies, oldest first
  std::vector<Copy> open;
};
struct Block {
  int x = 0, y = 0, z = 0;
  int grid[3] = {1, 1, 1};
  std::vector<Thread> threads;
  std::vector<Group> warps;
  Group all;
  std::unique_ptr<unsigned char[]> shared;
};

inline Block block;
inline int current;
inline long progress;  // meetings held and threads ended
inline ucontext_t scheduler;
inline const std::function<void()>* body;

inline Thread& self() { return block.threads[current]; }
inline Group& warp() { return block.warps[current / WARP]; }
inline int lane() { return current % WARP; }

// waits for the group; returns what every member brought, SLOT words each
inline const uint32_t* meet(Group& group, int member, const uint32_t* words, int count) {
  const int generation = group.generation;
  auto& slots = group.slots[generation & 1];
  slots.resize(size_t(group.size) * SLOT);
  if (count) std::memcpy(&slots[size_t(member) * SLOT], words, 4 * size_t(count));
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.generation;
    ++progress;
  } else {
    while (group.generation == generation) swapcontext(&self().context, &scheduler);
  }
  return slots.data();
}

inline void run_thread() {
  (*body)();
  block.threads[current].done = true;
  ++progress;
  swapcontext(&block.threads[current].context, &scheduler);
}

inline void run_block(int num_threads, size_t shared_bytes) {
  block.shared.reset(new unsigned char[shared_bytes ? shared_bytes : 1]);
  std::memset(block.shared.get(), 0xff, shared_bytes);  // NaN in every format
  block.threads = std::vector<Thread>(num_threads);
  block.warps.assign((num_threads + WARP - 1) / WARP, Group{});
  for (size_t w = 0; w < block.warps.size(); ++w) block.warps[w].size = std::min<int>(WARP, num_threads - int(w) * WARP);
  block.all = Group{};
  block.all.size = num_threads;
  for (auto& thread : block.threads) {
    thread.stack.reset(new char[STACK]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, run_thread, 0);
  }
  for (int left = num_threads; left > 0;) {
    const long before = progress;
    for (current = 0; current < num_threads; ++current) {
      if (self().done) continue;
      swapcontext(&scheduler, &self().context);
      left -= self().done;
    }
    if (progress == before) {
      std::fprintf(stderr, "emulator: deadlock in block (%d, %d, %d)\n", block.x, block.y, block.z);
      std::abort();
    }
  }
}

inline void launch(const int (&grid)[3], int num_threads, size_t shared_bytes, const std::function<void()>& kernel) {
  body = &kernel;
  std::memcpy(block.grid, grid, sizeof(grid));
  for (int z = 0; z < grid[2]; ++z)
    for (int y = 0; y < grid[1]; ++y)
      for (int x = 0; x < grid[0]; ++x) {
        block.x = x, block.y = y, block.z = z;
        run_block(num_threads, shared_bytes);
      }
}

inline uint32_t float_word(float v) {
  uint32_t r;
  std::memcpy(&r, &v, 4);
  return r;
}
inline float word_float(uint32_t v) {
  float r;
  std::memcpy(&r, &v, 4);
  return r;
}
template <class T>
T exchange(T v, int from) {
  uint32_t words[2] = {0, 0};
  std::memcpy(words, &v, sizeof(T));
  const uint32_t* all = meet(warp(), lane(), words, 2);
  T r;
  std::memcpy(&r, all + from * SLOT, sizeof(T));
  return r;
}
inline uint16_t half_of(uint32_t word, int which) { return uint16_t(word >> (16 * which)); }

}  // namespace emulator

inline int thread_id() { return emulator::current; }
inline int num_threads() { return int(emulator::block.threads.size()); }
inline int block_x() { return emulator::block.x; }
inline int block_y() { return emulator::block.y; }
inline int block_z() { return emulator::block.z; }
inline int grid_x() { return emulator::block.grid[0]; }
inline int grid_y() { return emulator::block.grid[1]; }
inline int grid_z() { return emulator::block.grid[2]; }
inline void block_barrier() { emulator::meet(emulator::block.all, emulator::current, nullptr, 0); }
inline void warp_barrier() { emulator::meet(emulator::warp(), emulator::lane(), nullptr, 0); }
inline float shuffle_xor(float v, int mask) { return emulator::exchange(v, emulator::lane() ^ mask); }
inline double shuffle_xor(double v, int mask) { return emulator::exchange(v, emulator::lane() ^ mask); }
inline float shuffle(float v, int lane) { return emulator::exchange(v, lane); }
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.f / x; }
inline float rsqrt_accurate(float x) { return 1.f / sqrtf(x); }
inline uint32_t float_bits(float x) { return emulator::float_word(x); }
inline float bits_float(uint32_t x) { return emulator::word_float(x); }

struct Bf16 {
  static uint16_t narrow(float v) {
    const uint32_t u = emulator::float_word(v);
    if (std::isnan(v)) return 0x7fff;
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  static float widen(uint16_t v) { return emulator::word_float(uint32_t(v) << 16); }
  static uint32_t pack(float first, float second) { return narrow(first) | uint32_t(narrow(second)) << 16; }
  static float first(uint32_t v) { return widen(uint16_t(v)); }
  static float second(uint32_t v) { return widen(uint16_t(v >> 16)); }
};
struct F16 {
  static uint16_t narrow(float v) {
    const _Float16 h = static_cast<_Float16>(v);
    uint16_t r;
    std::memcpy(&r, &h, 2);
    return r;
  }
  static float widen(uint16_t v) {
    _Float16 h;
    std::memcpy(&h, &v, 2);
    return static_cast<float>(h);
  }
  static uint32_t pack(float first, float second) { return narrow(first) | uint32_t(narrow(second)) << 16; }
  static float first(uint32_t v) { return widen(uint16_t(v)); }
  static float second(uint32_t v) { return widen(uint16_t(v >> 16)); }
};

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using namespace emulator;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const uint32_t* all = meet(warp(), lane(), mine, 6);
  const int g = lane() / 4, q = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * q + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int pair = (k % 8) / 2, upper = k / 8;
      const uint32_t wa = all[((row % 8) * 4 + pair) * SLOT + row / 8 + 2 * upper];
      const uint32_t wb = all[(column * 4 + pair) * SLOT + 4 + upper];
      sum += T::widen(half_of(wa, k % 2)) * T::widen(half_of(wb, k % 2));
    }
    c[i] = sum;
  }
}

namespace emulator {
template <int N>
void load_matrices(uint32_t (&r)[N], const void* row, bool transposed) {
  uint32_t mine[2];
  std::memcpy(mine, &row, sizeof(row));
  const uint32_t* all = meet(warp(), lane(), mine, 2);
  const int g = lane() / 4, q = lane() % 4;
  const auto element = [&](int matrix, int line, int column) {
    const char* p;
    std::memcpy(&p, all + (matrix * 8 + line) * SLOT, sizeof(p));
    if (reinterpret_cast<uintptr_t>(p) % 16) {
      std::fprintf(stderr, "emulator: a matrix row in shared memory is not on a 16-byte boundary\n");
      std::abort();
    }
    uint16_t v;
    std::memcpy(&v, p + 2 * column, 2);
    return uint32_t(v);
  };
  for (int m = 0; m < N; ++m)
    r[m] = transposed ? element(m, 2 * q, g) | element(m, 2 * q + 1, g) << 16
                      : element(m, g, 2 * q) | element(m, g, 2 * q + 1) << 16;
  meet(warp(), lane(), nullptr, 0);  // nobody writes what another lane still reads
}
}  // namespace emulator
inline void load_matrices(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, false); }
inline void load_matrices(uint32_t (&r)[2], const void* row) { emulator::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, true); }
inline void load_matrices_transposed(uint32_t (&r)[2], const void* row) { emulator::load_matrices(r, row, true); }
inline uint32_t transpose_8x8(uint32_t v) {
  using namespace emulator;
  const uint32_t* all = meet(warp(), lane(), &v, 1);
  const int g = lane() / 4, q = lane() % 4;
  const auto element = [&](int row, int column) {
    return uint32_t(half_of(all[(row * 4 + column / 2) * SLOT], column % 2));
  };
  return element(2 * q, g) | element(2 * q + 1, g) << 16;
}

// nothing arrives before it is waited for: who reads too early reads NaN
inline void async_copy16(void* shared, const void* global, bool valid) {
  emulator::self().open.push_back({shared, global, valid});
}
inline void async_commit() {
  emulator::self().groups.push_back(std::move(emulator::self().open));
  emulator::self().open.clear();
}
template <int PENDING>
void async_wait() {
  auto& groups = emulator::self().groups;
  while (int(groups.size()) > PENDING) {
    for (const auto& copy : groups.front()) {
      if (copy.valid) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

template <class W>
W load_words(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(W)) {
    std::fprintf(stderr, "emulator: a load of %zu bytes is not on its boundary\n", sizeof(W));
    std::abort();
  }
  return *static_cast<const W*>(p);
}
template <class W>
void store_words(void* p, W v) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(W)) {
    std::fprintf(stderr, "emulator: a store of %zu bytes is not on its boundary\n", sizeof(W));
    std::abort();
  }
  *static_cast<W*>(p) = v;
}

inline unsigned char* shared_memory() { return emulator::block.shared.get(); }

}  // namespace d2v
