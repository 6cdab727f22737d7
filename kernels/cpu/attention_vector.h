/* Vectors of floats for the attention kernels: 16 lanes with AVX-512, 8 with AVX2, else 4 that the compiler
 * maps to what the CPU has (SSE2, NEON) or to scalars. Arithmetic is written with operators; what they can't
 * say is here. */
#ifndef AC_ATTENTION_VECTOR_H
#define AC_ATTENTION_VECTOR_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define AC_LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#define AC_LANES 8
#else
#define AC_LANES 4
#endif
#if AC_LANES > 4
#include <immintrin.h>
#endif

#define AC_INLINE static inline __attribute__((always_inline))
#define AC_UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(4 * AC_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * AC_LANES)));

AC_INLINE vf v_set(float x) { return x - (vf){0}; }
AC_INLINE vf v_load(const float *p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
AC_INLINE void v_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
/* Lanes of a where mask is set (-1), else of b (0). */
AC_INLINE vf v_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

AC_INLINE vf v_max(vf a, vf b) {
#if AC_LANES == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif AC_LANES == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return v_select((vi)(a > b), a, b);
#endif
}

AC_INLINE float v_sum(vf x) {
#if AC_LANES == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int i = 0; i < AC_LANES; i++)
        sum += x[i];
    return sum;
#endif
}

AC_INLINE float v_largest(vf x) {
#if AC_LANES == 16
    return _mm512_reduce_max_ps((__m512)x);
#else
    float largest = x[0];
    for (int i = 1; i < AC_LANES; i++)
        largest = x[i] > largest ? x[i] : largest;
    return largest;
#endif
}

/* out[i] = sum of the lanes of x[i]. */
AC_INLINE void v_sum4(const vf x[4], float out[4]) {
#if AC_LANES >= 8
    __m256 y[4];
    AC_UNROLL
    for (int i = 0; i < 4; i++)
#if AC_LANES == 16
        y[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)x[i]), _mm512_extractf32x8_ps((__m512)x[i], 1));
#else
        y[i] = (__m256)x[i];
#endif
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(y[0], y[1]), _mm256_hadd_ps(y[2], y[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
    for (int i = 0; i < 4; i++)
        out[i] = v_sum(x[i]);
#endif
}

/* e^x for x <= 88, relative error under 3e-7; exactly 0 below -87 (also for -infinity). */
AC_INLINE vf v_exp(vf x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    vi kept = (vi)(x >= v_set(-87.0f));
    x = (vf)((vi)x & kept);
    vf shifted = x * 1.44269504f + magic;
    vf n = shifted - magic;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (vf)((vi)(p * (vf)(((vi)shifted << 23) + 0x3f800000)) & kept);
}

/* tanh: absolute error under 2e-7, relative under 1e-6. */
AC_INLINE vf v_tanh(vf x) {
    vf square = x * x;
    vf small = x * (1.0f + square * (-0.33333333f + square * (0.13333333f - square * 0.053968254f)));
    vf size = (vf)((vi)x & 0x7fffffff);
    vf rest = v_exp(size * -2.0f); /* (1 - e^-2x) / (1 + e^-2x) never overflows */
    vf large = (1.0f - rest) / (1.0f + rest);
    large = (vf)((vi)large | ((vi)x & (vi)v_set(-0.0f)));
    return v_select((vi)(size < v_set(0.2f)), small, large);
}

/* AC_LANES numbers of a cache or an activation, as floats. */
AC_INLINE vf v_load_bf16(const uint16_t *p) {
#if AC_LANES == 16
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif AC_LANES == 8
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    vi x;
    for (int i = 0; i < AC_LANES; i++)
        x[i] = (int32_t)((uint32_t)p[i] << 16);
    return (vf)x;
#endif
}

AC_INLINE vf v_load_u8(const uint8_t *p) {
#if AC_LANES == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif AC_LANES == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vf x;
    for (int i = 0; i < AC_LANES; i++)
        x[i] = p[i];
    return x;
#endif
}

/* Two codes a byte, the even one in the low half. */
AC_INLINE vf v_load_u4(const uint8_t *p) {
#if AC_LANES >= 8
    int64_t raw = 0;
    memcpy(&raw, p, AC_LANES / 2);
    __m128i bytes = _mm_cvtsi64_si128(raw), low = _mm_set1_epi8(15);
    __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(bytes, low), _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
#if AC_LANES == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
#else
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes));
#endif
#else
    vf x;
    for (int i = 0; i < AC_LANES; i++)
        x[i] = p[i / 2] >> (i % 2 * 4) & 15;
    return x;
#endif
}

/* Nearest bfloat16, halves to even; NaN stays NaN. */
AC_INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x)
        return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif
