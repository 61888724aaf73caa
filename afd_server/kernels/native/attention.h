// Attention over paged keys and values, for decoding and prefill alike.
#pragma once

#include <vector>

#include "vectors.h"

namespace afd {

constexpr int kKeyTile = 16;
constexpr int kTiles = 4;  // share a maximum: what is done once for them makes the core wait

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

};

// The hardware does not know which block comes next.
template <typename KV>
void prefetch(const KV* at, int head_dim) {
  for (int i = 0; i < head_dim; i += 64 / static_cast<int>(sizeof(KV))) __builtin_prefetch(at + i);
}

// Attends with an online softmax over spans of 64 keys, in order, each of four tiles. Spans start at
// multiples of 64 and hidden keys weigh exactly nothing, so a query's bits do not depend on the
// others. Tiles behind the last seen key are left out.
template <typename KV, int kVectors, int kQueries>
void attend(const KVHead<KV>& kv, const Query* queries, float scale) {
  constexpr int kHeadDim = 16 * kVectors, kSpan = kTiles * kKeyTile;
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
      v16 largest = scores[q][0];
      for (int tile = 1; tile < tiles; tile++) largest = larger(largest, scores[q][tile]);
      const float span_highest = largest_lane(largest);
      const float peak = span_highest > highest[q] ? span_highest : highest[q];
      v16 sum = {};
      for (int tile = 0; tile < tiles; tile++) {
        v16 weight = exp_nonpositive(scores[q][tile] - peak);
        sum += weight;
        if constexpr (kScaleElements<KV> > 0)
          for (int j = 0; j < kKeyTile; j++) weight[j] *= scale_of(kv.values + at[kKeyTile * tile + j]);
        store(weights[q] + kKeyTile * tile, weight);
      }
      const float shrink = exp_nonpositive(splat(highest[q] - peak))[0];
      total[q] = total[q] * shrink + sum_lanes(sum);
      highest[q] = peak;
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i++) weighted[q][i] *= shrink;
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
