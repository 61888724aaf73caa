// From logits to a token. `kernels/sampling.py` says what must be computed.
#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace afd {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// SplitMix64's finaliser (Steele, Lea and Flood 2014).
inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// The 53 random bits of a token: uniform in (0, 1) is (bits + 0.5) / 2^53.
inline uint64_t token_bits(uint64_t key, uint64_t id) { return mix(id * kGolden + key) >> 11; }

inline double gumbel(uint64_t bits) {
  return -std::log(-std::log((static_cast<double>(bits) + 0.5) * 0x1p-53));
}

struct Best {
  double score = -INFINITY;
  int64_t id = -1;

  void offer(double other, int64_t other_id) {
    if (other > score || (other == score && other_id < id)) {
      score = other;
      id = other_id;
    }
  }
};

inline float highest_logit(const float* logits, int64_t vocab) {
  v16 highest = splat(-FLT_MAX);
  int64_t i = 0;
  for (; i + 16 <= vocab; i += 16) highest = larger(highest, load(logits + i));
  float peak = largest_lane(highest);
  for (; i < vocab; i++) peak = logits[i] > peak ? logits[i] : peak;
  return peak;
}

// The first of the largest logits; it is looked for in the stretch alone that has it.
inline int64_t argmax(const float* logits, int64_t vocab) {
  constexpr int64_t kStretch = 1024;
  float peak = -INFINITY;
  int64_t begin = 0;
  for (int64_t i = 0; i < vocab; i += kStretch) {
    const float highest = highest_logit(logits + i, std::min(kStretch, vocab - i));
    if (highest > peak) peak = highest, begin = i;
  }
  for (int64_t i = begin; i < std::min(begin + kStretch, vocab); i++)
    if (logits[i] == peak) return i;
  return 0;  // nothing but NaN
}

// The argmax of logits / temperature + Gumbel noise over some token ids, or over all if ids is null.
//
// Over all, few tokens can win: as -ln u >= 1 - u, a token's noise is at most -ln(1 - u), so it
// must have 1 - u < e^(score - best). That is tested first, in float with a margin; the rest of
// the arithmetic is done for those that pass.
inline int64_t gumbel_argmax(const float* logits, int64_t vocab, const int64_t* ids, int64_t count,
                             double temperature, uint64_t key) {
  Best best;
  if (ids != nullptr) {
    for (int64_t i = 0; i < count; i++)
      best.offer(logits[ids[i]] / temperature + gumbel(token_bits(key, ids[i])), ids[i]);
    return best.id;
  }
  const int64_t top = argmax(logits, vocab);
  const double peak = logits[top] / temperature;
  best.offer(peak + gumbel(token_bits(key, top)), top);
  const float inverse = static_cast<float>(1.0 / temperature);
  for (int64_t begin = 0; begin < vocab; begin += 16) {
    const int64_t n = std::min<int64_t>(16, vocab - begin);
    v16 scaled = splat(-INFINITY);
    memcpy(&scaled, logits + begin, n * sizeof(float));
    scaled = (scaled - logits[top]) * inverse;
    // a margin of 1e-3 covers the rounding of scores up to thousands below the best
    const float ahead = static_cast<float>(best.score - peak) - 1e-3f;
    const v16 gap = scaled - ahead;
    const v16 bound = exp_nonpositive(gap > 0.0f ? splat(0.0f) : gap);
    float complement[16] = {};
    for (int64_t j = 0; j < n; j++)
      complement[j] = 1.0f - static_cast<float>(token_bits(key, begin + j) >> 29) * 0x1p-24f;
    const i16 passes = (load(complement) - 0x1p-23f < bound * 1.001f);
    if (largest_lane(passes ? splat(1.0f) : splat(0.0f)) == 0.0f) continue;
    for (int64_t j = 0; j < n; j++)
      if (passes[j])
        best.offer(logits[begin + j] / temperature + gumbel(token_bits(key, begin + j)), begin + j);
  }
  return best.id;
}

struct Ranked {
  float logit;
  int64_t id;
  bool operator<(const Ranked& other) const {  // best first, lower ids first among equals
    return logit > other.logit || (logit == other.logit && id < other.id);
  }
};

// Collects the tokens whose logit is at least `cut`, best first.
inline void collect(const float* logits, int64_t vocab, float cut, std::vector<Ranked>& out) {
  out.clear();
  for (int64_t begin = 0; begin < vocab; begin += 16) {
    const int64_t n = std::min<int64_t>(16, vocab - begin);
    if (n == 16 && largest_lane(load(logits + begin)) < cut) continue;
    for (int64_t i = begin; i < begin + n; i++)
      if (logits[i] >= cut) out.push_back({logits[i], i});
  }
  std::sort(out.begin(), out.end());
}

// The sum of e^((logit - peak) / temperature) over the tokens whose logit is at least `cut`.
inline double mass_above(const float* logits, int64_t vocab, float peak, float cut,
                         double temperature) {
  const float inverse = static_cast<float>(1.0 / temperature);
  double total = 0;
  for (int64_t begin = 0; begin < vocab; begin += 16) {
    v16 part = splat(-INFINITY);
    memcpy(&part, logits + begin, std::min<int64_t>(16, vocab - begin) * sizeof(float));
    const v16 masses = exp_nonpositive((part - peak) * inverse);
    total += sum_lanes(part >= cut ? masses : splat(0.0f));
  }
  return total;
}

// Chooses the tokens that min-p, top-k and top-p leave, in that order; best first, lower ids first
// among equals. Returns how many. Only as many tokens as can matter are sorted.
inline int64_t select(const float* logits, int64_t vocab, double temperature, int64_t top_k,
                      double top_p, double min_p, int64_t* ids) {
  const float peak = highest_logit(logits, vocab);
  float lowest = -FLT_MAX;  // what min-p leaves lies above
  if (min_p > 0) lowest = static_cast<float>(peak + temperature * std::log(min_p));
  const bool counted = top_k > 0 && top_k < vocab;
  const double total = counted ? 0.0 : mass_above(logits, vocab, peak, lowest, temperature);
  std::vector<Ranked> kept;
  for (double reach = 8.0;; reach *= 2) {  // further and further below the best
    const float cut = std::max(lowest, static_cast<float>(peak - reach * temperature));
    collect(logits, vocab, cut, kept);
    const bool is_all = cut == lowest || static_cast<int64_t>(kept.size()) == vocab;
    const bool is_enough = counted && static_cast<int64_t>(kept.size()) >= top_k;
    if (counted && !is_enough && !is_all) continue;
    if (is_enough) kept.resize(top_k);
    if (top_p >= 1 && (counted || is_all)) break;
    double wanted = total, before = 0;
    if (counted) {
      wanted = 0;
      for (const Ranked& token : kept) wanted += std::exp((token.logit - peak) / temperature);
    }
    wanted *= top_p;
    size_t num_kept = 0;  // a token stays while those before it have less than is wanted
    while (num_kept < kept.size() && (num_kept == 0 || before < wanted))
      before += std::exp((kept[num_kept++].logit - peak) / temperature);
    if (before < wanted && !is_all && !counted) continue;
    kept.resize(num_kept);
    break;
  }
  for (size_t i = 0; i < kept.size(); i++) ids[i] = kept[i].id;
  return static_cast<int64_t>(kept.size());
}

}  // namespace afd
