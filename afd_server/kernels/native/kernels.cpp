// The measured CPU path. `kernels/reference.py` and `kernels/quant.py` say what it must compute.
//
// One source, compiled once for each instruction set (see hatch_build.py). Every reduction has a
// fixed order and multiplies and adds are fused only where `fma` says so (-ffp-contract=off), so
// all builds of this file give the same bits, and a row's bits depend on that row alone.
//
// Plain C functions on raw pointers, called through ctypes: no Python and no torch headers.
// Buffers are owned by the caller, row-major and contiguous. Nothing here starts a thread.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace {

constexpr int kGroup = 64;    // columns of a row that share a scale
constexpr int kColumns = 16;  // output columns interleaved in a packed block of weights
constexpr int kMaxTile = 12;  // rows multiplied together: 12 integer and 12 float accumulators
// Weights are read once, in order, faster than the hardware prefetcher follows: reading 8 KiB
// ahead made 8 and 16 rows 1.6 times as fast (576 x 3072, one Zen 5 core).
constexpr int kPrefetchBytes = 8192;

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2)));
typedef int8_t b16 __attribute__((vector_size(16), aligned(1)));

inline v16 load(const float* from) {
  v16 value;
  memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, v16 value) { memcpy(to, &value, sizeof value); }

inline v16 splat(float value) { return v16{} + value; }

// a · b + c, rounded once.
inline v16 fma(v16 a, v16 b, v16 c) {
#if defined(__AVX512F__)
  return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  __m256 x[2], y[2], z[2];
  memcpy(x, &a, sizeof a);
  memcpy(y, &b, sizeof b);
  memcpy(z, &c, sizeof c);
  for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  memcpy(&c, z, sizeof c);
  return c;
#else
  for (int i = 0; i < 16; i++) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

inline v16 larger(v16 a, v16 b) { return a > b ? a : b; }

// Combines sixteen lanes as a tree: 16 to 8 to 4 to 2 to 1.
inline float sum_lanes(v16 x) {
  v8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
         __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

inline float largest_lane(v16 x) {
  v8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
  v8 b = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  a = a > b ? a : b;
  v4 c = __builtin_shufflevector(a, a, 0, 1, 2, 3), d = __builtin_shufflevector(a, a, 4, 5, 6, 7);
  c = c > d ? c : d;
  const float even = c[0] > c[2] ? c[0] : c[2], odd = c[1] > c[3] ? c[1] : c[3];
  return even > odd ? even : odd;
}

// Sums the lanes of each of sixteen vectors: lane j of the result is the sum of x[j]. A tree of
// neighbours, which costs three operations a vector where `sum_lanes` costs ten.
inline v16 sum_each(v16* x) {
  for (int i = 0; i < 8; i++) {
    const v16 a = x[2 * i], b = x[2 * i + 1];
    x[i] = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 4; i++) {
    const v16 a = x[2 * i], b = x[2 * i + 1];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 2; i++) {
    const v16 a = x[2 * i], b = x[2 * i + 1];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  return __builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(x[0], x[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

// e^x for x <= 0, to about 1 unit in the last place; 0 below -87.
inline v16 exp_nonpositive(v16 x) {
  const i16 alive = x > -87.0f;
  x = alive ? x : splat(0.0f);
  const v16 scaled = x * 1.44269504f - 0.5f;
  const i16 n = __builtin_convertvector(scaled, i16);  // truncates: rounds x·log2(e), as x <= 0
  const v16 whole = __builtin_convertvector(n, v16);
  const v16 r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  v16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const v16 power = (v16)((n + 127) << 23);
  return alive ? p * power : splat(0.0f);
}

// Loads up to sixteen floats, zeros behind them.
inline v16 load_some(const float* from, int64_t count) {
  if (count >= 16) return load(from);
  v16 value = {};
  if (count > 0) memcpy(&value, from, count * sizeof(float));
  return value;
}

inline void store_some(float* to, v16 value, int64_t count) {
  memcpy(to, &value, (count < 16 ? count : 16) * sizeof(float));
}

// What keys, values and weights are stored as.
struct bf16 {
  uint16_t bits;
};

inline v16 load(const bf16* from) {
  h16 value;
  memcpy(&value, from, sizeof value);
  return (v16)(__builtin_convertvector(value, u16) << 16);
}

// Rounds to nearest, ties to even; a NaN stays one.
inline void store_rounded(bf16* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i].bits = static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded);
  }
}

inline void store_rounded(float* to, const float* from, int64_t count) {
  memcpy(to, from, count * sizeof(float));
}

// ---- quantised rows: for each row the scales of its groups, then its values, in whole groups

inline int64_t num_groups(int64_t width) { return (width + kGroup - 1) / kGroup; }

inline int64_t row_bytes(int64_t width) { return num_groups(width) * (kGroup + sizeof(float)); }

// Quantises one row: a group's scale is amax / 127, its values are rounded to nearest, ties to even.
void quantise_row(const float* x, int64_t width, uint8_t* out) {
  const int64_t groups = num_groups(width);
  uint8_t* values = out + groups * sizeof(float);
  for (int64_t group = 0; group < groups; group++) {
    v16 part[4];
    v16 highest = {};
    for (int i = 0; i < 4; i++) {
      const int64_t at = group * kGroup + 16 * i;
      part[i] = load_some(x + at, width - at);
      highest = larger(highest, part[i] < 0.0f ? -part[i] : part[i]);
    }
    const float peak = largest_lane(highest);
    const float inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
    const float scale = peak / 127.0f;
    memcpy(out + group * sizeof(float), &scale, sizeof scale);
    for (int i = 0; i < 4; i++) {
      // adding 1.5 * 2^23 rounds to nearest, ties to even, for values this small
      const v16 shifted = part[i] * inverse + 12582912.0f;
      const b16 rounded = __builtin_convertvector((i16)shifted, b16);  // the lowest byte
      memcpy(values + group * kGroup + 16 * i, &rounded, sizeof rounded);
    }
  }
}

// ---- products

// A tile of quantised rows as the product reads it: for each 4 columns the rows' 4 values.
struct Panel {
  const int32_t* values;  // [padded / 4, rows]
  const float* scales;    // [groups, rows]
  const int32_t* shifts;  // [groups, rows], -128 · the sum of the group's values
};

struct Block {  // one block of 16 output columns
  int64_t groups;
  const uint8_t* weight;  // [groups · 16, 16, 4], each value + 128
  const float* scales;    // [groups, 16]
  float* y;               // first column of the block in the tile's first row
  int64_t stride;         // of y
  int columns;            // 16, or fewer in the last block
};

#ifdef __AVX512VNNI__
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
    for (int k = 0; k < 16; k++) {
      const __m512i w = _mm512_loadu_si512(weight + k * 64);
      _mm_prefetch(reinterpret_cast<const char*>(weight) + k * 64 + kPrefetchBytes, _MM_HINT_T0);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++)
        exact[r] = _mm512_dpbusd_epi32(exact[r], w, _mm512_set1_epi32(values[k * kRows + r]));
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

// Rows cut into tiles of at most kMaxTile, as even as can be: 16 rows are 8 and 8, not 12 and 4.
struct Tiles {
  int64_t rows, count;
  explicit Tiles(int64_t rows) : rows(rows), count((rows + kMaxTile - 1) / kMaxTile) {}
  int64_t start(int64_t tile) const { return rows * tile / count; }
};

struct Panels {  // all tiles of one call
  std::vector<int32_t> values, shifts;
  std::vector<float> scales;
};

void lay_out(const uint8_t* x, const Tiles& tiles, int64_t groups, Panels& out) {
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
  const Tiles tiles(rows);
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

// ---- attention

constexpr int kKeyTile = 16;

// Query heads that share a key/value head and read its keys together. Their sums, head_dim / 16
// registers each, should stay in registers.
constexpr int most_queries(int vectors) { return vectors >= 16 ? 1 : 24 / vectors < 6 ? 24 / vectors : 6; }

struct Query {
  const float* from;   // [head_dim]
  float* to;           // [head_dim]
  int64_t first, stop; // sees positions first … stop − 1
};

template <typename KV>
struct KVHead {  // one key/value head of one sequence
  const KV* keys;      // [blocks, block_size, kv_heads, head_dim], at this head
  const KV* values;
  const int64_t* blocks;
  int block_bits;  // log2 of the block size
  int64_t token_stride;

  // Where a position's key is; its value is as far from `values`.
  int64_t at(int64_t position) const {
    const int64_t block = blocks[position >> block_bits];
    return ((block << block_bits) + (position & ((int64_t{1} << block_bits) - 1))) * token_stride;
  }

  // Heads of a token lie apart from those of the next one: too short for the hardware to follow.
  void prefetch(int64_t at, int head_dim) const {
    for (int i = 0; i < head_dim; i += 64 / static_cast<int>(sizeof(KV))) {
      __builtin_prefetch(keys + at + i);
      __builtin_prefetch(values + at + i);
    }
  }
};

// Attends with an online softmax over tiles of 16 keys, in order. Tiles start at multiples of 16
// and hidden keys weigh exactly nothing, so a query's bits do not depend on the others.
template <typename KV, int kVectors, int kQueries>
void attend(const KVHead<KV>& kv, const Query* queries, float scale) {
  constexpr int kHeadDim = 16 * kVectors;
  alignas(64) float query[kQueries][kHeadDim];
  v16 weighted[kQueries][kVectors] = {};
  float highest[kQueries], total[kQueries] = {};
  int64_t first = queries[0].first, stop = queries[0].stop;
  for (int q = 0; q < kQueries; q++) {
    for (int i = 0; i < kHeadDim; i++) query[q][i] = queries[q].from[i] * scale;
    highest[q] = -FLT_MAX;
    first = queries[q].first < first ? queries[q].first : first;
    stop = queries[q].stop > stop ? queries[q].stop : stop;
  }
  const v16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t begin = first / kKeyTile * kKeyTile; begin < stop; begin += kKeyTile) {
    int64_t at[kKeyTile];
    for (int j = 0; j < kKeyTile; j++) {
      // outside of what is seen, any seen key will do: it is hidden below
      const int64_t position = begin + j < stop ? begin + j : stop - 1;
      at[j] = kv.at(position < first ? first : position);
      const int64_t next = begin + kKeyTile + j < stop ? begin + kKeyTile + j : stop - 1;
      kv.prefetch(kv.at(next), kHeadDim);
    }
    v16 product[kQueries][kKeyTile];
    for (int j = 0; j < kKeyTile; j++) {
      v16 sum[kQueries];
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i++) {
        const v16 key = load(kv.keys + at[j] + 16 * i);
#pragma GCC unroll 6
        for (int q = 0; q < kQueries; q++) {
          const v16 part = load(query[q] + 16 * i);
          sum[q] = i == 0 ? part * key : fma(part, key, sum[q]);
        }
      }
#pragma GCC unroll 6
      for (int q = 0; q < kQueries; q++) product[q][j] = sum[q];
    }
    alignas(64) float weights[kQueries][kKeyTile];
#pragma GCC unroll 6
    for (int q = 0; q < kQueries; q++) {
      const v16 position = lanes + static_cast<float>(begin - queries[q].first);
      const float seen = static_cast<float>(queries[q].stop - queries[q].first);
      v16 scores = sum_each(product[q]);
      scores = position < seen ? scores : splat(-INFINITY);
      scores = position < 0.0f ? splat(-INFINITY) : scores;
      const float tile_highest = largest_lane(scores);
      const float peak = tile_highest > highest[q] ? tile_highest : highest[q];
      const v16 weight = exp_nonpositive(scores - peak);
      const float shrink = exp_nonpositive(splat(highest[q] - peak))[0];
      total[q] = total[q] * shrink + sum_lanes(weight);
      highest[q] = peak;
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i++) weighted[q][i] *= shrink;
      store(weights[q], weight);
    }
    for (int j = 0; j < kKeyTile; j++) {
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i++) {
        const v16 value = load(kv.values + at[j] + 16 * i);
#pragma GCC unroll 6
        for (int q = 0; q < kQueries; q++)
          weighted[q][i] = fma(splat(weights[q][j]), value, weighted[q][i]);
      }
    }
  }
  for (int q = 0; q < kQueries; q++)
    for (int i = 0; i < kVectors; i++)  // adding 0 makes a zero's sign the same in any company
      store(queries[q].to + 16 * i, weighted[q][i] / total[q] + 0.0f);
}

// Attends for up to `count` queries and returns for how many.
template <typename KV, int kVectors, int kQueries = most_queries(kVectors)>
int64_t attend_some(int64_t count, const KVHead<KV>& kv, const Query* queries, float scale) {
  if constexpr (kQueries > 1) {
    if (count < kQueries) return attend_some<KV, kVectors, kQueries - 1>(count, kv, queries, scale);
  }
  attend<KV, kVectors, kQueries>(kv, queries, scale);
  return kQueries;
}

// The same for a head size known at run time; 0 if it is none of those built in.
template <typename KV>
int64_t attend_any(int64_t head_dim, int64_t count, const KVHead<KV>& kv, const Query* queries,
                   float scale) {
  switch (head_dim) {
    case 16: return attend_some<KV, 1>(count, kv, queries, scale);
    case 32: return attend_some<KV, 2>(count, kv, queries, scale);
    case 48: return attend_some<KV, 3>(count, kv, queries, scale);
    case 64: return attend_some<KV, 4>(count, kv, queries, scale);
    case 80: return attend_some<KV, 5>(count, kv, queries, scale);
    case 96: return attend_some<KV, 6>(count, kv, queries, scale);
    case 128: return attend_some<KV, 8>(count, kv, queries, scale);
    case 192: return attend_some<KV, 12>(count, kv, queries, scale);
    case 256: return attend_some<KV, 16>(count, kv, queries, scale);
    default: return 0;
  }
}

struct Sequences {  // whose rows stand together in a micro-batch
  int64_t count;
  const int64_t* row_starts;    // [count + 1]
  const int64_t* num_keys;      // [rows]
  const int64_t* block_tables;  // [count, table_width]
  int64_t table_width;
  int64_t window;  // a row sees at most so many positions; 0: all
};

template <typename KV>
int32_t attend_all(const float* query, int64_t heads, int64_t head_dim, const KV* keys,
                   const KV* values, int64_t block_size, int64_t kv_heads, const Sequences& s,
                   float* out) {
  const int64_t group = heads / kv_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  const int block_bits = __builtin_ctzll(block_size);
  std::vector<Query> queries;
  for (int64_t sequence = 0; sequence < s.count; sequence++) {
    for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
      const KVHead<KV> kv{keys + kv_head * head_dim, values + kv_head * head_dim,
                          s.block_tables + sequence * s.table_width, block_bits,
                          kv_heads * head_dim};
      queries.clear();
      for (int64_t row = s.row_starts[sequence]; row < s.row_starts[sequence + 1]; row++) {
        const int64_t stop = s.num_keys[row];
        const int64_t first = s.window > 0 && stop > s.window ? stop - s.window : 0;
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
          const int64_t at = (row * heads + head) * head_dim;
          queries.push_back({query + at, out + at, first, stop});
        }
      }
      const int64_t count = static_cast<int64_t>(queries.size());
      for (int64_t at = 0; at < count;) {
        const int64_t done = attend_any(head_dim, count - at, kv, queries.data() + at, scale);
        if (done == 0) return 0;
        at += done;
      }
    }
  }
  return 1;
}

inline float inverse_rms(const float* x, int64_t width, float eps) {
  v16 squares = {};
  for (int64_t i = 0; i < width; i += 16) {
    const v16 part = load_some(x + i, width - i);
    squares += part * part;
  }
  return 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(width) + eps);
}

inline void norm_row(const float* x, const float* weight, int64_t width, float eps, float* out) {
  const float inverse = inverse_rms(x, width, eps);
  for (int64_t i = 0; i < width; i += 16)
    store_some(out + i, load_some(weight + i, width - i) * (load_some(x + i, width - i) * inverse),
               width - i);
}

inline void silu_mul_row(const float* gate_up, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += 16) {
    const v16 gate = load_some(gate_up + i, width - i);
    const v16 e = exp_nonpositive(gate > 0.0f ? -gate : gate);
    const v16 sigmoid = (gate > 0.0f ? splat(1.0f) : e) / (e + 1.0f);
    store_some(out + i, gate * sigmoid * load_some(gate_up + width + i, width - i), width - i);
  }
}

inline void rotate(const float* from, const float* angles, int64_t head_dim, float* to) {
  const int64_t half = head_dim / 2;
  const float *cosines = angles, *sines = angles + head_dim;
  for (int64_t i = 0; i < half; i++) {
    to[i] = from[i] * cosines[i] - from[half + i] * sines[i];
    to[half + i] = from[half + i] * cosines[half + i] + from[i] * sines[half + i];
  }
}

template <typename KV>
void rope_write(const float* qkv, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim,
                const float* table, const int64_t* positions, const int64_t* slots, KV* keys,
                KV* values, float* query) {
  const int64_t width = kv_heads * head_dim;
  std::vector<float> rotated(width);
  for (int64_t row = 0; row < rows; row++) {
    const float* angles = table + positions[row] * 2 * head_dim;
    for (int64_t head = 0; head < heads; head++, qkv += head_dim, query += head_dim)
      rotate(qkv, angles, head_dim, query);
    for (int64_t head = 0; head < kv_heads; head++, qkv += head_dim)
      rotate(qkv, angles, head_dim, rotated.data() + head * head_dim);
    store_rounded(keys + slots[row] * width, rotated.data(), width);
    store_rounded(values + slots[row] * width, qkv, width);
    qkv += width;
  }
}

template <typename KV>
void write_rows(const float* rows_in, int64_t stride, const int64_t* slots, int64_t rows,
                int64_t width, KV* blocks) {
  for (int64_t row = 0; row < rows; row++)
    store_rounded(blocks + slots[row] * width, rows_in + row * stride, width);
}

}  // namespace

extern "C" {

// Quantises rows [rows, width] to [rows, row_bytes(width)].
void afd_quantise(const float* x, int64_t rows, int64_t width, uint8_t* out) {
  for (int64_t row = 0; row < rows; row++)
    quantise_row(x + row * width, width, out + row * row_bytes(width));
}

// y[rows, columns] = x · weightᵀ with quantised rows and int8 weights, packed by `kernels/cpu.py`.
// Exact sums in a group of 64 columns, groups in order.
void afd_linear_int8(const uint8_t* x, int64_t rows, int64_t groups, const uint8_t* weight,
                     const float* scales, int64_t columns, float* y) {
  thread_local Panels panels;
  const Tiles tiles(rows);
  lay_out(x, tiles, groups, panels);
  for (int64_t column = 0; column < columns; column += kColumns) {
    const int64_t left = columns - column;
    for (int64_t tile = 0; tile < tiles.count; tile++) {
      const int64_t first = tiles.start(tile);
      const Panel panel{panels.values.data() + first * groups * 16,
                        panels.scales.data() + first * groups,
                        panels.shifts.data() + first * groups};
      const Block block{groups,
                        weight + column * groups * kGroup,
                        scales + column * groups,
                        y + first * columns + column,
                        columns,
                        static_cast<int>(left < kColumns ? left : kColumns)};
      multiply_any<kMaxTile>(tiles.start(tile + 1) - first, panel, block);
    }
  }
}

// y[rows, columns] = x[rows, width] · weightᵀ with weights packed as [columns / 16, width, 16],
// in float32 or, if `is_bf16`, in bfloat16.
void afd_linear_float(const float* x, int64_t rows, int64_t width, const void* weight,
                      int32_t is_bf16, int64_t columns, float* y) {
  if (is_bf16)
    multiply_float(x, rows, width, static_cast<const bf16*>(weight), columns, y);
  else
    multiply_float(x, rows, width, static_cast<const float*>(weight), columns, y);
}

// Attention of queries [rows, heads, head_dim] over paged keys and values (bfloat16 if `is_bf16`,
// else float32); block_size is a power of two. Returns 0 if head_dim is none of those built in; then nothing was written.
int32_t afd_paged_attention(const float* query, int64_t heads, int64_t head_dim, const void* keys,
                            const void* values, int32_t is_bf16, int64_t block_size,
                            int64_t kv_heads, int64_t sequences, const int64_t* row_starts,
                            const int64_t* num_keys, const int64_t* block_tables,
                            int64_t table_width, int64_t window, float* out) {
  const Sequences s{sequences, row_starts, num_keys, block_tables, table_width, window};
  if (is_bf16)
    return attend_all(query, heads, head_dim, static_cast<const bf16*>(keys),
                      static_cast<const bf16*>(values), block_size, kv_heads, s, out);
  return attend_all(query, heads, head_dim, static_cast<const float*>(keys),
                    static_cast<const float*>(values), block_size, kv_heads, s, out);
}

// out = weight · x / sqrt(mean(x²) + eps), row by row.
void afd_rms_norm(const float* x, const float* weight, int64_t rows, int64_t width, float eps,
                  float* out) {
  for (int64_t row = 0; row < rows; row++)
    norm_row(x + row * width, weight, width, eps, out + row * width);
}

// The same of x + delta (delta may be null), quantised; the sum goes to `sum` unless delta is null.
void afd_add_norm_quantise(const float* x, const float* delta, const float* weight, int64_t rows,
                           int64_t width, float eps, float* sum, uint8_t* out) {
  std::vector<float> normed(width);
  for (int64_t row = 0; row < rows; row++, x += width, out += row_bytes(width)) {
    const float* from = x;
    if (delta != nullptr) {
      for (int64_t i = 0; i < width; i++) sum[i] = x[i] + delta[i];
      from = sum;
      sum += width;
      delta += width;
    }
    norm_row(from, weight, width, eps, normed.data());
    quantise_row(normed.data(), width, out);
  }
}

// out[rows, width] = silu(gate) · up of rows that hold both, gate first.
void afd_silu_mul(const float* gate_up, int64_t rows, int64_t width, float* out) {
  for (int64_t row = 0; row < rows; row++)
    silu_mul_row(gate_up + row * 2 * width, width, out + row * width);
}

// The same, quantised.
void afd_silu_mul_quantise(const float* gate_up, int64_t rows, int64_t width, uint8_t* out) {
  std::vector<float> product(width);
  for (int64_t row = 0; row < rows; row++) {
    silu_mul_row(gate_up + row * 2 * width, width, product.data());
    quantise_row(product.data(), width, out + row * row_bytes(width));
  }
}

// Rotates heads by their position. x [rows, heads, head_dim] with `stride` elements between rows;
// table [positions, 2, head_dim], cosines then sines; out contiguous.
void afd_rope(const float* x, int64_t stride, const float* table, const int64_t* positions,
              int64_t rows, int64_t heads, int64_t head_dim, float* out) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t head = 0; head < heads; head++, out += head_dim)
      rotate(x + row * stride + head * head_dim, table + positions[row] * 2 * head_dim, head_dim,
             out);
}

// Rotates queries and keys of rows [heads + 2 · kv_heads, head_dim] and stores keys and values at
// flat slots of the blocks.
void afd_rope_write_kv(const float* qkv, int64_t rows, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, const float* table, const int64_t* positions,
                       const int64_t* slots, void* keys, void* values, int32_t is_bf16,
                       float* query) {
  if (is_bf16)
    rope_write(qkv, rows, heads, kv_heads, head_dim, table, positions, slots,
               static_cast<bf16*>(keys), static_cast<bf16*>(values), query);
  else
    rope_write(qkv, rows, heads, kv_heads, head_dim, table, positions, slots,
               static_cast<float*>(keys), static_cast<float*>(values), query);
}

// Stores rows of `width` elements at flat slots of the blocks.
void afd_write_rows(const float* rows_in, int64_t stride, const int64_t* slots, int64_t rows,
                    int64_t width, void* blocks, int32_t is_bf16) {
  if (is_bf16)
    write_rows(rows_in, stride, slots, rows, width, static_cast<bf16*>(blocks));
  else
    write_rows(rows_in, stride, slots, rows, width, static_cast<float*>(blocks));
}

}  // extern "C"
