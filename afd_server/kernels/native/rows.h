// What is done to each row by itself: norms, activations, rotary embedding, KV writes.
#pragma once

#include <vector>

#include "vectors.h"

namespace afd {

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

inline void silu_mul_row(const float* gate_up, int64_t width, float limit, float* out) {
  for (int64_t i = 0; i < width; i += 16) {
    const int64_t n = width - i;
    store_some(out + i, silu_mul(load_some(gate_up + i, n), load_some(gate_up + width + i, n), limit), n);
  }
}

inline void rotate(const float* from, const float* angles, int64_t head_dim, float* to) {
  const int64_t half = head_dim / 2;
  const float *cosines = angles, *sines = angles + head_dim;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t n = half - i;
    const v16 a = load_some(from + i, n), b = load_some(from + half + i, n);
    store_some(to + i, a * load_some(cosines + i, n) - b * load_some(sines + i, n), n);
    store_some(to + half + i,
               b * load_some(cosines + half + i, n) + a * load_some(sines + half + i, n), n);
  }
}

// Where a head of a slot is in blocks [blocks, kv_heads, block_size], in heads.
inline int64_t place(int64_t slot, int64_t head, int64_t kv_heads, int64_t block_size) {
  return (slot / block_size * kv_heads + head) * block_size + slot % block_size;
}

template <typename KV>
void rope_write(const float* qkv, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim,
                const float* table, const int64_t* positions, const int64_t* slots, KV* keys,
                KV* values, int64_t block_size, float* query) {
  const int64_t stored = head_dim + kScaleElements<KV>;
  std::vector<float> rotated(head_dim);
  for (int64_t row = 0; row < rows; row++) {
    const float* angles = table + positions[row] * 2 * head_dim;
    for (int64_t head = 0; head < heads; head++, qkv += head_dim, query += head_dim)
      rotate(qkv, angles, head_dim, query);
    for (int64_t head = 0; head < kv_heads; head++, qkv += head_dim) {
      const int64_t at = place(slots[row], head, kv_heads, block_size) * stored;
      rotate(qkv, angles, head_dim, rotated.data());
      store_rounded(keys + at, rotated.data(), head_dim);
      store_rounded(values + at, qkv + kv_heads * head_dim, head_dim);
    }
    qkv += kv_heads * head_dim;
  }
}

template <typename KV>
void write_rows(const float* rows_in, int64_t stride, const int64_t* slots, int64_t rows,
                int64_t kv_heads, int64_t head_dim, KV* blocks, int64_t block_size) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t head = 0; head < kv_heads; head++)
      store_rounded(blocks + place(slots[row], head, kv_heads, block_size) *
                                 (head_dim + kScaleElements<KV>),
                    rows_in + row * stride + head * head_dim, head_dim);
}

}  // namespace afd
