// Sixteen floats at a time, the same in every build: fixed order, fused only where it says so.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace afd {

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

// One broadcast; adding to zeros would stay an addition, for the sake of -0.
inline v16 splat(float x) { return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

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

inline v16 at_most(v16 a, float limit) { return a > limit ? splat(limit) : a; }

inline v16 larger(v16 a, v16 b) { return a > b ? a : b; }

// Combines sixteen lanes as a tree: 16 to 8 to 4 to 2 to 1.
inline float sum_lanes(v16 x) {
  v8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
         __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

inline bool any(i16 lanes) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)lanes) != 0;
#else
  int32_t found = 0;
  for (int j = 0; j < 16; j++) found |= lanes[j];
  return found != 0;
#endif
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

// Combines the lanes of each of eight vectors, in two parts each: lanes j and j + 8 of the result are of
// x[j]. A tree of neighbours, which costs three operations a vector where `sum_lanes` costs ten.
template <typename V, typename Combine>
inline V combine_eight(V* x, Combine combine) {
  for (int i = 0; i < 4; i++) {
    const V a = x[2 * i], b = x[2 * i + 1];
    x[i] = combine(
        __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
        __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
  }
  for (int i = 0; i < 2; i++) {
    const V a = x[2 * i], b = x[2 * i + 1];
    x[i] = combine(
        __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
        __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  }
  return combine(
      __builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
      __builtin_shufflevector(x[0], x[1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31));
}

template <typename V>
inline V sum_eight(V* x) {
  return combine_eight(x, [](V a, V b) { return a + b; });
}

// The largest lane of each of eight vectors: lane j is of x[j].
inline v16 largest_of_eight(v16* x) {
  const v16 parts = combine_eight(x, larger);
  return larger(parts, __builtin_shufflevector(parts, parts, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3,
                                               4, 5, 6, 7));
}

// Sums those of two times eight: lane j is the sum of the j-th.
template <typename V>
inline V sum_both(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

template <typename V>
inline V sum_each(V* x) {
  return sum_both(sum_eight(x), sum_eight(x + 8));
}

// Of lanes of a and b: those of a whose number lacks the bit `step`, followed by their counterparts
// of b; or, if `others`, those that have it.
template <int step, bool others, int... lane>
inline v16 every_second(v16 a, v16 b, std::integer_sequence<int, lane...>) {
  constexpr int shift = others ? step : 0;
  return __builtin_shufflevector(a, b, (lane & step ? 16 + lane - step : lane) + shift...);
}

template <int step = 1>
inline void transpose(v16* x) {
  constexpr auto lanes = std::make_integer_sequence<int, 16>();
  for (int i = 0; i < 16; i++) {
    if (i & step) continue;
    const v16 a = x[i], b = x[i + step];
    x[i] = every_second<step, false>(a, b, lanes);
    x[i + step] = every_second<step, true>(a, b, lanes);
  }
  if constexpr (step < 8) transpose<2 * step>(x);
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

// 2^x for x <= 0, to about 2 units in the last place; 0 below -125.
inline v16 exp2_nonpositive(v16 x) {
#if defined(__AVX512F__)
  const __mmask16 alive = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-125.0f), _CMP_GT_OQ);
  const v16 whole = (v16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const i16 alive = x > -125.0f;
  x = alive ? x : splat(0.0f);
  const v16 whole = (x + 12582912.0f) - 12582912.0f;  // 1.5 · 2^23: rounded to the nearest integer
#endif
  const v16 r = x - whole;
  v16 p = splat(1.328743179e-3f);  // least relative error of all of this degree, found by least squares
  p = fma(p, r, splat(9.671507403e-3f));
  p = fma(p, r, splat(5.550655723e-2f));
  p = fma(p, r, splat(2.402224243e-1f));
  p = fma(p, r, splat(6.931470633e-1f));
  p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
  return (v16)_mm512_maskz_scalef_ps(alive, (__m512)p, (__m512)whole);
#else
  const v16 power = (v16)((__builtin_convertvector(whole, i16) + 127) << 23);
  return alive ? p * power : splat(0.0f);
#endif
}

// silu(gate) · up, the first at most `limit`, the second within ±limit; infinity for neither.
inline v16 silu_mul(v16 gate, v16 up, float limit) {
  const v16 e = exp_nonpositive(gate > 0.0f ? -gate : gate);
  const v16 sigmoid = (gate > 0.0f ? splat(1.0f) : e) / (e + 1.0f);
  v16 silu = gate * sigmoid;
  if (limit < INFINITY) {
    silu = at_most(silu, limit);
    up = -at_most(-at_most(up, limit), limit);
  }
  return silu * up;
}

#ifdef __AVX512VNNI__
// sum += 4 products of each lane. GCC 12 copies every sum twice around the intrinsic, which is half
// of all instructions of the loops below.
inline void add_products(__m512i& sum, __m512i weights, __m512i value) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(value));
}
#endif

// Loads up to sixteen floats, zeros behind them.
inline v16 load_some(const float* from, int64_t count) {
  if (count >= 16) return load(from);
  v16 value = {};
  if (count > 0) memcpy(&value, from, count * sizeof(float));
  return value;
}

inline void store_some(float* to, v16 value, int64_t count) {
  if (count >= 16) return store(to, value);
  memcpy(to, &value, count * sizeof(float));
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
  for (int64_t i = 0; i < count; i += 16) {
    const u16 bits = (u16)load_some(from + i, count - i);
    const u16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const i16 is_nan = (i16)(bits & 0x7fffffffu) > 0x7f800000;
    const h16 values = __builtin_convertvector(is_nan ? u16{} + 0x7fc0u : rounded, h16);
    if (count - i >= 16)
      memcpy(to + i, &values, sizeof values);
    else
      memcpy(to + i, &values, (count - i) * sizeof(bf16));
  }
}

inline void store_rounded(float* to, const float* from, int64_t count) {
  memcpy(to, from, count * sizeof(float));
}

// GCC 12 converts int8 element by element unless it is told the instruction.
inline v16 load(const int8_t* from) {
  v16 wide;
#if defined(__AVX512F__)
  __m128i bytes;
  memcpy(&bytes, from, sizeof bytes);
  wide = (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; i++) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i));
    const __m256 half = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    memcpy(reinterpret_cast<float*>(&wide) + 8 * i, &half, sizeof half);
  }
#else
  for (int i = 0; i < 16; i++) wide[i] = from[i];
#endif
  return wide;
}

// Rounds to nearest, ties to even; |x| < 128. GCC 12 narrows lane by lane unless it is told the
// instruction: 77 ns for 64 values and what else is done to them, instead of 14.
inline b16 round_to_bytes(v16 x) {
  const i16 shifted = (i16)(x + 12582912.0f);  // 1.5 * 2^23: the integer is in the lowest byte
#if defined(__AVX512F__)
  return (b16)_mm512_cvtepi32_epi8((__m512i)shifted);
#else
  return __builtin_convertvector(shifted, b16);
#endif
}

// Elements before a stored key or value: in int8 those of its float32 scale.
template <typename KV>
constexpr int64_t kScaleElements = 0;
template <>
constexpr int64_t kScaleElements<int8_t> = sizeof(float);

// A vector's scale is amax / 127, its values are rounded to nearest, ties to even.
inline void store_rounded(int8_t* to, const float* from, int64_t count) {
  v16 highest = {};
  for (int64_t i = 0; i < count; i += 16) {
    const v16 part = load_some(from + i, count - i);
    highest = larger(highest, part < 0.0f ? -part : part);
  }
  const float peak = largest_lane(highest);
  const float inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
  const float scale = peak / 127.0f;
  memcpy(to, &scale, sizeof scale);
  for (int64_t i = 0; i < count; i += 16) {
    const b16 rounded = round_to_bytes(load_some(from + i, count - i) * inverse);
    memcpy(to + sizeof scale + i, &rounded, count - i < 16 ? count - i : 16);
  }
}

// Loads a stored vector. Two neighbours of bfloat16 come apart with one operation each, so that
// even elements and odd ones of each 32 are in vectors of their own.
template <typename KV, int kVectors>
inline void load_apart(const KV* from, v16* to) {
  int i = 0;
  if constexpr (std::is_same_v<KV, bf16>)
#pragma GCC unroll 8
    for (; i + 1 < kVectors; i += 2) {
      u16 pairs;
      memcpy(&pairs, from + 16 * i, sizeof pairs);
      to[i] = (v16)(pairs << 16);
      to[i + 1] = (v16)(pairs & 0xffff0000u);
    }
#pragma GCC unroll 16
  for (; i < kVectors; i++) to[i] = load(from + 16 * i);
}

// Brings a vector into the order of `load_apart`.
template <typename KV, int kVectors>
inline void take_apart(v16* x) {
  if constexpr (std::is_same_v<KV, bf16>)
    for (int i = 0; i + 1 < kVectors; i += 2) {
      const v16 a = x[i], b = x[i + 1];
      x[i] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      x[i + 1] = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    }
}

// Undoes `take_apart`.
template <typename KV, int kVectors>
inline void put_together(v16* x) {
  if constexpr (std::is_same_v<KV, bf16>)
    for (int i = 0; i + 1 < kVectors; i += 2) {
      const v16 a = x[i], b = x[i + 1];
      x[i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      x[i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
}

// The scale before a vector of int8.
inline float scale_of(const int8_t* values) {
  float scale;
  memcpy(&scale, values - sizeof scale, sizeof scale);
  return scale;
}

}  // namespace afd
