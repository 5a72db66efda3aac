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
  const int64_t* table;  // [count, 3] first, begin, end (all equal: no frames); null: segments of `frames` rows each
  int64_t frames;
  int64_t count;
  D2V_DEVICE Tile at(int64_t index) const {
    if (table) return {table[3 * index], table[3 * index + 1], table[3 * index + 2]};
    const int64_t per_segment = (frames + TILE - 1) / TILE;
    const int64_t begin = index / per_segment * frames;
    return {begin + index % per_segment * TILE, begin, begin + frames};
  }
};

// A row of D channels in shared memory: 16 bytes more than it needs, so that 8 rows of a matrix lie in different banks.
template <int D>
constexpr int PITCH = 2 * D + 16;

}  // namespace d2v
