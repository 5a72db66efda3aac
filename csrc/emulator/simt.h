// Runs a kernel on the CPU: every thread of a block is a fiber; barriers, shuffles and warp-wide matrix instructions
// wait for their group as the hardware does. Same names as kernels/simt.cuh.
#pragma once
#include <cmath>

#include "block.h"

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
  if (from < 0 || from >= WARP) fail("shuffles with lane " + std::to_string(from));
  uint32_t words[2] = {0, 0};
  std::memcpy(words, &v, sizeof(T));
  const Group::Meeting& meeting = meet(warp(), lane(), "a shuffle", words, 2);
  const Unobserved quiet;
  T r;
  std::memcpy(&r, &meeting.words[size_t(from) * SLOT], sizeof(T));
  return r;
}
inline uint16_t half_of(uint32_t word, int which) { return uint16_t(word >> (16 * which)); }

}  // namespace emulator

D2V_UNOBSERVED int thread_id() { return emulator::state.current; }
D2V_UNOBSERVED int num_threads() { return emulator::state.block.num_threads; }
D2V_UNOBSERVED int block_x() { return emulator::state.block.index[0]; }
D2V_UNOBSERVED int block_y() { return emulator::state.block.index[1]; }
D2V_UNOBSERVED int block_z() { return emulator::state.block.index[2]; }
D2V_UNOBSERVED int grid_x() { return emulator::state.block.grid[0]; }
D2V_UNOBSERVED int grid_y() { return emulator::state.block.grid[1]; }
D2V_UNOBSERVED int grid_z() { return emulator::state.block.grid[2]; }
inline void block_barrier() { emulator::meet(emulator::state.block.all, emulator::thread(), "a block barrier"); }
inline void warp_barrier() { emulator::meet(emulator::warp(), emulator::lane(), "a warp barrier"); }
inline float shuffle_xor(float v, int mask) { return emulator::exchange(v, emulator::lane() ^ mask); }
inline double shuffle_xor(double v, int mask) { return emulator::exchange(v, emulator::lane() ^ mask); }
inline float shuffle(float v, int lane) { return emulator::exchange(v, lane); }
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.f / x; }
inline float saturate(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
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

namespace emulator {
// fragments of all lanes -> a [16, 16] and b [8, 16] (its transpose), as in the PTX manual
template <class T>
void decode_fragments(Group::Meeting& meeting) {
  const auto half = [&](int lane, int reg, int which) {
    return T::widen(half_of(meeting.words[size_t(lane * SLOT + reg)], which));
  };
  meeting.a.resize(16 * 16);
  meeting.b.resize(8 * 16);
  for (int k = 0; k < 16; ++k) {
    const int pair = (k % 8) / 2, upper = k / 8;
    for (int row = 0; row < 16; ++row) {
      meeting.a[size_t(row * 16 + k)] = half(row % 8 * 4 + pair, row / 8 + 2 * upper, k % 2);
    }
    for (int column = 0; column < 8; ++column) {
      meeting.b[size_t(column * 16 + k)] = half(column * 4 + pair, 4 + upper, k % 2);
    }
  }
}
}  // namespace emulator

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using namespace emulator;
  const Unobserved quiet;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto& all = meet(warp(), lane(), "a matrix product", mine, 6, decode_fragments<T>);
  const int g = lane() / 4, q = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const float* row = &all.a[size_t(g + 8 * (i / 2)) * 16];
    const float* column = &all.b[size_t(2 * q + i % 2) * 16];
    for (int k = 0; k < 16; ++k) c[i] += row[k] * column[k];
  }
}

template <class W>
W load_words(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(W)) emulator::fail("a load of 8 or 16 bytes is not on its boundary");
  W v;
  std::memcpy(&v, p, sizeof(W));
  return v;
}
template <class W>
void store_words(void* p, W v) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(W)) emulator::fail("a store of 8 or 16 bytes is not on its boundary");
  std::memcpy(p, &v, sizeof(W));
}

namespace emulator {
// `bytes` bytes at `p` lie in shared memory, on their boundary
inline void check_shared(const void* p, size_t bytes, const char* what) {
  const Unobserved quiet;
  const uintptr_t first = reinterpret_cast<uintptr_t>(p), begin = reinterpret_cast<uintptr_t>(state.block.shared);
  if (first < begin || first + bytes > begin + state.block.shared_bytes) {
    fail(std::string(what) + " at byte " + std::to_string(int64_t(first - begin)) + " of " +
         std::to_string(state.block.shared_bytes) + " bytes of shared memory");
  }
  if ((first - begin) % bytes) fail(std::string(what) + " in shared memory is not on its boundary");
}

template <int N>
void load_matrices(uint32_t (&r)[N], const void* row, bool transposed) {
  if (lane() < 8 * N) check_shared(row, 16, "a matrix row");
  uint32_t mine[2];
  std::memcpy(mine, &row, sizeof(row));
  const Group::Meeting& all = meet(warp(), lane(), "a matrix load", mine, 2);
  const int g = lane() / 4, q = lane() % 4;
  const auto element = [&](int matrix, int line, int column) {
    const char* p;
    {
      const Unobserved quiet;
      std::memcpy(&p, &all.words[size_t(matrix * 8 + line) * SLOT], sizeof(p));
    }
    uint16_t v;
    std::memcpy(&v, p + 2 * column, 2);
    return uint32_t(v);
  };
  for (int m = 0; m < N; ++m) {
    r[m] = transposed ? element(m, 2 * q, g) | element(m, 2 * q + 1, g) << 16
                      : element(m, g, 2 * q) | element(m, g, 2 * q + 1) << 16;
  }
  meet(warp(), lane(), "the end of a matrix load");  // nobody writes what another lane still reads
}
}  // namespace emulator
inline void load_matrices(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, false); }
inline void load_matrices(uint32_t (&r)[2], const void* row) { emulator::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, true); }
inline void load_matrices_transposed(uint32_t (&r)[2], const void* row) { emulator::load_matrices(r, row, true); }
inline uint32_t transpose_8x8(uint32_t v) {
  using namespace emulator;
  const Unobserved quiet;
  const Group::Meeting& all = meet(warp(), lane(), "a transposition", &v, 1);
  const int g = lane() / 4, q = lane() % 4;
  const auto element = [&](int row, int column) {
    return uint32_t(half_of(all.words[size_t(row * 4 + column / 2) * SLOT], column % 2));
  };
  return element(2 * q, g) | element(2 * q + 1, g) << 16;
}

// From its issue to its wait the target is NaN: who still reads what was there, or reads too early, reads NaN.
inline void async_copy16(void* shared, const void* global, bool valid) {
  using namespace emulator;
  check_shared(shared, 16, "an asynchronous copy");
  if (valid) load_words<Words4>(global);  // the source must be readable now
  std::memset(shared, 0xff, 16);
  const Unobserved quiet;
  self().open.push_back({shared, global, valid});
}
inline void async_commit() {
  using namespace emulator;
  const Unobserved quiet;
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}
template <int PENDING>
void async_wait() {
  using namespace emulator;
  for (;;) {
    std::vector<Copy> copies;
    {
      const Unobserved quiet;
      auto& groups = self().groups;
      if (int(groups.size()) <= PENDING) return;
      copies = std::move(groups.front());
      groups.pop_front();
    }
    for (const Copy& copy : copies) {
      if (copy.valid) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
    }
  }
}

D2V_UNOBSERVED unsigned char* shared_memory() { return emulator::state.block.shared; }

}  // namespace d2v
