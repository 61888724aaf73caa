// Attention over paged keys and values, for decoding and prefill alike.
#pragma once

#include <vector>

#include "vectors.h"

namespace afd {

// For what takes addresses of local arrays: compiled apart it would keep them out of registers.
#define ALWAYS_INLINE __attribute__((always_inline)) inline
// A function that only prefetches has no effect to GCC 12, which leaves calls of it out.
#define INLINED __attribute__((always_inline))

constexpr int kKeyTile = 16;
constexpr int kTiles = 4;  // share a maximum: what is done once for them makes the core wait
constexpr int kSpan = kTiles * kKeyTile;
constexpr int64_t kManyQueries = 24;  // from so many on it pays to turn keys

// Query heads that share a key/value head and read its keys together. Their sums, head_dim / 16
// registers each, should stay in registers.
// Of int8 values 32 dimensions are summed together.
template <typename KV>
constexpr int sums_of(int vectors) { return kScaleElements<KV> > 0 ? (vectors + 1) / 2 * 2 : vectors; }
template <typename KV>
constexpr int most_queries(int vectors) {
  const int sums = sums_of<KV>(vectors);
  return sums >= 16 ? 1 : 24 / sums < 6 ? 24 / sums : 6;
}

struct Query {
  const float* from;   // [head_dim]
  float* to;           // [head_dim]
  int64_t first, stop; // sees positions first … stop − 1
};

struct Range {
  int64_t first, stop;
};

// What any of some queries sees.
inline Range seen_by(const Query* queries, int64_t count) {
  Range seen{queries[0].first, queries[0].stop};
  for (int64_t q = 1; q < count; q++) {
    seen.first = queries[q].first < seen.first ? queries[q].first : seen.first;
    seen.stop = queries[q].stop > seen.stop ? queries[q].stop : seen.stop;
  }
  return seen;
}

template <typename KV>
struct KVHead {  // one key/value head of one sequence
  const KV* keys;  // [blocks, kv_heads, block_size, stored], at this head, behind the first scale
  const KV* values;
  const int64_t* blocks;
  int block_bits;  // log2 of the block size
  int64_t block_stride, stored;  // head_dim and what the scale takes

  // Where a position's key is; its value is as far from `values`.
  int64_t at(int64_t position) const {
    const int64_t offset = position & ((int64_t{1} << block_bits) - 1);
    return blocks[position >> block_bits] * block_stride + offset * stored;
  }

  // The same; outside of what is seen any seen key will do: it is hidden, or never used.
  int64_t seen_at(int64_t position, int64_t first, int64_t stop) const {
    position = position < stop ? position : stop - 1;
    return at(position < first ? first : position);
  }
};

template <typename KV>
struct Following {  // what is attended to next; nothing of it is seen where that is not known
  KVHead<KV> kv;
  Range seen;
};

inline int tiles_until(int64_t stop, int64_t begin) {
  const int64_t seen = (stop - begin + kKeyTile - 1) / kKeyTile;
  return seen < kTiles ? static_cast<int>(seen) : kTiles;
}

// The hardware does not know which block comes next.
template <typename KV>
ALWAYS_INLINE void prefetch(const KV* at, int head_dim) {
  for (int i = 0; i < head_dim; i += 64 / static_cast<int>(sizeof(KV))) __builtin_prefetch(at + i);
}

// Weighs the values of a span by a query's scores: one step of an online softmax. Hardly any span has
// a new maximum; where there is none nothing is scaled, and nothing waits for the maximum.
template <int kVectors>
ALWAYS_INLINE void weigh(const v16* scores, int tiles, float& highest, v16& total, v16* weighted,
                         float* weights) {
  v16 largest = scores[0];
  for (int tile = 1; tile < tiles; tile++) largest = larger(largest, scores[tile]);
  if (any(largest > highest)) {
    const float peak = largest_lane(largest);
    const float shrink = exp2_nonpositive(splat(highest - peak))[0];
    total *= shrink;
    highest = peak;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) weighted[i] *= shrink;
  }
  for (int tile = 0; tile < tiles; tile++) {
    const v16 weight = exp2_nonpositive(scores[tile] - highest);
    total += weight;
    store(weights + kKeyTile * tile, weight);
  }
}

// Scores of sixteen keys from `begin` on; what the query does not see is hidden.
ALWAYS_INLINE v16 hide(v16 score, const Query& query, int64_t begin) {
  const v16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const v16 position = lanes + static_cast<float>(begin - query.first);
  const float visible = static_cast<float>(query.stop - query.first);
  score = position < visible ? score : splat(-INFINITY);
  return position < 0.0f ? splat(-INFINITY) : score;
}

// A query as it is multiplied by keys: times the softmax's scale, in the order of `load_apart`.
template <typename KV, int kVectors>
struct alignas(64) Prepared {
  float values[16 * kVectors];

  ALWAYS_INLINE void take(const float* from, float scale) {
    v16 part[kVectors];
    for (int i = 0; i < kVectors; i++) part[i] = load(from + 16 * i) * scale;
    take_apart<KV, kVectors>(part);
    for (int i = 0; i < kVectors; i++) store(values + 16 * i, part[i]);
  }
};

// By int8 keys it is multiplied as int8, quantised as these are: sums of integers are exact in any order.
template <int kVectors>
struct alignas(64) Prepared<int8_t, kVectors> {
  int8_t values[(16 * kVectors + 63) / 64 * 64];  // zeros behind the last
  int32_t shift;                                  // -128 times their sum
  float factor;                                   // their scale times the softmax's

  ALWAYS_INLINE void take(const float* from, float scale) {
    int8_t stored[kScaleElements<int8_t> + 16 * kVectors];
    store_rounded(stored, from, 16 * kVectors);
    memset(values, 0, sizeof values);
    memcpy(values, stored + kScaleElements<int8_t>, 16 * kVectors);
    factor = scale_of(stored + kScaleElements<int8_t>) * scale;
    int32_t sum = 0;
    for (int i = 0; i < 16 * kVectors; i++) sum += values[i];
    shift = -128 * sum;
  }
};

#ifdef __AVX512VNNI__
// Loads 64 bytes of a key, each plus 128, of which all from `left` on are multiplied by zeros.
ALWAYS_INLINE __m512i load_shifted(const int8_t* from, int left) {
  const __m512i bytes =
      left >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((uint64_t{1} << left) - 1, from);
  return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
}
#endif

// The values of a span of int8 as int16: a lane of a vector has one dimension of two keys.
template <int kVectors>
struct alignas(64) SpanValues {
  static constexpr int kSums = sums_of<int8_t>(kVectors);
  int16_t pairs[kSpan / 2][16 * kSums][2];

  ALWAYS_INLINE void take(const int8_t* values, const int64_t* at, int pair) {
    const int8_t *even = values + at[2 * pair], *odd = values + at[2 * pair + 1];
#ifdef __AVX512VNNI__
#pragma GCC unroll 8
    for (int i = 0; i < kSums; i += 2) {  // 32 dimensions, of which the last 16 may be missing
      const __mmask32 there = i + 2 <= kVectors ? -1 : 0xffff;
      const __m512i a = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, even + 16 * i));
      const __m512i b = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, odd + 16 * i));
      _mm512_store_si512(pairs[pair][16 * i], _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(pairs[pair][16 * i + 16], _mm512_unpackhi_epi16(a, b));
    }
#elif defined(__AVX2__)
    for (int i = 0; i < kVectors; i++) {
      const auto load_wide = [i](const int8_t* from) INLINED {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * i)));
      };
      const __m256i a = load_wide(even), b = load_wide(odd);
      const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
      __m256i* to = reinterpret_cast<__m256i*>(pairs[pair][16 * i]);
      _mm256_store_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_store_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
    }
#else
    for (int i = 0; i < 16 * kVectors; i++) {
      pairs[pair][i][0] = even[i];
      pairs[pair][i][1] = odd[i];
    }
#endif
  }

  // Undoes the order of `take`: four of each eight dimensions are in the first vector of two.
  static ALWAYS_INLINE void put_in_order(v16* x) {
#ifdef __AVX512VNNI__
    float apart[16 * kSums], together[16 * kSums];
    memcpy(apart, x, sizeof apart);
    for (int from = 0; from < 16 * kSums; from += 4) {
      const int to = from / 32 * 32 + from % 16 * 2 + from % 32 / 16 * 4;
      memcpy(together + to, apart + from, 4 * sizeof(float));
    }
    memcpy(x, together, sizeof together);
#endif
  }
};

// Stores the lower half of each lane.
ALWAYS_INLINE void store_low(int16_t* to, v16 lanes) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256i half[2];
  memcpy(half, &lanes, sizeof half);
  for (__m256i& part : half) part = _mm256_srai_epi32(_mm256_slli_epi32(part, 16), 16);
  const __m256i low = _mm256_permute4x64_epi64(_mm256_packs_epi32(half[0], half[1]), 0xd8);
#else
  const h16 low = __builtin_convertvector((u16)lanes, h16);
#endif
  memcpy(to, &low, sizeof low);
}

// Sums values times weights of 15 bits; a sum has less than 29 bits. Calls `between` for each two keys.
template <int kVectors, int kQueries, typename Between>
ALWAYS_INLINE void sum_values(const SpanValues<kVectors>& values, int tiles,
                              const int16_t (*weights)[kSpan],
                              i16 (*sums)[SpanValues<kVectors>::kSums], Between between) {
  constexpr int kSums = SpanValues<kVectors>::kSums;
#ifdef __AVX512VNNI__
  __m512i sum[kQueries][kSums];
#pragma GCC unroll 6
  for (int q = 0; q < kQueries; q++)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++) sum[q][i] = _mm512_setzero_si512();
  for (int pair = 0; pair < kKeyTile / 2 * tiles; pair++) {
    const __m512i* both = reinterpret_cast<const __m512i*>(values.pairs[pair]);
#pragma GCC unroll 6
    for (int q = 0; q < kQueries; q++) {
      int32_t two;
      memcpy(&two, weights[q] + 2 * pair, sizeof two);
      const __m512i weight = _mm512_set1_epi32(two);
#pragma GCC unroll 16
      for (int i = 0; i < kSums; i++)  // as in `add_products`
        asm("vpdpwssd %2, %1, %0" : "+v"(sum[q][i]) : "v"(weight), "v"(both[i]));
    }
    between(2 * pair);
  }
#pragma GCC unroll 6
  for (int q = 0; q < kQueries; q++)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++) sums[q][i] = (i16)sum[q][i];
#elif defined(__AVX2__)
  for (int i = 0; i < kVectors; i++) {
    __m256i sum[kQueries][2];
#pragma GCC unroll 6
    for (int q = 0; q < kQueries; q++) sum[q][0] = sum[q][1] = _mm256_setzero_si256();
    for (int pair = 0; pair < kKeyTile / 2 * tiles; pair++) {
      const __m256i* both = reinterpret_cast<const __m256i*>(values.pairs[pair][16 * i]);
#pragma GCC unroll 6
      for (int q = 0; q < kQueries; q++) {
        int32_t two;
        memcpy(&two, weights[q] + 2 * pair, sizeof two);
        const __m256i weight = _mm256_set1_epi32(two);
        for (int half = 0; half < 2; half++)
          sum[q][half] = _mm256_add_epi32(sum[q][half], _mm256_madd_epi16(both[half], weight));
      }
      if (i == 0) between(2 * pair);
    }
#pragma GCC unroll 6
    for (int q = 0; q < kQueries; q++) memcpy(&sums[q][i], sum[q], sizeof sum[q]);
  }
  for (int q = 0; q < kQueries; q++)
    for (int i = kVectors; i < kSums; i++) sums[q][i] = i16{};
#else
  for (int q = 0; q < kQueries; q++) {
    i16 sum[kSums] = {};
    for (int pair = 0; pair < kKeyTile / 2 * tiles; pair++) {
      const int16_t *weight = weights[q] + 2 * pair, *from = values.pairs[pair][0];
      for (int i = 0; i < kVectors; i++, from += 32)
        for (int lane = 0; lane < 16; lane++)
          sum[i][lane] += from[2 * lane] * weight[0] + from[2 * lane + 1] * weight[1];
    }
    memcpy(sums[q], sum, sizeof sum);
  }
  for (int pair = 0; pair < kKeyTile / 2 * tiles; pair++) between(2 * pair);
#endif
}

// What a span's values count in: weights times `steps` are rounded to integers, of which `unit` is one.
struct alignas(64) Measures {
  float steps[kSpan];
  float unit;

  // Of scales, zeros for what is not seen.
  ALWAYS_INLINE void take(const v16* scales) {
    const float top = largest_lane(larger(larger(scales[0], scales[1]), larger(scales[2], scales[3])));
    const float inverse = top > 1e-30f ? 32767.0f / top : 0.0f;
    unit = top / 32767.0f;
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; tile++) store(steps + kKeyTile * tile, scales[tile] * inverse);
  }
};

// `weigh` for int8 values and several queries: a weight, of the span's largest, times its value's scale is
// rounded to 15 bits, so that a sum over the span is one of integers. Scores behind the last tile are
// -infinity.
template <int kVectors, int kQueries, typename Between>
ALWAYS_INLINE void weigh_values(v16 (*scores)[kTiles], const Measures* const* measures,
                                const SpanValues<kVectors>& values, int tiles, float* highest,
                                v16* total, v16* const* weighted, Between between) {
  constexpr int kSums = SpanValues<kVectors>::kSums;
  v16 largest[8];
#pragma GCC unroll 8
  for (int q = 0; q < 8; q++) {
    const v16* of = scores[q < kQueries ? q : 0];
    largest[q] = larger(larger(of[0], of[1]), larger(of[2], of[3]));
  }
  v16 before = {};
  memcpy(&before, highest, kQueries * sizeof(float));
  const v16 tops = larger(splat(-FLT_MAX), largest_of_eight(largest)), peaks = larger(before, tops);
  alignas(64) float top[16], shrink[16], share[16];
  store(top, tops);
  store(shrink, exp2_nonpositive(before - peaks));
  store(share, exp2_nonpositive(tops - peaks));
  memcpy(highest, &peaks, kQueries * sizeof(float));
  alignas(64) int16_t weights[kQueries][kSpan];
#pragma GCC unroll 6
  for (int q = 0; q < kQueries; q++) {
    v16 sum = {};
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; tile++) {
      const v16 weight = exp2_nonpositive(scores[q][tile] - top[q]);
      sum += weight;  // 1.5 · 2^23: the integer is in the lowest bits
      const v16 rounded = fma(weight, load(measures[q]->steps + kKeyTile * tile), splat(12582912.0f));
      store_low(weights[q] + kKeyTile * tile, rounded);
    }
    total[q] = total[q] * shrink[q] + sum * share[q];
  }
  i16 sums[kQueries][kSums];
  sum_values<kVectors, kQueries>(values, tiles, weights, sums, between);
#pragma GCC unroll 6
  for (int q = 0; q < kQueries; q++)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++)
      weighted[q][i] = fma(__builtin_convertvector(sums[q][i], v16), splat(measures[q]->unit * share[q]),
                           weighted[q][i] * shrink[q]);
}

template <typename KV, int kVectors>
ALWAYS_INLINE void end(v16* weighted, v16 total, float* to) {
  if constexpr (kScaleElements<KV> > 0)
    SpanValues<kVectors>::put_in_order(weighted);
  else
    put_together<KV, kVectors>(weighted);
  const float all = sum_lanes(total);
  for (int i = 0; i < kVectors; i++)  // adding 0 makes a zero's sign the same in any company
    store(to + 16 * i, weighted[i] / all + 0.0f);
}

ALWAYS_INLINE bool sees_all(const Query& query, int64_t begin) {
  return query.first <= begin && begin + kSpan <= query.stop;
}

// Measures for each of some queries: those of the whole span, or of what it sees, so that nobody else's
// keys count.
template <int kQueries>
struct MeasuresOfEach {
  Measures measures[kQueries];
  const Measures* of[kQueries];

  template <typename QueryOf>
  ALWAYS_INLINE void take(const float* scales, const Measures* whole, int64_t begin, QueryOf query_of) {
    for (int q = 0; q < kQueries; q++) {
      const Query& query = query_of(q);
      if (whole != nullptr && sees_all(query, begin)) {
        of[q] = whole;
      } else if (q > 0 && query.first == query_of(q - 1).first && query.stop == query_of(q - 1).stop) {
        of[q] = of[q - 1];
      } else {
        v16 seen[kTiles];
        for (int tile = 0; tile < kTiles; tile++) {
          const v16 score = hide(splat(0.0f), query, begin + kKeyTile * tile);
          seen[tile] = score == 0.0f ? load(scales + kKeyTile * tile) : splat(0.0f);
        }
        measures[q].take(seen);
        of[q] = measures + q;
      }
    }
  }
};

// Attends with an online softmax over spans of 64 keys, in order, each of four tiles. Spans start at
// multiples of 64 and hidden keys weigh exactly nothing, so a query's bits do not depend on the
// others. Tiles behind the last seen key are left out. (What `attend_many` has functions for stands
// here in full: with them GCC 12 makes this an eighth slower.)
template <typename KV, int kVectors, int kQueries>
void attend(const KVHead<KV>& kv, const Query* queries, float scale) {
  constexpr int kHeadDim = 16 * kVectors;
  Prepared<KV, kVectors> query[kQueries];
  v16 weighted[kQueries][kVectors] = {};
  v16 total[kQueries] = {};
  float highest[kQueries];
  const auto [first, stop] = seen_by(queries, kQueries);
  for (int q = 0; q < kQueries; q++) {
    query[q].take(queries[q].from, scale);
    highest[q] = -FLT_MAX;
  }
  int64_t next[kSpan];
  const auto locate = [&, first = first, stop = stop](int64_t begin) {
    for (int j = 0; j < kSpan; j++) next[j] = kv.seen_at(begin + j, first, stop);
  };
  locate(first / kSpan * kSpan);
  const v16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t begin = first / kSpan * kSpan; begin < stop; begin += kSpan) {
    int64_t at[kSpan];
    memcpy(at, next, sizeof at);
    locate(begin + kSpan);
    const int64_t seen = (stop - begin + kKeyTile - 1) / kKeyTile;
    const int tiles = seen < kTiles ? static_cast<int>(seen) : kTiles;
    v16 scores[kQueries][kTiles];
    for (int tile = 0; tile < tiles; tile++) {
      v16 score[kQueries];
      v16 product[kQueries][kKeyTile];
      for (int j = 0; j < kKeyTile; j++) {
        const int64_t place = at[kKeyTile * tile + j];
        v16 key[kVectors], sum[kQueries];
        load_apart<KV, kVectors>(kv.keys + place, key);
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; i++) {
#pragma GCC unroll 6
          for (int q = 0; q < kQueries; q++) {
            const v16 part = load(query[q].values + 16 * i);
            sum[q] = i == 0 ? part * key[i] : fma(part, key[i], sum[q]);
          }
        }
        prefetch(kv.values + place, kHeadDim);  // a few at a time: the core waits for few lines at once
#pragma GCC unroll 6
        for (int q = 0; q < kQueries; q++) product[q][j] = sum[q];
      }
#pragma GCC unroll 6
      for (int q = 0; q < kQueries; q++) score[q] = sum_each(product[q]);
#pragma GCC unroll 6
      for (int q = 0; q < kQueries; q++) {
        const v16 position = lanes + static_cast<float>(begin + kKeyTile * tile - queries[q].first);
        const float visible = static_cast<float>(queries[q].stop - queries[q].first);
        score[q] = position < visible ? score[q] : splat(-INFINITY);
        scores[q][tile] = position < 0.0f ? splat(-INFINITY) : score[q];
      }
    }
    alignas(64) float weights[kQueries][kSpan];
    for (int q = 0; q < kQueries; q++)
      weigh<kVectors>(scores[q], tiles, highest[q], total[q], weighted[q], weights[q]);
    for (int j = 0; j < kKeyTile * tiles; j++) {
      v16 value[kVectors];
      load_apart<KV, kVectors>(kv.values + at[j], value);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i++) {
#pragma GCC unroll 6
        for (int q = 0; q < kQueries; q++)
          weighted[q][i] = fma(splat(weights[q][j]), value[i], weighted[q][i]);
      }
      prefetch(kv.keys + next[j], kHeadDim);
    }
  }
  for (int q = 0; q < kQueries; q++) end<KV, kVectors>(weighted[q], total[q], queries[q].to);
}

// Finds the keys of a tile; those outside of what is seen are seen ones instead, and hidden later.
ALWAYS_INLINE void locate_tile(const KVHead<int8_t>& kv, int64_t begin, int64_t first, int64_t stop,
                               int64_t* at) {
  if (kv.block_bits >= 4 && begin >= first && begin + kKeyTile <= stop) {
    const int64_t place = kv.at(begin);
    for (int j = 0; j < kKeyTile; j++) at[j] = place + j * kv.stored;
  } else {
    for (int j = 0; j < kKeyTile; j++) at[j] = kv.seen_at(begin + j, first, stop);
  }
}

// Collects the scales of a span's keys or values. (A gather would be slower where it is mitigated.)
ALWAYS_INLINE void collect_scales(const int8_t* from, const int64_t* at, int count, float* scales) {
  for (int j = 0; j < count; j++) scales[j] = scale_of(from + at[j]);
}

#ifdef __AVX512VNNI__
// Integer products of queries with eight keys, summed by `sum_eight`.
template <int kVectors, int kQueries>
ALWAYS_INLINE void multiply_eight(const int8_t* keys, const int64_t* at,
                                  const Prepared<int8_t, kVectors>* queries, i16* sums) {
  __m512i sum[kQueries][8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) {
#pragma GCC unroll 3
    for (int q = 0; q < kQueries; q++) sum[q][j] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 16 * kVectors; i += 64) {
      const __m512i key = load_shifted(keys + at[j] + i, 16 * kVectors - i);
#pragma GCC unroll 3
      for (int q = 0; q < kQueries; q++)
        add_products(sum[q][j], key, _mm512_load_si512(queries[q].values + i));
    }
  }
#pragma GCC unroll 3
  for (int q = 0; q < kQueries; q++) {
    i16 each[8];
    for (int j = 0; j < 8; j++) each[j] = (i16)sum[q][j];
    sums[q] = sum_eight(each);
  }
}

// Sums of products of queries with sixteen keys; calls `between` for each half of these.
template <int kVectors, int kQueries, typename Between>
ALWAYS_INLINE void multiply_tile(const int8_t* keys, const int64_t* at,
                                 const Prepared<int8_t, kVectors>* queries, i16* sums, Between between) {
  constexpr int kAtOnce = kQueries < 3 ? kQueries : 3;
#pragma GCC unroll 2
  for (int from = 0; from < kQueries; from += kAtOnce) {
    constexpr int kLeft = kQueries % kAtOnce == 0 ? kAtOnce : kQueries % kAtOnce;
    i16 halves[2][kAtOnce];
    for (int half = 0; half < 2; half++) {
      if (from + kAtOnce <= kQueries)
        multiply_eight<kVectors, kAtOnce>(keys, at + 8 * half, queries + from, halves[half]);
      else
        multiply_eight<kVectors, kLeft>(keys, at + 8 * half, queries + from, halves[half]);
      if (from == 0) between(8 * half);
    }
    for (int q = from; q < kQueries && q < from + kAtOnce; q++)
      sums[q] = sum_both(halves[0][q - from], halves[1][q - from]) + queries[q].shift;
  }
}
#else
template <int kVectors, int kQueries, typename Between>
ALWAYS_INLINE void multiply_tile(const int8_t* keys, const int64_t* at,
                                 const Prepared<int8_t, kVectors>* queries, i16* sums, Between between) {
  for (int q = 0; q < kQueries; q++)
    for (int j = 0; j < kKeyTile; j++) {
      const int8_t* key = keys + at[j];
      int32_t sum = 0;
      for (int i = 0; i < 16 * kVectors; i++) sum += key[i] * queries[q].values[i];
      sums[q][j] = sum;
    }
  between(0);
  between(8);
}
#endif

// `attend` for int8 keys and values, whose products are sums of integers. Each span asks for the memory
// of the next one, the last for that of the first span of `following`.
template <int kVectors, int kQueries>
void attend_int8(const KVHead<int8_t>& kv, const Query* queries, float scale,
                 const Following<int8_t>& following) {
  constexpr int kSums = SpanValues<kVectors>::kSums;
  Prepared<int8_t, kVectors> query[kQueries];
  SpanValues<kVectors> values;
  MeasuresOfEach<kQueries> measures;
  v16 weighted[kQueries][kSums] = {}, total[kQueries] = {};
  v16* to[kQueries];
  float highest[kQueries];
  const auto [first, stop] = seen_by(queries, kQueries);
  for (int q = 0; q < kQueries; q++) {
    query[q].take(queries[q].from, scale);
    highest[q] = -FLT_MAX;
    to[q] = weighted[q];
  }
  int64_t begin = first / kSpan * kSpan;
  alignas(64) int64_t places[2][kSpan];
  for (int tile = 0; tile < tiles_until(stop, begin); tile++)
    locate_tile(kv, begin + kKeyTile * tile, first, stop, places[0] + kKeyTile * tile);
  for (int span = 0; begin < stop; begin += kSpan, span ^= 1) {
    const int64_t *at = places[span], *next = places[span ^ 1];
    const bool is_last = begin + kSpan >= stop;
    const KVHead<int8_t>& then = is_last ? following.kv : kv;
    const Range seen = is_last ? following.seen : Range{first, stop};
    const int64_t next_begin = is_last ? seen.first / kSpan * kSpan : begin + kSpan;
    const int tiles = tiles_until(stop, begin), next_tiles = tiles_until(seen.stop, next_begin);
    for (int tile = 0; tile < next_tiles; tile++)
      locate_tile(then, next_begin + kKeyTile * tile, seen.first, seen.stop,
                  places[span ^ 1] + kKeyTile * tile);
    const auto ask_for = [&](const int8_t* from, int begun, int ended) INLINED {
      for (int j = begun; j < ended && j < kKeyTile * next_tiles; j++)
        prefetch(from + next[j], 16 * kVectors);
    };
    v16 scores[kQueries][kTiles];
    alignas(64) float scales[2][kSpan] = {};
    collect_scales(kv.keys, at, kKeyTile * tiles, scales[0]);
    for (int tile = 0; tile < kTiles; tile++) {
      i16 sums[kQueries];
      if (tile < tiles)
        multiply_tile<kVectors, kQueries>(
            kv.keys, at + kKeyTile * tile, query, sums,
            [&](int key) INLINED { ask_for(then.keys, kKeyTile * tile + key, kKeyTile * tile + key + 8); });
      for (int q = 0; q < kQueries; q++) {
        const v16 score = __builtin_convertvector(sums[q], v16) * query[q].factor;
        scores[q][tile] = tile < tiles ? hide(score * load(scales[0] + kKeyTile * tile), queries[q],
                                              begin + kKeyTile * tile)
                                       : splat(-INFINITY);
      }
    }
    ask_for(then.keys, kKeyTile * tiles, kSpan);
    collect_scales(kv.values, at, kKeyTile * tiles, scales[1]);
    measures.take(scales[1], nullptr, begin, [&](int q) -> const Query& { return queries[q]; });
    for (int pair = 0; pair < kKeyTile / 2 * tiles; pair++) values.take(kv.values, at, pair);
    weigh_values<kVectors, kQueries>(scores, measures.of, values, tiles, highest, total, to,
                                     [&](int key) INLINED { ask_for(then.values, key, key + 2); });
    ask_for(then.values, kKeyTile * tiles, kSpan);
  }
  for (int q = 0; q < kQueries; q++) end<int8_t, kVectors>(weighted[q], total[q], queries[q].to);
}

#ifdef __AVX512VNNI__  // elsewhere 16 registers of half the size are too few for what follows
// A span as many queries read it: keys turned, so that a row has a lane for each of them; values in
// float32. Row i · kVectors + v has dimension v of lane i, in float32.
template <typename KV, int kVectors>
struct alignas(64) TurnedKeys {
  float rows[16 * kVectors][kSpan];

  ALWAYS_INLINE void take(const KVHead<KV>& kv, const int64_t* at, int tile) {
    v16 key[kVectors][kKeyTile];
    for (int j = 0; j < kKeyTile; j++) {
      v16 part[kVectors];
      load_apart<KV, kVectors>(kv.keys + at[j], part);
      for (int v = 0; v < kVectors; v++) key[v][j] = part[v];
    }
    for (int v = 0; v < kVectors; v++) {
      transpose(key[v]);
      for (int i = 0; i < 16; i++) store(rows[i * kVectors + v] + kKeyTile * tile, key[v][i]);
    }
  }
};

// In int8, each plus 128, a row has four dimensions.
template <int kVectors>
struct alignas(64) TurnedKeys<int8_t, kVectors> {
  int32_t rows[4 * kVectors][kSpan];

  ALWAYS_INLINE void take(const KVHead<int8_t>& kv, const int64_t* at, int tile) {
    for (int i = 0; i < 4 * kVectors; i += 16) {
      v16 key[kKeyTile];
      for (int j = 0; j < kKeyTile; j++)
        key[j] = (v16)load_shifted(kv.keys + at[j] + 4 * i, 16 * kVectors - 4 * i);
      transpose(key);
      for (int row = i; row < 4 * kVectors && row < i + 16; row++)
        memcpy(rows[row] + kKeyTile * tile, &key[row - i], sizeof(v16));
    }
  }
};

template <typename KV, int kVectors>
struct alignas(64) SpanOfMany {
  TurnedKeys<KV, kVectors> keys;
  float values[kSpan][16 * kVectors];

  void lay_out(const KVHead<KV>& kv, int64_t begin, int tiles, int64_t first, int64_t stop) {
    for (int tile = 0; tile < tiles; tile++) {
      int64_t at[kKeyTile];
      for (int j = 0; j < kKeyTile; j++) {
        const int key = kKeyTile * tile + j;
        at[j] = kv.seen_at(begin + key, first, stop);
        v16 part[kVectors];
        load_apart<KV, kVectors>(kv.values + at[j], part);
        for (int v = 0; v < kVectors; v++) store(values[key] + 16 * v, part[v]);
      }
      keys.take(kv, at, tile);
    }
  }
};

template <int kVectors>
struct alignas(64) SpanOfMany<int8_t, kVectors> {
  TurnedKeys<int8_t, kVectors> keys;
  SpanValues<kVectors> values;
  float key_scales[kSpan], value_scales[kSpan];  // zeros behind the last tile
  Measures measures;                             // where all keys are seen

  void lay_out(const KVHead<int8_t>& kv, int64_t begin, int tiles, int64_t first, int64_t stop) {
    int64_t at[kSpan];
    memset(key_scales, 0, sizeof key_scales);
    memset(value_scales, 0, sizeof value_scales);
    for (int tile = 0; tile < tiles; tile++) {
      locate_tile(kv, begin + kKeyTile * tile, first, stop, at + kKeyTile * tile);
      keys.take(kv, at + kKeyTile * tile, tile);
    }
    for (int pair = 0; pair < kKeyTile / 2 * tiles; pair++) values.take(kv.values, at, pair);
    collect_scales(kv.keys, at, kKeyTile * tiles, key_scales);
    collect_scales(kv.values, at, kKeyTile * tiles, value_scales);
    v16 scales[kTiles];
    for (int tile = 0; tile < kTiles; tile++) scales[tile] = load(value_scales + kKeyTile * tile);
    measures.take(scales);
  }
};

template <typename KV, int kVectors>
struct alignas(64) RunningQuery {  // an online softmax between two spans
  Prepared<KV, kVectors> prepared;
  v16 weighted[sums_of<KV>(kVectors)], total;
  const Query* query;
  float highest;
};

// Products of queries with 32 keys from `column` on, summed over the dimensions of `count` lanes from
// `lane` on: the sums of `attend`, in its order, with a lane for each key.
template <typename KV, int kVectors, int kQueries, int lane, int count>
ALWAYS_INLINE void multiply_keys(const float (*keys)[kSpan], int column,
                                 const RunningQuery<KV, kVectors>* queries,
                                 v16 (&sum)[kQueries][2]) {
  if constexpr (count > 1) {
    v16 others[kQueries][2];
    multiply_keys<KV, kVectors, kQueries, lane, count / 2>(keys, column, queries, sum);
    multiply_keys<KV, kVectors, kQueries, lane + count / 2, count / 2>(keys, column, queries, others);
    for (int q = 0; q < kQueries; q++)
      for (int t = 0; t < 2; t++) sum[q][t] += others[q][t];
  } else {
    // nothing is loaded earlier than here: there are no registers to keep it in
    __asm__ volatile("" : : : "memory");
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      const float* row = keys[lane * kVectors + v] + column;
      v16 key[2] = {load(row), load(row + kKeyTile)};
      for (v16& part : key) __asm__("" : "+v"(part));  // loaded once
#pragma GCC unroll 2
      for (int q = 0; q < kQueries; q++) {
        const v16 part = splat(queries[q].prepared.values[16 * v + lane]);
        for (int t = 0; t < 2; t++)
          sum[q][t] = v == 0 ? part * key[t] : fma(part, key[t], sum[q][t]);
      }
    }
  }
}

template <typename KV, int kVectors, int kQueries>
ALWAYS_INLINE void score_keys(const SpanOfMany<KV, kVectors>& span,
                              const RunningQuery<KV, kVectors>* queries, int64_t begin, int tiles,
                              v16 (*scores)[kTiles]) {
  if constexpr (kScaleElements<KV> > 0) {
    // All tiles, seen or not: with a number that is not known here, GCC 12 keeps the sums in memory.
    __m512i sum[kQueries][kTiles];
#pragma GCC unroll 2
    for (int q = 0; q < kQueries; q++)
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; t++) sum[q][t] = _mm512_set1_epi32(queries[q].prepared.shift);
    for (int row = 0; row < 4 * kVectors; row++)
#pragma GCC unroll 2
      for (int q = 0; q < kQueries; q++) {
        int32_t four;
        memcpy(&four, queries[q].prepared.values + 4 * row, sizeof four);
        const __m512i value = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int t = 0; t < kTiles; t++)
          add_products(sum[q][t], _mm512_load_si512(span.keys.rows[row] + kKeyTile * t), value);
      }
#pragma GCC unroll 2
    for (int q = 0; q < kQueries; q++)
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; t++) {
        const v16 score = __builtin_convertvector((i16)sum[q][t], v16) * queries[q].prepared.factor;
        const int column = kKeyTile * t;
        scores[q][t] = score * load(span.key_scales + column);
        if (!sees_all(*queries[q].query, begin)) scores[q][t] = hide(scores[q][t], *queries[q].query, begin + column);
      }
  } else {
    for (int tile = 0; tile < tiles; tile += 2) {
      v16 sum[kQueries][2];
      multiply_keys<KV, kVectors, kQueries, 0, 16>(span.keys.rows, kKeyTile * tile, queries, sum);
      for (int q = 0; q < kQueries; q++)
        for (int t = 0; t < 2; t++)
          scores[q][tile + t] = hide(sum[q][t], *queries[q].query, begin + kKeyTile * (tile + t));
    }
  }
}

// Takes up to kQueries queries through a span; returns how many.
template <typename KV, int kVectors, int kQueries = most_queries<KV>(kVectors)>
int64_t take_through(const SpanOfMany<KV, kVectors>& span, int64_t begin, int tiles, int64_t count,
                     RunningQuery<KV, kVectors>* queries) {
  if constexpr (kQueries > 1) {
    if (count < kQueries)
      return take_through<KV, kVectors, kQueries - 1>(span, begin, tiles, count, queries);
  }
  v16 scores[kQueries][kTiles];
  for (int q = 0; q + 1 < kQueries; q += 2)
    score_keys<KV, kVectors, 2>(span, queries + q, begin, tiles, scores + q);
  if constexpr (kQueries % 2 == 1)
    score_keys<KV, kVectors, 1>(span, queries + kQueries - 1, begin, tiles, scores + kQueries - 1);
  if constexpr (kScaleElements<KV> > 0) {
    float highest[kQueries];
    v16 total[kQueries], *to[kQueries];
    for (int q = 0; q < kQueries; q++) {
      highest[q] = queries[q].highest;
      total[q] = queries[q].total;
      to[q] = queries[q].weighted;
    }
    MeasuresOfEach<kQueries> measures;
    measures.take(span.value_scales, &span.measures, begin,
                  [&](int q) -> const Query& { return *queries[q].query; });
    weigh_values<kVectors, kQueries>(scores, measures.of, span.values, tiles, highest, total, to, [](int) {});
    for (int q = 0; q < kQueries; q++) {
      queries[q].highest = highest[q];
      queries[q].total = total[q];
    }
  } else {
    v16 weighted[kQueries][kVectors];
    alignas(64) float weights[kQueries][kSpan];
    for (int q = 0; q < kQueries; q++) {
      for (int i = 0; i < kVectors; i++) weighted[q][i] = queries[q].weighted[i];
      weigh<kVectors>(scores[q], tiles, queries[q].highest, queries[q].total, weighted[q], weights[q]);
    }
    for (int j = 0; j < kKeyTile * tiles; j++) {
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i++) {
        const v16 value = load(span.values[j] + 16 * i);
#pragma GCC unroll 6
        for (int q = 0; q < kQueries; q++)
          weighted[q][i] = fma(splat(weights[q][j]), value, weighted[q][i]);
      }
    }
    for (int q = 0; q < kQueries; q++)
      for (int i = 0; i < kVectors; i++) queries[q].weighted[i] = weighted[q][i];
  }
  return kQueries;
}

// Attends for many queries that see about the same keys: a span is brought into float32 and turned
// once for all of them. The bits are those of `attend`; a span that a query does not see changes none.
template <typename KV, int kVectors>
void attend_many(const KVHead<KV>& kv, const Query* queries, int64_t count, float scale) {
  thread_local std::vector<SpanOfMany<KV, kVectors>> spans(1);
  thread_local std::vector<RunningQuery<KV, kVectors>> running;
  running.clear();
  running.resize(count);  // zeros
  const auto [first, stop] = seen_by(queries, count);
  for (int64_t q = 0; q < count; q++) {
    running[q].prepared.take(queries[q].from, scale);
    running[q].query = queries + q;
    running[q].highest = -FLT_MAX;
  }
  int64_t begun = 0, ended = count;  // rows stand in order of what they see
  for (int64_t begin = first / kSpan * kSpan; begin < stop; begin += kSpan) {
    const int tiles = tiles_until(stop, begin);
    spans[0].lay_out(kv, begin, tiles, first, stop);
    while (queries[begun].stop <= begin) begun++;
    ended = begun;
    while (ended < count && queries[ended].first < begin + kSpan) ended++;
    for (int64_t q = begun; q < ended;)
      q += take_through<KV, kVectors>(spans[0], begin, tiles, ended - q, running.data() + q);
  }
  for (RunningQuery<KV, kVectors>& r : running) end<KV, kVectors>(r.weighted, r.total, r.query->to);
}

#endif

// Attends for some of `count` queries and returns for how many.
template <typename KV, int kVectors, int kQueries = most_queries<KV>(kVectors)>
int64_t attend_some(int64_t count, const KVHead<KV>& kv, const Query* queries, float scale,
                    const Following<KV>& following) {
#ifdef __AVX512VNNI__
  if constexpr (kQueries == most_queries<KV>(kVectors)) {
    if (count >= kManyQueries) {
      attend_many<KV, kVectors>(kv, queries, count, scale);
      return count;
    }
  }
#endif
  if constexpr (kQueries > 1) {
    if (count < kQueries)
      return attend_some<KV, kVectors, kQueries - 1>(count, kv, queries, scale, following);
  }
  if constexpr (std::is_same_v<KV, int8_t>)
    attend_int8<kVectors, kQueries>(kv, queries, scale, following);
  else
    attend<KV, kVectors, kQueries>(kv, queries, scale);
  return kQueries;
}

// The same for a head size known at run time; 0 if it is none of those built in.
template <typename KV>
int64_t attend_any(int64_t head_dim, int64_t count, const KVHead<KV>& kv, const Query* queries,
                   float scale, const Following<KV>& following) {
  switch (head_dim) {
    case 16: return attend_some<KV, 1>(count, kv, queries, scale, following);
    case 32: return attend_some<KV, 2>(count, kv, queries, scale, following);
    case 48: return attend_some<KV, 3>(count, kv, queries, scale, following);
    case 64: return attend_some<KV, 4>(count, kv, queries, scale, following);
    case 80: return attend_some<KV, 5>(count, kv, queries, scale, following);
    case 96: return attend_some<KV, 6>(count, kv, queries, scale, following);
    case 128: return attend_some<KV, 8>(count, kv, queries, scale, following);
    case 192: return attend_some<KV, 12>(count, kv, queries, scale, following);
    case 256: return attend_some<KV, 16>(count, kv, queries, scale, following);
    default: return 0;
  }
}

inline bool is_built_in(int64_t head_dim) {
  for (const int64_t size : {16, 32, 48, 64, 80, 96, 128, 192, 256})
    if (size == head_dim) return true;
  return false;
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
  const float scale = 1.44269504f / std::sqrt(static_cast<float>(head_dim));  // powers of two are cheaper
  const int block_bits = __builtin_ctzll(block_size);
  const int64_t stored = head_dim + kScaleElements<KV>;
  const auto head_of = [&](int64_t sequence, int64_t kv_head) {
    const int64_t at = kv_head * block_size * stored + kScaleElements<KV>;
    const int64_t* blocks = s.block_tables + sequence * s.table_width;
    return KVHead<KV>{keys + at, values + at, blocks, block_bits, kv_heads * block_size * stored, stored};
  };
  const auto seen_from = [&](int64_t row) {
    const int64_t stop = s.num_keys[row];
    return Range{s.window > 0 && stop > s.window ? stop - s.window : 0, stop};
  };
  const auto behind = [&](int64_t sequence, int64_t kv_head) {
    if (++kv_head == kv_heads) {
      kv_head = 0;
      sequence++;
    }
    if (sequence == s.count || s.row_starts[sequence] == s.row_starts[sequence + 1])
      return Following<KV>{head_of(0, 0), {0, 0}};
    return Following<KV>{head_of(sequence, kv_head), seen_from(s.row_starts[sequence])};
  };
  std::vector<Query> queries;
  for (int64_t sequence = 0; sequence < s.count; sequence++) {
    for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
      queries.clear();
      for (int64_t row = s.row_starts[sequence]; row < s.row_starts[sequence + 1]; row++) {
        const auto [first, stop] = seen_from(row);
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
          const int64_t at = (row * heads + head) * head_dim;
          queries.push_back({query + at, out + at, first, stop});
        }
      }
      const KVHead<KV> kv = head_of(sequence, kv_head);
      const Following<KV> following = behind(sequence, kv_head);
      const int64_t count = static_cast<int64_t>(queries.size());
      for (int64_t at = 0; at < count;) {
        const int64_t done =
            attend_any(head_dim, count - at, kv, queries.data() + at, scale, following);
        if (done == 0) return 0;
        at += done;
      }
    }
  }
  return 1;
}

}  // namespace afd
