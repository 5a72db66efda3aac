// Frames in tiles: each lies in one segment, outside of which a convolution reads zeros.
#pragma once
#include "simt.cuh"

namespace d2v {

constexpr int TILE = 256;  // frames

struct Tile {
  int64_t first;       // its first row of [rows, C]
  int64_t begin, end;  // rows of the segment
  D2V_DEVICE int frames() const { return end - first < TILE ? int(end - first) : TILE; }
  D2V_DEVICE bool inside(int64_t row) const { return row >= begin && row < end; }
};

struct Tiles {
  const int64_t* table;  // [count, 3] first, begin, end (first == end: no frames); null: segments of `frames` rows each
  int frames;
  int count;
  D2V_DEVICE Tile at(int index) const {
    if (table) return {table[3 * index], table[3 * index + 1], table[3 * index + 2]};
    const int per_segment = (frames + TILE - 1) / TILE;
    const int64_t begin = int64_t(index / per_segment) * frames;
    return {begin + index % per_segment * TILE, begin, begin + frames};
  }
};

// A row of D channels in shared memory: 16 bytes more than it needs, so that 8 rows of a matrix lie in different banks.
template <int D>
constexpr int PITCH = 2 * D + 16;

// Starts copies of rows `start` ... of x (its first column wanted; `channels` apart) to shared memory, 0 for those that
// are not in [begin, end). A thread keeps to one 16-byte column.
template <int D>
D2V_DEVICE void copy_rows(unsigned char* to, const uint16_t* x, int64_t channels, int64_t start, int rows,
                          int64_t begin, int64_t end) {
  constexpr int COLUMNS = D / 8;
  const int r0 = thread_id() / COLUMNS, column = thread_id() % COLUMNS, step = num_threads() / COLUMNS;
  if (r0 >= step) return;
  const int low = begin > start ? int(begin - start) : 0;
  const int high = end - start < rows ? int(end - start) : rows;
  const uint16_t* from = x + (start + r0) * channels + column * 8;
  to += r0 * PITCH<D> + column * 16;
  for (int r = r0; r < rows; r += step, from += step * channels, to += step * PITCH<D>) {
    const bool inside = r >= low && r < high;
    async_copy16(to, inside ? from : x, inside);
  }
}

}  // namespace d2v
