// What one core can do at best: reading memory, integer and float multiply-adds in registers.
#include <immintrin.h>

#include <chrono>
#include <cstdint>
#include <cstring>

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

extern "C" {

// Bytes/s of one pass over a buffer.
double read_rate(const uint8_t* data, int64_t bytes) {
  const double begin = now();
  uint64_t total[8] = {};
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    uint64_t part[8];
    __builtin_prefetch(data + i + 8192);  // further than the hardware reads ahead
    memcpy(part, data + i, 64);
    for (int j = 0; j < 8; j++) total[j] += part[j];
  }
  volatile uint64_t sink = total[0] + total[1] + total[2] + total[3] + total[4] + total[5] +
                           total[6] + total[7];
  (void)sink;
  return bytes / (now() - begin);
}

// int8 multiply-adds/s, 0 where there is no VNNI.
double int8_rate() {
#ifdef __AVX512VNNI__
  __m512i sums[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) sums[i] = _mm512_set1_epi32(1);
  const __m512i x = _mm512_set1_epi32(static_cast<int>(now()));
  const int64_t rounds = 4000000;
  const double begin = now();
  for (int64_t n = 0; n < rounds; n++)
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) asm volatile("vpdpbusd %1, %1, %0" : "+v"(sums[i]) : "v"(x));
  const double seconds = now() - begin;
  __m512i all = sums[0];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) all = _mm512_add_epi32(all, sums[i]);
  volatile int sink = _mm512_reduce_add_epi32(all);
  (void)sink;
  return rounds * 16 * 64 / seconds;
#else
  return 0;
#endif
}

// float32 multiply-adds/s.
double float_rate() {
#if defined(__AVX512F__)
  __m512 sums[16];
  for (auto& sum : sums) sum = _mm512_set1_ps(1);
  const __m512 x = _mm512_set1_ps(static_cast<float>(now()) * 1e-20f);
  const int64_t rounds = 4000000, lanes = 16;
  const double begin = now();
  for (int64_t n = 0; n < rounds; n++)
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sums[i] = _mm512_fmadd_ps(sums[i], x, x);
  const double seconds = now() - begin;
  __m512 all = sums[0];
  for (auto& sum : sums) all = _mm512_add_ps(all, sum);
  volatile float sink = _mm512_reduce_add_ps(all);
  (void)sink;
  return rounds * 16 * lanes / seconds;
#else
  return 0;
#endif
}

}  // extern "C"
