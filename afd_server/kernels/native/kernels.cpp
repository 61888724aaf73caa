// The measured CPU path. `kernels/reference.py` and `kernels/quant.py` say what it must compute.
//
// One source, compiled once for each instruction set (see hatch_build.py). There is no fused
// multiply-add (-ffp-contract=off) and every reduction has a fixed order, so all builds of this
// file give the same bits, and a row's bits depend on that row alone.
//
// Plain C functions on raw pointers, called through ctypes: no Python and no torch headers.
// Buffers are owned by the caller, row-major and contiguous. Nothing here starts a thread.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace {

constexpr int kGroup = 64;    // columns of a row that share an activation scale
constexpr int kColumns = 16;  // weight rows (output columns) interleaved in a packed block
constexpr int kMaxTile = 12;  // activation rows of one tile: 12 integer and 12 float accumulators

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));

inline v16 load(const float* from) {
  v16 value;
  memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, v16 value) { memcpy(to, &value, sizeof value); }

inline v16 splat(float value) { return v16{} + value; }

// Adds sixteen lanes as a tree: 16 to 8 to 4 to 2 to 1.
inline float sum_lanes(v16 x) {
  v8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
         __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
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
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const v16 power = (v16)((n + 127) << 23);
  return alive ? p * power : splat(0.0f);
}

// Loads up to sixteen floats, zeros behind them.
inline v16 load_some(const float* from, int64_t count) {
  if (count >= 16) return load(from);
  v16 value = {};
  memcpy(&value, from, count * sizeof(float));
  return value;
}

inline void store_some(float* to, v16 value, int64_t count) {
  memcpy(to, &value, (count < 16 ? count : 16) * sizeof(float));
}

struct Rows {  // activations of one call, quantised
  std::vector<int8_t> values;  // [rows, padded]
  std::vector<float> scales;   // [rows, groups]
  std::vector<int32_t> sums;   // [rows, groups], of the values
};

// Quantises rows in groups of 64 columns to int8 with a scale each: amax / 127.
void quantise(const float* x, int64_t rows, int64_t width, int64_t padded, Rows& out) {
  const int64_t groups = padded / kGroup;
  out.values.assign(rows * padded, 0);
  out.scales.resize(rows * groups);
  out.sums.resize(rows * groups);
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t group = 0; group < groups; group++) {
      const int64_t begin = group * kGroup;
      const int64_t count = width - begin < kGroup ? width - begin : kGroup;
      const float* from = x + row * width + begin;
      int8_t* to = out.values.data() + row * padded + begin;
      float highest = 0.0f;
      for (int64_t i = 0; i < count; i++) {
        const float size = std::fabs(from[i]);
        highest = size > highest ? size : highest;
      }
      const float inverse = highest > 0.0f ? 127.0f / highest : 0.0f;
      int32_t sum = 0;
      for (int64_t i = 0; i < count; i++) {
        // adding 1.5 * 2^23 rounds to nearest, ties to even, for values this small
        const float shifted = from[i] * inverse + 12582912.0f;
        const int32_t value = static_cast<int32_t>(shifted - 12582912.0f);
        to[i] = static_cast<int8_t>(value);
        sum += value;
      }
      out.scales[row * groups + group] = highest / 127.0f;
      out.sums[row * groups + group] = sum;
    }
  }
}

struct Product {  // one block of 16 output columns
  const Rows& x;
  int64_t padded;
  const uint8_t* weight;  // [padded / 4, 16, 4], each value + 128
  const float* scales;    // [16]
  float* y;               // first row, first column of the block
  int64_t stride;         // of y
  int columns;            // 16, or fewer in the last block
};

#ifdef __AVX512VNNI__
template <int kRows>
void multiply_tile(const Product& p, int64_t first) {
  const int64_t groups = p.padded / kGroup;
  const int8_t* x = p.x.values.data() + first * p.padded;
  __m512 total[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) total[r] = _mm512_setzero_ps();
  for (int64_t group = 0; group < groups; group++) {
    __m512i exact[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) exact[r] = _mm512_setzero_si512();
    const uint8_t* weight = p.weight + group * kGroup * kColumns;
    for (int k = 0; k < kGroup; k += 4) {
      const __m512i w = _mm512_loadu_si512(weight + k * kColumns);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) {
        int32_t four;
        memcpy(&four, x + r * p.padded + group * kGroup + k, 4);
        exact[r] = _mm512_dpbusd_epi32(exact[r], w, _mm512_set1_epi32(four));
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      const int64_t at = (first + r) * groups + group;
      exact[r] = _mm512_sub_epi32(exact[r], _mm512_set1_epi32(128 * p.x.sums[at]));
      const __m512 scale = _mm512_set1_ps(p.x.scales[at]);
      total[r] = _mm512_add_ps(total[r], _mm512_mul_ps(_mm512_cvtepi32_ps(exact[r]), scale));
    }
  }
  const __mmask16 mask = static_cast<__mmask16>((1u << p.columns) - 1);
  const __m512 scales = _mm512_maskz_loadu_ps(mask, p.scales);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
    _mm512_mask_storeu_ps(p.y + (first + r) * p.stride, mask, _mm512_mul_ps(total[r], scales));
}
#else
// Integer products of one group in 32 bits; the compiler's vectors do the rest.
template <int kRows>
void multiply_tile(const Product& p, int64_t first) {
  const int64_t groups = p.padded / kGroup;
  for (int r = 0; r < kRows; r++) {
    const int8_t* x = p.x.values.data() + (first + r) * p.padded;
    float total[kColumns] = {};
    for (int64_t group = 0; group < groups; group++) {
      int32_t exact[kColumns] = {};
      const uint8_t* weight = p.weight + group * kGroup * kColumns;
      for (int k = 0; k < kGroup; k += 4)
        for (int c = 0; c < kColumns; c++)
          for (int j = 0; j < 4; j++)
            exact[c] += (static_cast<int32_t>(weight[(k * kColumns) + c * 4 + j]) - 128) *
                        x[group * kGroup + k + j];
      const float scale = p.x.scales[(first + r) * groups + group];
      for (int c = 0; c < kColumns; c++) total[c] += static_cast<float>(exact[c]) * scale;
    }
    for (int c = 0; c < p.columns; c++) p.y[(first + r) * p.stride + c] = total[c] * p.scales[c];
  }
}
#endif

template <int kRows>
void multiply_rest(const Product& p, int64_t first, int64_t rest) {
  if constexpr (kRows > 0) {
    if (rest == kRows) return multiply_tile<kRows>(p, first);
    multiply_rest<kRows - 1>(p, first, rest);
  }
}

struct Heads {  // some of one row's query heads of one key/value head, and what they may see
  const float* query;      // [heads, head_dim]
  const float* keys;       // [blocks, block_size, kv_heads, head_dim], at this head
  const float* values;
  int64_t block_size, token_stride;
  const int64_t* blocks;
  int64_t num_keys;
  float scale;
};

// Heads attended together: their sums, kVectors registers each, should stay in registers.
constexpr int most_heads(int vectors) { return vectors <= 4 ? 4 : vectors <= 8 ? 2 : 1; }
constexpr int kKeyTile = 16;

// Attends with an online softmax over tiles of 16 keys, in order.
template <int kVectors, int kHeads>  // head_dim / 16, query heads
void attend(const Heads& h, float* out) {
  constexpr int kHeadDim = 16 * kVectors;
  v16 weighted[kHeads][kVectors] = {};
  float highest[kHeads], total[kHeads] = {};
  for (int g = 0; g < kHeads; g++) highest[g] = -INFINITY;
  for (int64_t begin = 0; begin < h.num_keys; begin += kKeyTile) {
    const int count =
        static_cast<int>(h.num_keys - begin < kKeyTile ? h.num_keys - begin : kKeyTile);
    int64_t at[kKeyTile];
    float scores[kHeads][kKeyTile];
    for (int j = 0; j < count; j++) {
      const int64_t position = begin + j;
      at[j] = (h.blocks[position / h.block_size] * h.block_size + position % h.block_size) *
              h.token_stride;
      v16 product[kHeads];
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i++) {
        const v16 key = load(h.keys + at[j] + 16 * i);
#pragma GCC unroll 4
        for (int g = 0; g < kHeads; g++) {
          const v16 part = load(h.query + g * kHeadDim + 16 * i) * key;
          product[g] = i == 0 ? part : product[g] + part;
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < kHeads; g++) scores[g][j] = sum_lanes(product[g]) * h.scale;
    }
#pragma GCC unroll 4
    for (int g = 0; g < kHeads; g++) {
      for (int j = count; j < kKeyTile; j++) scores[g][j] = -INFINITY;
      float peak = highest[g];
      for (int j = 0; j < count; j++) peak = scores[g][j] > peak ? scores[g][j] : peak;
      const v16 weights = exp_nonpositive(load(scores[g]) - peak);
      const float shrink = exp_nonpositive(splat(highest[g] - peak))[0];
      total[g] = total[g] * shrink + sum_lanes(weights);
      highest[g] = peak;
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i++) weighted[g][i] *= shrink;
      store(scores[g], weights);
    }
    for (int j = 0; j < count; j++) {
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i++) {
        const v16 value = load(h.values + at[j] + 16 * i);
#pragma GCC unroll 4
        for (int g = 0; g < kHeads; g++) weighted[g][i] += value * scores[g][j];
      }
    }
  }
  for (int g = 0; g < kHeads; g++)
    for (int i = 0; i < kVectors; i++)
      store(out + g * kHeadDim + 16 * i, weighted[g][i] / total[g]);
}

// Attends for up to `heads` heads and returns for how many.
template <int kVectors, int kHeads = most_heads(kVectors)>
int64_t attend_some(int64_t heads, const Heads& h, float* out) {
  if constexpr (kHeads > 1) {
    if (heads < kHeads) return attend_some<kVectors, kHeads - 1>(heads, h, out);
  }
  attend<kVectors, kHeads>(h, out);
  return kHeads;
}

// The same for a head size known at run time; 0 if it is none of those built in.
int64_t attend_any(int64_t head_dim, int64_t heads, const Heads& h, float* out) {
  switch (head_dim) {
    case 16: return attend_some<1>(heads, h, out);
    case 32: return attend_some<2>(heads, h, out);
    case 48: return attend_some<3>(heads, h, out);
    case 64: return attend_some<4>(heads, h, out);
    case 80: return attend_some<5>(heads, h, out);
    case 96: return attend_some<6>(heads, h, out);
    case 128: return attend_some<8>(heads, h, out);
    case 192: return attend_some<12>(heads, h, out);
    case 256: return attend_some<16>(heads, h, out);
    default: return 0;
  }
}

}  // namespace

extern "C" {

// y[rows, columns] = x[rows, width] · weightᵀ with int8 weights, packed by `kernels/cpu.py`, and
// activations quantised here, in groups of 64 columns. Exact sums in a group, groups in order.
void afd_linear_int8(const float* x, int64_t rows, int64_t width, int64_t padded,
                     const uint8_t* weight, const float* scales, int64_t columns, float* y) {
  thread_local Rows quantised;
  quantise(x, rows, width, padded, quantised);
  for (int64_t column = 0; column < columns; column += kColumns) {
    const int64_t left = columns - column;
    const Product p{quantised, padded, weight + column * padded, scales + column, y + column,
                    columns, static_cast<int>(left < kColumns ? left : kColumns)};
    int64_t first = 0;
    for (; first + kMaxTile <= rows; first += kMaxTile) multiply_tile<kMaxTile>(p, first);
    multiply_rest<kMaxTile - 1>(p, first, rows - first);
  }
}

// Attention of `rows` queries [rows, heads, head_dim] over paged keys and values. Row i of the
// order sees positions 0 … num_keys[i] − 1 of block_tables[i, ·]. Returns 0 if head_dim is none of
// those built in; then nothing was written.
int32_t afd_paged_attention(const float* query, int64_t rows, int64_t heads, int64_t head_dim,
                            const float* keys, const float* values, int64_t block_size,
                            int64_t kv_heads, const int64_t* order, const int64_t* num_keys,
                            const int64_t* block_tables, int64_t table_width, float* out) {
  const int64_t group = heads / kv_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  for (int64_t place = 0; place < rows; place++) {
    for (int64_t head = 0; head < heads;) {
      const int64_t kv_head = head / group;
      const int64_t at = (order[place] * heads + head) * head_dim;
      const Heads h{query + at,
                    keys + kv_head * head_dim,
                    values + kv_head * head_dim,
                    block_size,
                    kv_heads * head_dim,
                    block_tables + place * table_width,
                    num_keys[place],
                    scale};
      const int64_t done = attend_any(head_dim, (kv_head + 1) * group - head, h, out + at);
      if (done == 0) return 0;
      head += done;
    }
  }
  return 1;
}

// out = weight · x / sqrt(mean(x²) + eps), row by row.
void afd_rms_norm(const float* x, const float* weight, int64_t rows, int64_t width, float eps,
                  float* out) {
  for (int64_t row = 0; row < rows; row++, x += width, out += width) {
    v16 squares = {};
    for (int64_t i = 0; i < width; i += 16) {
      const v16 part = load_some(x + i, width - i);
      squares += part * part;
    }
    const float inverse = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(width) + eps);
    for (int64_t i = 0; i < width; i += 16)
      store_some(out + i, load_some(weight + i, width - i) * (load_some(x + i, width - i) * inverse),
                 width - i);
  }
}

// out[rows, width] = silu(gate) · up of rows that hold both, gate first.
void afd_silu_mul(const float* gate_up, int64_t rows, int64_t width, float* out) {
  for (int64_t row = 0; row < rows; row++, gate_up += 2 * width, out += width) {
    for (int64_t i = 0; i < width; i += 16) {
      const v16 gate = load_some(gate_up + i, width - i);
      const v16 e = exp_nonpositive(gate > 0.0f ? -gate : gate);
      const v16 sigmoid = (gate > 0.0f ? splat(1.0f) : e) / (e + 1.0f);
      store_some(out + i, gate * sigmoid * load_some(gate_up + width + i, width - i), width - i);
    }
  }
}

// Rotates heads by their position. x [rows, heads, head_dim] with `stride` elements between rows;
// table [positions, 2, head_dim], cosines then sines; out contiguous.
void afd_rope(const float* x, int64_t stride, const float* table, const int64_t* positions,
              int64_t rows, int64_t heads, int64_t head_dim, float* out) {
  const int64_t half = head_dim / 2;
  for (int64_t row = 0; row < rows; row++, x += stride) {
    const float* cosines = table + positions[row] * 2 * head_dim;
    const float* sines = cosines + head_dim;
    for (int64_t head = 0; head < heads; head++, out += head_dim) {
      const float* from = x + head * head_dim;
      for (int64_t i = 0; i < half; i++) {
        out[i] = from[i] * cosines[i] - from[half + i] * sines[i];
        out[half + i] = from[half + i] * cosines[half + i] + from[i] * sines[half + i];
      }
    }
  }
}

// Stores rows of `width` elements at flat slots of the blocks.
void afd_write_rows(const float* rows_in, int64_t stride, const int64_t* slots, int64_t rows,
                    int64_t width, float* blocks) {
  for (int64_t row = 0; row < rows; row++)
    memcpy(blocks + slots[row] * width, rows_in + row * stride, width * sizeof(float));
}

}  // extern "C"
