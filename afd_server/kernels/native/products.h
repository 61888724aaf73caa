// Quantised rows, and products of rows with packed weights.
#pragma once

#include <vector>

#include "vectors.h"

namespace afd {

constexpr int kGroup = 64;    // columns of a row that share a scale
constexpr int kColumns = 16;  // output columns interleaved in a packed block of weights
// From so many rows on, more than a tile of 16 columns, 6 rows by 32 columns are faster.
constexpr int64_t kManyRows = 13;
constexpr int kPairTile = 6;
constexpr int kMaxTile = 12;  // rows multiplied together: 12 integer and 12 float accumulators
// Weights are read once, in order, faster than the hardware prefetcher follows: reading 8 KiB
// ahead made 8 and 16 rows 1.6 times as fast (576 x 3072, one Zen 5 core).
constexpr int kGroupsAhead = 8;

// Quantised rows: for each row the scales of its groups, then its values, in whole groups

inline int64_t num_groups(int64_t width) { return (width + kGroup - 1) / kGroup; }

inline int64_t row_bytes(int64_t width) { return num_groups(width) * (kGroup + sizeof(float)); }

// Multiplies a group by the Hadamard matrix of order 64, as `rotate` of kernels/quant.py does: a
// lane becomes its sum with a neighbour or the difference, stage by stage. Factors of ±1 are exact.
#if defined(__AVX512F__)
inline void rotate_group(v16 (&x)[4]) {
  const v16 one = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
  const v16 two = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
  const v16 four = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
  const v16 eight = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
  for (v16& a : x) {
    a = fma(a, one, __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    a = fma(a, two, __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    a = fma(a, four, __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    a = fma(a, eight, __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  }
  const v16 a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
  x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
}
#else  // GCC shuffles sixteen lanes one by one there
inline void rotate_group(v16 (&group)[4]) {
  v8 x[8];
  memcpy(x, group, sizeof x);
  for (v8& a : x) {
    a = a * v8{1, -1, 1, -1, 1, -1, 1, -1} + __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6);
    a = a * v8{1, 1, -1, -1, 1, 1, -1, -1} + __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5);
    a = a * v8{1, 1, 1, 1, -1, -1, -1, -1} + __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3);
  }
  for (int step = 1; step < 8; step *= 2)
    for (int i = 0; i < 8; i++)
      if ((i & step) == 0) {
        const v8 a = x[i], b = x[i + step];
        x[i] = a + b, x[i + step] = a - b;
      }
  memcpy(group, x, sizeof x);
}
#endif

// Quantises one row: each group is rotated; its scale is amax / 127 over 8, which makes the rotation
// orthonormal; its values are rounded to nearest, ties to even.
void quantise_row(const float* x, int64_t width, uint8_t* out) {
  const int64_t groups = num_groups(width);
  uint8_t* values = out + groups * sizeof(float);
  for (int64_t group = 0; group < groups; group++) {
    v16 part[4];
    for (int i = 0; i < 4; i++) {
      const int64_t at = group * kGroup + 16 * i;
      part[i] = load_some(x + at, width - at);
    }
    rotate_group(part);
    v16 highest = {};
    for (const v16& a : part) highest = larger(highest, a < 0.0f ? -a : a);
    const float peak = largest_lane(highest);
    const float inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
    const float scale = peak / 127.0f * 0.125f;
    memcpy(out + group * sizeof(float), &scale, sizeof scale);
    for (int i = 0; i < 4; i++) {
      const b16 rounded = round_to_bytes(part[i] * inverse);
      memcpy(values + group * kGroup + 16 * i, &rounded, sizeof rounded);
    }
  }
}

// A tile of quantised rows as the product reads it: for each 4 columns the rows' 4 values.
struct Panel {
  const int32_t* values;  // [padded / 4, rows]
  const float* scales;    // [groups, rows]
  const int32_t* shifts;  // [groups, rows], -128 · the sum of the group's values
};

struct Block {  // one block of 16 output columns, or the first of a pair
  int64_t groups;
  int64_t second;         // from its weights to those of the second of its pair, in groups
  int64_t next;           // the same to those of the next block or pair
  const uint8_t* weight;  // [groups · 16, 16, 4], each value + 128
  const float* scales;    // [groups, 16]
  float* y;               // first column of the block in the tile's first row
  int64_t stride;         // of y
  int columns;            // 16, or fewer in the last block
  int first_ahead;        // of the 32 lines that the next pair has in each group, which
  int lines_ahead;        // to read ahead, at most 16
};

// What becomes of a row's sums in a pair of blocks: 32 columns,
struct Both {
  void put(const Block& b, int row, v16 first, v16 second) const {
    float* y = b.y + row * b.stride;
    store(y, first);
    store(y + kColumns, second);
  }
};

// or, of a gate and what it is for, 16.
struct Gated {
  float limit;

  void put(const Block& b, int row, v16 gate, v16 up) const {
    store(b.y + row * b.stride, silu_mul(gate, up, limit));
  }
};

#ifdef __AVX512VNNI__
// Two blocks at once: each value of a row is then loaded once for 32 columns. Meanwhile the next two
// come from memory, a share with each tile.
template <int kRows, typename Sums>
void multiply_pair(const Panel& x, const Block& b, const Sums& sums) {
  const int64_t block_bytes = b.second * kGroup * kColumns, block_scales = b.second * kColumns;
  const auto ahead = reinterpret_cast<const char*>(b.weight) + b.next * kGroup * kColumns;
  __m512 total[2][kRows];
#pragma GCC unroll 2
  for (int c = 0; c < 2; c++)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) total[c][r] = _mm512_setzero_ps();
  for (int64_t group = 0; group < b.groups; group++) {
    __m512i exact[2][kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
      exact[0][r] = exact[1][r] = _mm512_set1_epi32(x.shifts[group * kRows + r]);
    const uint8_t* weight = b.weight + group * kGroup * kColumns;
    const int32_t* values = x.values + group * 16 * kRows;
    for (int k = 0; k < 16; k++) {
      const __m512i first = _mm512_loadu_si512(weight + k * 64);
      const __m512i second = _mm512_loadu_si512(weight + block_bytes + k * 64);
      if (k < b.lines_ahead) {
        const int line = b.first_ahead + k;
        _mm_prefetch(ahead + (line / 16) * block_bytes + (group * 16 + line % 16) * 64, _MM_HINT_T0);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) {
        const __m512i value = _mm512_set1_epi32(values[k * kRows + r]);
        add_products(exact[0][r], first, value);
        add_products(exact[1][r], second, value);
      }
    }
#pragma GCC unroll 2
    for (int c = 0; c < 2; c++) {
      const __m512 scales = _mm512_loadu_ps(b.scales + c * block_scales + group * kColumns);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) {
        const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[group * kRows + r]));
        total[c][r] =
            _mm512_add_ps(total[c][r], _mm512_mul_ps(_mm512_cvtepi32_ps(exact[c][r]), scale));
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) sums.put(b, r, (v16)total[0][r], (v16)total[1][r]);
}

template <int kRows>
void multiply_tile(const Panel& x, const Block& b) {
  __m512 total[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) total[r] = _mm512_setzero_ps();
  for (int64_t group = 0; group < b.groups; group++) {
    __m512i exact[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) exact[r] = _mm512_set1_epi32(x.shifts[group * kRows + r]);
    const uint8_t* weight = b.weight + group * kGroup * kColumns;
    const int32_t* values = x.values + group * 16 * kRows;
    const int64_t later = group + kGroupsAhead, next = later < b.groups ? later : later - b.groups + b.next;
    const auto ahead = reinterpret_cast<const char*>(b.weight) + next * kGroup * kColumns;
    for (int k = 0; k < 16; k++) {
      const __m512i w = _mm512_loadu_si512(weight + k * 64);
      _mm_prefetch(ahead + k * 64, _MM_HINT_T0);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++)
        add_products(exact[r], w, _mm512_set1_epi32(values[k * kRows + r]));
    }
    const __m512 scales = _mm512_loadu_ps(b.scales + group * kColumns);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[group * kRows + r]));
      total[r] = _mm512_add_ps(total[r], _mm512_mul_ps(_mm512_cvtepi32_ps(exact[r]), scale));
    }
  }
  const __mmask16 mask = static_cast<__mmask16>((1u << b.columns) - 1);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) _mm512_mask_storeu_ps(b.y + r * b.stride, mask, total[r]);
}
#else
template <int kRows>
void multiply_tile(const Panel& x, const Block& b);

template <int kRows, typename Sums>
void multiply_pair(const Panel& x, const Block& b, const Sums& sums) {
  float parts[2][kRows * kColumns];
  for (int c = 0; c < 2; c++) {
    Block part = b;
    part.weight += c * b.second * kGroup * kColumns;
    part.scales += c * b.second * kColumns;
    part.y = parts[c];
    part.stride = part.columns = kColumns;
    multiply_tile<kRows>(x, part);
  }
  for (int r = 0; r < kRows; r++)
    sums.put(b, r, load(parts[0] + r * kColumns), load(parts[1] + r * kColumns));
}

// Integer products of one group in 32 bits; the compiler's vectors do the rest.
template <int kRows>
void multiply_tile(const Panel& x, const Block& b) {
  for (int r = 0; r < kRows; r++) {
    float total[kColumns] = {};
    for (int64_t group = 0; group < b.groups; group++) {
      int32_t exact[kColumns];
      for (int c = 0; c < kColumns; c++) exact[c] = x.shifts[group * kRows + r];
      const uint8_t* weight = b.weight + group * kGroup * kColumns;
      for (int k = 0; k < 16; k++) {
        int8_t four[4];
        memcpy(four, x.values + (group * 16 + k) * kRows + r, sizeof four);
        for (int c = 0; c < kColumns; c++)
          for (int j = 0; j < 4; j++)
            exact[c] += static_cast<int32_t>(weight[k * 64 + c * 4 + j]) * four[j];
      }
      const float* scales = b.scales + group * kColumns;
      for (int c = 0; c < kColumns; c++)
        total[c] += static_cast<float>(exact[c]) * (scales[c] * x.scales[group * kRows + r]);
    }
    for (int c = 0; c < b.columns; c++) b.y[r * b.stride + c] = total[c];
  }
}
#endif

template <int kRows>
void multiply_any(int64_t rows, const Panel& x, const Block& b) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return multiply_tile<kRows>(x, b);
    multiply_any<kRows - 1>(rows, x, b);
  }
}

template <int kRows, typename Sums>
void multiply_pair_any(int64_t rows, const Panel& x, const Block& b, const Sums& sums) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return multiply_pair<kRows>(x, b, sums);
    multiply_pair_any<kRows - 1>(rows, x, b, sums);
  }
}

// Rows cut into tiles of at most `most`, as even as can be: 16 rows are 8 and 8, not 12 and 4.
struct Tiles {
  int64_t rows, count;
  Tiles(int64_t rows, int64_t most) : rows(rows), count((rows + most - 1) / most) {}
  int64_t start(int64_t tile) const {  // of numbers that fit into 32 bits
    return static_cast<uint32_t>(rows * tile) / static_cast<uint32_t>(count);
  }
};

// All tiles of some quantised rows, for any number of products with them.
struct Panels {
  Tiles tiles{0, 1};
  int64_t groups = 0;
  std::vector<int32_t> values, shifts;
  std::vector<float> scales;

  bool in_pairs() const { return tiles.rows >= kManyRows; }

  Panel tile(int64_t first_row) const {
    const int64_t first = first_row * groups;
    return {values.data() + first * 16, scales.data() + first, shifts.data() + first};
  }
};

void lay_out(const uint8_t* x, int64_t rows, int64_t groups, Panels& out) {
  const Tiles tiles(rows, rows >= kManyRows ? kPairTile : kMaxTile);
  out.tiles = tiles;
  out.groups = groups;
  const int64_t bytes = groups * (kGroup + sizeof(float));
  out.values.resize(tiles.rows * groups * 16);
  out.shifts.resize(tiles.rows * groups);
  out.scales.resize(tiles.rows * groups);
  for (int64_t tile = 0; tile < tiles.count; tile++) {
    const int64_t first = tiles.start(tile), rows = tiles.start(tile + 1) - first;
    for (int64_t r = 0; r < rows; r++) {
      const uint8_t* row = x + (first + r) * bytes;
      int32_t* values = out.values.data() + first * groups * 16 + r;
      for (int64_t group = 0; group < groups; group++) {
        const int64_t at = first * groups + group * rows + r;
        memcpy(out.scales.data() + at, row + group * sizeof(float), sizeof(float));
        const uint8_t* from = row + groups * sizeof(float) + group * kGroup;
        int32_t sum = 0;
        for (int i = 0; i < kGroup; i++) sum += static_cast<int8_t>(from[i]);
        out.shifts[at] = -128 * sum;
        for (int k = 0; k < 16; k++) memcpy(values + (group * 16 + k) * rows, from + 4 * k, 4);
      }
    }
  }
}

// A packed weight, or some of its output columns, from a multiple of 16 on, and of its groups.
struct Weight {
  const uint8_t* blocks;
  const float* scales;
  int64_t block_groups;  // of the whole weight

  Weight from(int64_t column, int64_t group) const {
    const int64_t place = column / kColumns * block_groups + group;
    return {blocks + place * kGroup * kColumns, scales + place * kColumns, block_groups};
  }
};

// A pair of blocks by all rows; each tile reads its share of the next pair ahead.
template <typename Sums>
void multiply_pairs(const Panels& x, Block block, const Sums& sums) {
  float* const y = block.y;
  const auto count = static_cast<int>(x.tiles.count);
  int64_t first = 0;
  for (int tile = 1; tile <= count; tile++) {
    const int64_t next = x.tiles.start(tile);
    const int next_ahead = tile * 2 * kColumns / count;
    block.y = y + first * block.stride;
    block.lines_ahead = next_ahead - block.first_ahead;
    multiply_pair_any<kPairTile>(next - first, x.tile(first), block, sums);
    first = next;
    block.first_ahead = next_ahead;
  }
}

// y[rows, columns] = x · weightᵀ, with `stride` elements between rows of y. Exact sums in a group,
// groups in order.
void multiply(const Panels& x, const Weight& weight, int64_t columns, float* y, int64_t stride) {
  for (int64_t column = 0; column < columns;) {
    const int64_t left = columns - column;
    const Weight at = weight.from(column, 0);
    Block block{};
    block.groups = x.groups;
    block.weight = at.blocks;
    block.scales = at.scales;
    block.y = y + column;
    block.stride = stride;
    if (x.in_pairs() && left >= 2 * kColumns) {
      block.second = at.block_groups;
      block.next = 2 * at.block_groups;
      multiply_pairs(x, block, Both{});
      column += 2 * kColumns;
      continue;
    }
    block.next = at.block_groups;
    block.columns = static_cast<int>(left < kColumns ? left : kColumns);
    for (int64_t tile = 1, first = 0; tile <= x.tiles.count; tile++) {
      const int64_t next = x.tiles.start(tile);
      block.y = y + first * stride + column;
      multiply_any<kMaxTile>(next - first, x.tile(first), block);
      first = next;
    }
    column += kColumns;
  }
}

// y[rows, columns] = silu(x · gateᵀ) · (x · upᵀ), both parts of one weight, in whole blocks, for rows that
// go by pairs: the bits of `multiply` and `silu_mul_row`, without the way through memory.
void multiply_gated(const Panels& x, const Weight& gate, const Weight& up, int64_t columns,
                    float limit, float* y) {
  Block block{};
  block.groups = x.groups;
  block.second = (up.blocks - gate.blocks) / (kGroup * kColumns);
  block.next = gate.block_groups;
  block.stride = columns;
  for (int64_t column = 0; column < columns; column += kColumns) {
    const Weight at = gate.from(column, 0);
    block.weight = at.blocks;
    block.scales = at.scales;
    block.y = y + column;
    multiply_pairs(x, block, Gated{limit});
  }
}

// Products in float32: y = x · weightᵀ, each output summed over the columns in order.
template <typename Weight, int kRows>
void multiply_float_tile(const float* x, int64_t width, const Weight* weight, float* y,
                         int64_t stride, int columns) {
  v16 total[kRows] = {};
  for (int64_t k = 0; k < width; k++) {
    const v16 w = load(weight + k * kColumns);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) total[r] = fma(splat(x[r * width + k]), w, total[r]);
  }
  for (int r = 0; r < kRows; r++) store_some(y + r * stride, total[r], columns);
}

template <typename Weight, int kRows>
void multiply_float_any(int64_t rows, const float* x, int64_t width, const Weight* weight, float* y,
                        int64_t stride, int columns) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      return multiply_float_tile<Weight, kRows>(x, width, weight, y, stride, columns);
    multiply_float_any<Weight, kRows - 1>(rows, x, width, weight, y, stride, columns);
  }
}

template <typename Weight>
void multiply_float(const float* x, int64_t rows, int64_t width, const Weight* weight,
                    int64_t columns, float* y) {
  const Tiles tiles(rows, kMaxTile);
  for (int64_t column = 0; column < columns; column += kColumns) {
    const int64_t left = columns - column;
    for (int64_t tile = 0; tile < tiles.count; tile++) {
      const int64_t first = tiles.start(tile);
      multiply_float_any<Weight, kMaxTile>(tiles.start(tile + 1) - first, x + first * width, width,
                                           weight + column * width, y + first * columns + column,
                                           columns, static_cast<int>(left < 16 ? left : 16));
    }
  }
}

}  // namespace afd
