// Attention over paged keys and values, for decoding and prefill alike.
#pragma once

#include <vector>

#include "vectors.h"

namespace afd {

// For what takes addresses of local arrays: compiled apart it would keep them out of registers.
#define ALWAYS_INLINE __attribute__((always_inline)) inline

constexpr int kKeyTile = 16;
constexpr int kTiles = 4;  // share a maximum: what is done once for them makes the core wait
constexpr int kSpan = kTiles * kKeyTile;
constexpr int64_t kManyQueries = 24;  // from so many on it pays to turn keys

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

inline int tiles_until(int64_t stop, int64_t begin) {
  const int64_t seen = (stop - begin + kKeyTile - 1) / kKeyTile;
  return seen < kTiles ? static_cast<int>(seen) : kTiles;
}

// The hardware does not know which block comes next.
template <typename KV>
void prefetch(const KV* at, int head_dim) {
  for (int i = 0; i < head_dim; i += 64 / static_cast<int>(sizeof(KV))) __builtin_prefetch(at + i);
}

// Weighs the values of a span by a query's scores: one step of an online softmax.
template <int kVectors>
ALWAYS_INLINE void weigh(const v16* scores, int tiles, float& highest, float& total, v16* weighted,
                         float* weights) {
  v16 largest = scores[0];
  for (int tile = 1; tile < tiles; tile++) largest = larger(largest, scores[tile]);
  const float span_highest = largest_lane(largest);
  const float peak = span_highest > highest ? span_highest : highest;
  v16 sum = {};
  for (int tile = 0; tile < tiles; tile++) {
    const v16 weight = exp_nonpositive(scores[tile] - peak);
    sum += weight;
    store(weights + kKeyTile * tile, weight);
  }
  const float shrink = exp_nonpositive(splat(highest - peak))[0];
  total = total * shrink + sum_lanes(sum);
  highest = peak;
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) weighted[i] *= shrink;
}

template <typename KV, int kVectors>
ALWAYS_INLINE void end(v16* weighted, float total, float* to) {
  put_together<KV, kVectors>(weighted);
  for (int i = 0; i < kVectors; i++)  // adding 0 makes a zero's sign the same in any company
    store(to + 16 * i, weighted[i] / total + 0.0f);
}

// Scores of sixteen keys from `begin` on; what the query does not see is hidden.
ALWAYS_INLINE v16 hide(v16 score, const Query& query, int64_t begin) {
  const v16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const v16 position = lanes + static_cast<float>(begin - query.first);
  const float visible = static_cast<float>(query.stop - query.first);
  score = position < visible ? score : splat(-INFINITY);
  return position < 0.0f ? splat(-INFINITY) : score;
}

// Loads a query as `load_apart` has keys.
template <typename KV, int kVectors>
ALWAYS_INLINE void load_query(const float* from, float scale, float* to) {
  v16 part[kVectors];
  for (int i = 0; i < kVectors; i++) part[i] = load(from + 16 * i) * scale;
  take_apart<KV, kVectors>(part);
  for (int i = 0; i < kVectors; i++) store(to + 16 * i, part[i]);
}

// Attends with an online softmax over spans of 64 keys, in order, each of four tiles. Spans start at
// multiples of 64 and hidden keys weigh exactly nothing, so a query's bits do not depend on the
// others. Tiles behind the last seen key are left out. (What `attend_many` has functions for stands
// here in full: with them GCC 12 makes this an eighth slower.)
template <typename KV, int kVectors, int kQueries>
void attend(const KVHead<KV>& kv, const Query* queries, float scale) {
  constexpr int kHeadDim = 16 * kVectors;
  alignas(64) float query[kQueries][kHeadDim];
  v16 weighted[kQueries][kVectors] = {};
  float highest[kQueries], total[kQueries] = {};
  int64_t first = queries[0].first, stop = queries[0].stop;
  for (int q = 0; q < kQueries; q++) {
    v16 part[kVectors];
    for (int i = 0; i < kVectors; i++) part[i] = load(queries[q].from + 16 * i) * scale;
    take_apart<KV, kVectors>(part);
    for (int i = 0; i < kVectors; i++) store(query[q] + 16 * i, part[i]);
    highest[q] = -FLT_MAX;
    first = queries[q].first < first ? queries[q].first : first;
    stop = queries[q].stop > stop ? queries[q].stop : stop;
  }
  int64_t next[kSpan];
  const auto locate = [&](int64_t begin) {
    for (int j = 0; j < kSpan; j++) {
      // outside of what is seen, any seen key will do: it is hidden below, or never used
      const int64_t position = begin + j < stop ? begin + j : stop - 1;
      next[j] = kv.at(position < first ? first : position);
    }
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
      v16 product[kQueries][kKeyTile];
      for (int j = 0; j < kKeyTile; j++) {
        const int64_t place = at[kKeyTile * tile + j];
        v16 key[kVectors], sum[kQueries];
        load_apart<KV, kVectors>(kv.keys + place, key);
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; i++) {
#pragma GCC unroll 6
          for (int q = 0; q < kQueries; q++) {
            const v16 part = load(query[q] + 16 * i);
            sum[q] = i == 0 ? part * key[i] : fma(part, key[i], sum[q]);
          }
        }
        prefetch(kv.values + place, kHeadDim);  // a few at a time: the core waits for few lines at once
#pragma GCC unroll 6
        for (int q = 0; q < kQueries; q++) product[q][j] = sum[q];
      }
      v16 key_scales;
      if constexpr (kScaleElements<KV> > 0)
        for (int j = 0; j < kKeyTile; j++) key_scales[j] = scale_of(kv.keys + at[kKeyTile * tile + j]);
#pragma GCC unroll 6
      for (int q = 0; q < kQueries; q++) {
        const v16 position = lanes + static_cast<float>(begin + kKeyTile * tile - queries[q].first);
        const float visible = static_cast<float>(queries[q].stop - queries[q].first);
        v16 score = sum_each(product[q]);
        if constexpr (kScaleElements<KV> > 0) score *= key_scales;
        score = position < visible ? score : splat(-INFINITY);
        scores[q][tile] = position < 0.0f ? splat(-INFINITY) : score;
      }
    }
    alignas(64) float weights[kQueries][kSpan];
    for (int q = 0; q < kQueries; q++) {
      weigh<kVectors>(scores[q], tiles, highest[q], total[q], weighted[q], weights[q]);
      if constexpr (kScaleElements<KV> > 0)
        for (int j = 0; j < kKeyTile * tiles; j++) weights[q][j] *= scale_of(kv.values + at[j]);
    }
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
  for (int q = 0; q < kQueries; q++) {
    put_together<KV, kVectors>(weighted[q]);
    for (int i = 0; i < kVectors; i++)  // adding 0 makes a zero's sign the same in any company
      store(queries[q].to + 16 * i, weighted[q][i] / total[q] + 0.0f);
  }
}

#ifdef __AVX512F__  // elsewhere 16 registers of half the size are too few for what follows
// A span as many queries read it, in float32: dimension v of lane i of all keys is row i · kVectors + v.
template <int kVectors>
struct alignas(64) SpanOfMany {
  float keys[16 * kVectors][kSpan];
  float values[kSpan][16 * kVectors];
  float key_scales[kSpan], value_scales[kSpan];

  template <typename KV>
  void lay_out(const KVHead<KV>& kv, int64_t begin, int tiles, int64_t first, int64_t stop) {
    for (int tile = 0; tile < tiles; tile++) {
      v16 key[kVectors][kKeyTile];
      for (int j = 0; j < kKeyTile; j++) {
        const int64_t place = kv.seen_at(begin + kKeyTile * tile + j, first, stop);
        v16 part[kVectors];
        load_apart<KV, kVectors>(kv.keys + place, part);
        for (int v = 0; v < kVectors; v++) key[v][j] = part[v];
        load_apart<KV, kVectors>(kv.values + place, part);
        for (int v = 0; v < kVectors; v++) store(values[kKeyTile * tile + j] + 16 * v, part[v]);
        if constexpr (kScaleElements<KV> > 0) {
          key_scales[kKeyTile * tile + j] = scale_of(kv.keys + place);
          value_scales[kKeyTile * tile + j] = scale_of(kv.values + place);
        }
      }
      for (int v = 0; v < kVectors; v++) {
        transpose(key[v]);
        for (int i = 0; i < 16; i++) store(keys[i * kVectors + v] + kKeyTile * tile, key[v][i]);
      }
    }
  }
};

template <int kVectors>
struct alignas(64) RunningQuery {  // an online softmax between two spans
  float scaled[16 * kVectors], weighted[16 * kVectors];
  const Query* query;
  float highest, total;
};

// Products of queries with 32 keys from `column` on, summed over the dimensions of `count` lanes from
// `lane` on: the sums of `attend`, in its order, with a lane for each key.
template <int kVectors, int kQueries, int lane, int count>
ALWAYS_INLINE void multiply_keys(const float (*keys)[kSpan], int column,
                                 const RunningQuery<kVectors>* queries,
                                 v16 (&sum)[kQueries][2]) {
  if constexpr (count > 1) {
    v16 others[kQueries][2];
    multiply_keys<kVectors, kQueries, lane, count / 2>(keys, column, queries, sum);
    multiply_keys<kVectors, kQueries, lane + count / 2, count / 2>(keys, column, queries, others);
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
        const v16 part = splat(queries[q].scaled[16 * v + lane]);
        for (int t = 0; t < 2; t++)
          sum[q][t] = v == 0 ? part * key[t] : fma(part, key[t], sum[q][t]);
      }
    }
  }
}

template <typename KV, int kVectors, int kQueries>
ALWAYS_INLINE void score_keys(const SpanOfMany<kVectors>& span,
                              const RunningQuery<kVectors>* queries, int64_t begin, int tiles,
                              v16 (*scores)[kTiles]) {
  for (int tile = 0; tile < tiles; tile += 2) {
    v16 sum[kQueries][2];
    multiply_keys<kVectors, kQueries, 0, 16>(span.keys, kKeyTile * tile, queries, sum);
    for (int q = 0; q < kQueries; q++)
      for (int t = 0; t < 2; t++) {
        const int column = kKeyTile * (tile + t);
        if constexpr (kScaleElements<KV> > 0) sum[q][t] *= load(span.key_scales + column);
        scores[q][tile + t] = hide(sum[q][t], *queries[q].query, begin + column);
      }
  }
}

// Takes up to kQueries queries through a span; returns how many.
template <typename KV, int kVectors, int kQueries = most_queries(kVectors)>
int64_t take_through(const SpanOfMany<kVectors>& span, int64_t begin, int tiles, int64_t count,
                     RunningQuery<kVectors>* queries) {
  if constexpr (kQueries > 1) {
    if (count < kQueries)
      return take_through<KV, kVectors, kQueries - 1>(span, begin, tiles, count, queries);
  }
  v16 scores[kQueries][kTiles], weighted[kQueries][kVectors];
  alignas(64) float weights[kQueries][kSpan];
  for (int q = 0; q + 1 < kQueries; q += 2)
    score_keys<KV, kVectors, 2>(span, queries + q, begin, tiles, scores + q);
  if constexpr (kQueries % 2 == 1)
    score_keys<KV, kVectors, 1>(span, queries + kQueries - 1, begin, tiles, scores + kQueries - 1);
  for (int q = 0; q < kQueries; q++) {
    for (int i = 0; i < kVectors; i++) weighted[q][i] = load(queries[q].weighted + 16 * i);
    weigh<kVectors>(scores[q], tiles, queries[q].highest, queries[q].total, weighted[q], weights[q]);
    if constexpr (kScaleElements<KV> > 0)
      for (int j = 0; j < kKeyTile * tiles; j++) weights[q][j] *= span.value_scales[j];
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
    for (int i = 0; i < kVectors; i++) store(queries[q].weighted + 16 * i, weighted[q][i]);
  return kQueries;
}

// Attends for many queries that see about the same keys: a span is brought into float32 and turned
// once for all of them. The bits are those of `attend`; a span that a query does not see changes none.
template <typename KV, int kVectors>
void attend_many(const KVHead<KV>& kv, const Query* queries, int64_t count, float scale) {
  thread_local std::vector<SpanOfMany<kVectors>> spans(1);
  thread_local std::vector<RunningQuery<kVectors>> running;
  running.assign(count, {});
  int64_t first = queries[0].first, stop = queries[0].stop;
  for (int64_t q = 0; q < count; q++) {
    load_query<KV, kVectors>(queries[q].from, scale, running[q].scaled);
    running[q].query = queries + q;
    running[q].highest = -FLT_MAX;
    first = queries[q].first < first ? queries[q].first : first;
    stop = queries[q].stop > stop ? queries[q].stop : stop;
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
  for (RunningQuery<kVectors>& r : running) {
    v16 weighted[kVectors];
    for (int i = 0; i < kVectors; i++) weighted[i] = load(r.weighted + 16 * i);
    end<KV, kVectors>(weighted, r.total, r.query->to);
  }
}

#endif

// Attends for some of `count` queries and returns for how many.
template <typename KV, int kVectors, int kQueries = most_queries(kVectors)>
int64_t attend_some(int64_t count, const KVHead<KV>& kv, const Query* queries, float scale) {
#ifdef __AVX512F__
  if constexpr (kQueries == most_queries(kVectors)) {
    if (count >= kManyQueries) {
      attend_many<KV, kVectors>(kv, queries, count, scale);
      return count;
    }
  }
#endif
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
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  const int block_bits = __builtin_ctzll(block_size);
  const int64_t stored = head_dim + kScaleElements<KV>;
  std::vector<Query> queries;
  for (int64_t sequence = 0; sequence < s.count; sequence++) {
    for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
      const int64_t at = kv_head * block_size * stored + kScaleElements<KV>;
      const KVHead<KV> kv{keys + at,
                          values + at,
                          s.block_tables + sequence * s.table_width,
                          block_bits,
                          kv_heads * block_size * stored,
                          stored};
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

}  // namespace afd
