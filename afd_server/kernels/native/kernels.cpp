// The measured CPU path. `kernels/reference.py` and `kernels/quant.py` say what it must compute.
//
// One source, compiled once for each instruction set (see hatch_build.py). Every reduction has a
// fixed order and multiplies and adds are fused only where `fma` says so (-ffp-contract=off), so
// all builds of this file give the same bits, and a row's bits depend on that row alone.
//
// Plain C functions on raw pointers, called through ctypes: no Python and no torch headers.
// Buffers are owned by the caller, row-major and contiguous. Nothing here starts a thread.

#include "attention.h"
#include "products.h"
#include "rows.h"
#include "sampling.h"

using namespace afd;

// Calls with a value of what keys and values are stored as: 0 float32, 1 bfloat16, 2 int8.
template <typename Call>
auto with_format(int32_t format, Call call) {
  if (format == 2) return call(int8_t{});
  return format == 1 ? call(bf16{}) : call(float{});
}

extern "C" {

// Raised with every change of what a function below takes or gives: another library is refused.
int32_t afd_interface() { return 8; }

// Quantises rows [rows, width] to [rows, row_bytes(width)].
void afd_quantise(const float* x, int64_t rows, int64_t width, uint8_t* out) {
  for (int64_t row = 0; row < rows; row++)
    quantise_row(x + row * width, width, out + row * row_bytes(width));
}

// y[rows, columns] = x · weightᵀ with quantised rows and int8 weights, packed by `kernels/cpu.py`.
void afd_linear_int8(const uint8_t* x, int64_t rows, int64_t groups, const uint8_t* weight,
                     const float* scales, int64_t columns, float* y) {
  thread_local Panels panels;
  lay_out(x, rows, groups, panels);
  multiply(panels, {weight, scales, groups}, columns, y, columns);
}

// The same for a weight that is known before its rows come. `kernels/cpu.py` mirrors the struct.
struct Product {
  int64_t groups, columns;
  const uint8_t* weight;
  const float* scales;
};

void afd_product_int8(const Product* p, const uint8_t* x, int64_t rows, float* y) {
  afd_linear_int8(x, rows, p->groups, p->weight, p->scales, p->columns, y);
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

// Attention of queries [rows, heads, head_dim] over paged keys and values; block_size is a power of
// two. Returns 0 if head_dim is none of those built in; then nothing was written.
int32_t afd_paged_attention(const float* query, int64_t heads, int64_t head_dim, const void* keys,
                            const void* values, int32_t format, int64_t block_size,
                            int64_t kv_heads, int64_t sequences, const int64_t* row_starts,
                            const int64_t* num_keys, const int64_t* block_tables,
                            int64_t table_width, int64_t window, float* out) {
  const Sequences s{sequences, row_starts, num_keys, block_tables, table_width, window};
  return with_format(format, [&](auto kv) {
    using KV = const decltype(kv);
    return attend_all(query, heads, head_dim, static_cast<KV*>(keys), static_cast<KV*>(values),
                      block_size, kv_heads, s, out);
  });
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

// out[rows, width] = silu(gate) · up of rows that hold both, gate first; `limit` clamps both.
void afd_silu_mul(const float* gate_up, int64_t rows, int64_t width, float limit, float* out) {
  for (int64_t row = 0; row < rows; row++)
    silu_mul_row(gate_up + row * 2 * width, width, limit, out + row * width);
}

// The same, quantised.
void afd_silu_mul_quantise(const float* gate_up, int64_t rows, int64_t width, float limit,
                           uint8_t* out) {
  std::vector<float> product(width);
  for (int64_t row = 0; row < rows; row++) {
    silu_mul_row(gate_up + row * 2 * width, width, limit, product.data());
    quantise_row(product.data(), width, out + row * row_bytes(width));
  }
}

// A column shard of one FFN: out[rows, hidden] = down · (silu(gate · x) · (up · x)), of quantised
// rows. It is made of two halves of its columns, as even as whole groups can be, each with a sum of
// its own: whoever computes them, out is the first plus the second. `kernels/cpu.py` mirrors the
// struct.
struct SwiGLU {
  int64_t groups, inner, hidden;
  const uint8_t *gate_up, *down;
  const float *gate_up_scales, *down_scales;
  double limit;

  // Where the second half begins; an FFN whose halves would begin within a block has no second.
  int64_t middle() const {
    return inner % kColumns == 0 ? (num_groups(inner) + 1) / 2 * kGroup : inner;
  }
  bool has_second() const { return middle() < inner; }
};

static void compute_half(const SwiGLU& ffn, const Panels& x, bool is_second, float* out) {
  thread_local std::vector<float> both;
  thread_local std::vector<uint8_t> product;
  thread_local Panels panels;
  const int64_t rows = x.tiles.rows, first = is_second ? ffn.middle() : 0;
  const int64_t columns = is_second ? ffn.inner - first : std::min(ffn.middle(), ffn.inner);
  const Weight gate_up{ffn.gate_up, ffn.gate_up_scales, ffn.groups};
  const Weight down{ffn.down, ffn.down_scales, num_groups(ffn.inner)};
  const auto limit = static_cast<float>(ffn.limit);
  both.resize(rows * 2 * columns);
  product.resize(rows * row_bytes(columns));
  if (x.in_pairs() && columns % kColumns == 0) {
    const Weight gate = gate_up.from(first, 0), up = gate_up.from(ffn.inner + first, 0);
    multiply_gated(x, gate, up, columns, limit, both.data());
    afd_quantise(both.data(), rows, columns, product.data());
  } else {
    if (columns == ffn.inner) {
      multiply(x, gate_up, 2 * columns, both.data(), 2 * columns);
    } else {
      multiply(x, gate_up.from(first, 0), columns, both.data(), 2 * columns);
      multiply(x, gate_up.from(ffn.inner + first, 0), columns, both.data() + columns, 2 * columns);
    }
    afd_silu_mul_quantise(both.data(), rows, columns, limit, product.data());
  }
  lay_out(product.data(), rows, num_groups(columns), panels);
  multiply(panels, down.from(0, first / kGroup), ffn.hidden, out, ffn.hidden);
}

void afd_swiglu_int8(const SwiGLU* ffn, const uint8_t* x, int64_t rows, float* out) {
  thread_local std::vector<float> second;
  thread_local Panels panels;
  lay_out(x, rows, ffn->groups, panels);
  compute_half(*ffn, panels, false, out);
  if (!ffn->has_second()) return;
  second.resize(rows * ffn->hidden);
  compute_half(*ffn, panels, true, second.data());
  for (int64_t i = 0; i < rows * ffn->hidden; i++) out[i] += second[i];
}

// One half by itself.
void afd_swiglu_first_int8(const SwiGLU* ffn, const uint8_t* x, int64_t rows, float* out) {
  thread_local Panels panels;
  lay_out(x, rows, ffn->groups, panels);
  compute_half(*ffn, panels, false, out);
}

void afd_swiglu_second_int8(const SwiGLU* ffn, const uint8_t* x, int64_t rows, float* out) {
  thread_local Panels panels;
  lay_out(x, rows, ffn->groups, panels);
  compute_half(*ffn, panels, true, out);
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
                       const int64_t* slots, void* keys, void* values, int64_t block_size,
                       int32_t format, float* query) {
  with_format(format, [&](auto kv) {
    using KV = decltype(kv);
    rope_write(qkv, rows, heads, kv_heads, head_dim, table, positions, slots,
               static_cast<KV*>(keys), static_cast<KV*>(values), block_size, query);
  });
}

// One layer up to its FFN, with the kernels above: norm and quantise; queries, keys and values;
// rotation and KV write; attention; projection; norm and quantise. x and delta (which may be null)
// are added before the first norm, what was attended to before the second; the sum goes to
// `total`[rows, hidden], which may be x, what was normed to `out`. `kernels/cpu.py` mirrors the
// structs. Returns 0 as afd_paged_attention does.
struct GQA {
  int64_t heads, kv_heads, head_dim, hidden, window;
  const uint8_t *qkv, *output;
  const float *qkv_scales, *output_scales, *rope, *norm_before, *norm_after;
  double eps;
};

struct KVBlocks {
  void *keys, *values;
  int64_t format, block_size;
};

struct Seen {  // of the rows of a micro-batch, the same for all layers of a KV group
  int64_t sequences, table_width;
  const int64_t *positions, *slots, *row_starts, *num_keys, *block_tables;
};

int32_t afd_gqa_int8(const GQA* layer, const float* x, const float* delta, int64_t rows,
                     const KVBlocks* kv, const Seen* seen, float* total, uint8_t* out) {
  if (!is_built_in(layer->head_dim)) return 0;
  thread_local std::vector<float> qkv, query, attended, projected;
  thread_local std::vector<uint8_t> prepared;
  const int64_t width = layer->heads * layer->head_dim, hidden = layer->hidden;
  const int64_t columns = width + 2 * layer->kv_heads * layer->head_dim;
  const int64_t widest = hidden > width ? hidden : width;
  const auto format = static_cast<int32_t>(kv->format);
  const auto eps = static_cast<float>(layer->eps);
  qkv.resize(rows * columns);
  query.resize(rows * width);
  attended.resize(rows * width);
  projected.resize(rows * hidden);
  prepared.resize(rows * row_bytes(widest));
  afd_add_norm_quantise(x, delta, layer->norm_before, rows, hidden, eps, total, prepared.data());
  afd_linear_int8(prepared.data(), rows, num_groups(hidden), layer->qkv, layer->qkv_scales,
                  columns, qkv.data());
  afd_rope_write_kv(qkv.data(), rows, layer->heads, layer->kv_heads, layer->head_dim, layer->rope,
                    seen->positions, seen->slots, kv->keys, kv->values, kv->block_size, format,
                    query.data());
  afd_paged_attention(query.data(), layer->heads, layer->head_dim, kv->keys, kv->values, format,
                      kv->block_size, layer->kv_heads, seen->sequences, seen->row_starts,
                      seen->num_keys, seen->block_tables, seen->table_width, layer->window,
                      attended.data());
  afd_quantise(attended.data(), rows, width, prepared.data());
  afd_linear_int8(prepared.data(), rows, num_groups(width), layer->output, layer->output_scales,
                  hidden, projected.data());
  afd_add_norm_quantise(delta == nullptr ? x : total, projected.data(), layer->norm_after, rows,
                        hidden, eps, total, out);
  return 1;
}

// Stores rows [kv_heads, head_dim] at flat slots of the blocks.
void afd_write_rows(const float* rows_in, int64_t stride, const int64_t* slots, int64_t rows,
                    int64_t kv_heads, int64_t head_dim, void* blocks, int64_t block_size,
                    int32_t format) {
  with_format(format, [&](auto kv) {
    write_rows(rows_in, stride, slots, rows, kv_heads, head_dim,
               static_cast<decltype(kv)*>(blocks), block_size);
  });
}

// The id of the highest logit, the lowest among equals.
int64_t afd_argmax(const float* logits, int64_t vocab) { return argmax(logits, vocab); }

// The argmax of logits / temperature + Gumbel noise over `count` token ids, or all if ids is null.
int64_t afd_gumbel_argmax(const float* logits, int64_t vocab, const int64_t* ids, int64_t count,
                          double temperature, uint64_t key) {
  return gumbel_argmax(logits, vocab, ids, count, temperature, key);
}

// Writes the ids that min-p, top-k and top-p leave to ids[vocab], best first; returns how many.
int64_t afd_select(const float* logits, int64_t vocab, double temperature, int64_t top_k,
                   double top_p, double min_p, int64_t* ids) {
  return select(logits, vocab, temperature, top_k, top_p, min_p, ids);
}

}  // extern "C"
