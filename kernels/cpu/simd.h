/* Sixteen 32-bit lanes in three variants: AVX-512 (with or without VNNI), AVX2 with FMA, and plain vectors
 * that the compiler lowers to what the CPU has. `vi` is 64 bytes of integers, `vf` is 16 floats. */
#ifndef AC_SIMD_H
#define AC_SIMD_H
#include <stdint.h>
#include <string.h>

#define AC_INLINE static inline __attribute__((always_inline))

AC_INLINE float ac_bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
AC_INLINE uint32_t ac_float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
AC_INLINE float ac_from_bf16(uint16_t value) { return ac_bits_float((uint32_t)value << 16); }

/* Round to nearest even; a NaN stays one. */
AC_INLINE uint16_t ac_to_bf16(float value) {
    uint32_t bits = ac_float_bits(value);
    if (value != value)
        return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Half precision: its exponent and mantissa moved into place and rescaled by 2^112, which also makes normal
 * numbers of subnormal ones. */
AC_INLINE float ac_from_f16(uint16_t value) {
    uint32_t sign = (uint32_t)(value & 0x8000) << 16, rest = (uint32_t)(value & 0x7fff) << 13;
    if (rest >= 0x7c00u << 13)
        return ac_bits_float(sign | 0x7f800000 | rest);
    return ac_bits_float(sign | ac_float_bits(ac_bits_float(rest) * 0x1p112f));
}

/* ---------------------------------------------------------------------------------------------------------- */
#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(AC_PLAIN)
#include <immintrin.h>
#define AC_AVX512
#define AC_VARIANT "avx512"
typedef __m512i vi;
typedef __m512 vf;

AC_INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
AC_INLINE void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
AC_INLINE vi vi_set1(int32_t a) { return _mm512_set1_epi32(a); }
AC_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
AC_INLINE vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
AC_INLINE vi vi_shl(vi a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
AC_INLINE vi vi_bytes(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
AC_INLINE vi vi_shift(vi a, int n) {
    return n > 0 ? _mm512_srli_epi16(a, (unsigned)n) : n < 0 ? _mm512_slli_epi16(a, (unsigned)-n) : a;
}
/* Bits `mask` of every byte after a shift to the right by n (to the left when negative). */
AC_INLINE vi vi_field(vi a, int n, int mask) { return _mm512_and_si512(vi_shift(a, n), _mm512_set1_epi8((char)mask)); }
/* The same, joined with `low`. */
AC_INLINE vi vi_join(vi low, vi a, int n, int mask) {
    return _mm512_ternarylogic_epi32(low, vi_shift(a, n), _mm512_set1_epi8((char)mask), 0xf8);
}
/* acc + for each lane the product of its 4 unsigned codes (of `bits` bits) with the 4 signed bytes at x. */
AC_INLINE vi vi_dot(const int bits, vi acc, vi codes, vi x) {
#ifdef __AVX512VNNI__
    (void)bits;
    return _mm512_dpbusd_epi32(acc, codes, x);
#else
    const vi one = _mm512_set1_epi16(1);
    if (bits < 8)
        return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), one));
    /* 255 * 127 * 2 does not fit in 16 bits: by nibbles */
    vi low = _mm512_maddubs_epi16(vi_field(codes, 0, 15), x), high = _mm512_maddubs_epi16(vi_field(codes, 4, 15), x);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(low, one));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(high, _mm512_set1_epi16(16)));
#endif
}
/* 4x4 transposes of 32-bit lanes inside of each run of 4 lanes. */
AC_INLINE void vi_transpose4(vi a[4]) {
    vi p = _mm512_unpacklo_epi32(a[0], a[1]), q = _mm512_unpackhi_epi32(a[0], a[1]);
    vi r = _mm512_unpacklo_epi32(a[2], a[3]), s = _mm512_unpackhi_epi32(a[2], a[3]);
    a[0] = _mm512_unpacklo_epi64(p, r), a[1] = _mm512_unpackhi_epi64(p, r);
    a[2] = _mm512_unpacklo_epi64(q, s), a[3] = _mm512_unpackhi_epi64(q, s);
}
AC_INLINE vf vf_set1(float a) { return _mm512_set1_ps(a); }
AC_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
AC_INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
AC_INLINE vf vf_int(vi a) { return _mm512_cvtepi32_ps(a); }
AC_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
AC_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
AC_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
AC_INLINE vf vf_max_abs(vf a, vf b) { return _mm512_max_ps(a, _mm512_abs_ps(b)); }
AC_INLINE float vf_max(vf a) { return _mm512_reduce_max_ps(a); }
AC_INLINE float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
AC_INLINE vf vf_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
AC_INLINE vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
AC_INLINE void vf_store_bf16(uint16_t *p, vf a) {
#ifdef __AVX512BF16__
    __m256bh packed = _mm512_cvtneps_pbh(a);
    memcpy(p, &packed, 32);
#else
    vi bits = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), vi_set1(1));
    vi up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, vi_set1(0x7fff)));
    vi nan = _mm512_or_si512(bits, vi_set1(1 << 22));
    up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), nan);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
#endif
}
/* Round 16 floats to int8, store them, give their integers. */
AC_INLINE vi vf_store_int8(int8_t *p, vf a) {
    vi rounded = _mm512_cvtps_epi32(a);
    _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(rounded));
    return rounded;
}
AC_INLINE int32_t vi_sum(vi a) { return _mm512_reduce_add_epi32(a); }

/* ---------------------------------------------------------------------------------------------------------- */
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(AC_PLAIN)
#include <immintrin.h>
#define AC_AVX2
#define AC_VARIANT "avx2"
typedef struct {
    __m256i l, h; /* lanes 0-7 and 8-15 */
} vi;
typedef struct {
    __m256 l, h;
} vf;

AC_INLINE vi vi_load(const void *p) {
    const __m256i *q = p;
    return (vi){_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
AC_INLINE void vi_store(void *p, vi a) {
    _mm256_storeu_si256(p, a.l);
    _mm256_storeu_si256((__m256i *)p + 1, a.h);
}
AC_INLINE vi vi_set1(int32_t a) { return (vi){_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
AC_INLINE vi vi_add(vi a, vi b) { return (vi){_mm256_add_epi32(a.l, b.l), _mm256_add_epi32(a.h, b.h)}; }
AC_INLINE vi vi_mul(vi a, vi b) { return (vi){_mm256_mullo_epi32(a.l, b.l), _mm256_mullo_epi32(a.h, b.h)}; }
AC_INLINE vi vi_shl(vi a, int n) { return (vi){_mm256_slli_epi32(a.l, n), _mm256_slli_epi32(a.h, n)}; }
AC_INLINE vi vi_bytes(const uint8_t *p) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return (vi){_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
AC_INLINE __m256i ac_shift256(__m256i a, int n) {
    return n > 0 ? _mm256_srli_epi16(a, n) : n < 0 ? _mm256_slli_epi16(a, -n) : a;
}
AC_INLINE vi vi_field(vi a, int n, int mask) {
    const __m256i m = _mm256_set1_epi8((char)mask);
    return (vi){_mm256_and_si256(ac_shift256(a.l, n), m), _mm256_and_si256(ac_shift256(a.h, n), m)};
}
AC_INLINE vi vi_join(vi low, vi a, int n, int mask) {
    vi field = vi_field(a, n, mask);
    return (vi){_mm256_or_si256(low.l, field.l), _mm256_or_si256(low.h, field.h)};
}
AC_INLINE __m256i ac_dot256(const int bits, __m256i acc, __m256i codes, __m256i x) {
#ifdef __AVXVNNI__
    (void)bits;
    return _mm256_dpbusd_avx_epi32(acc, codes, x);
#else
    const __m256i one = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(15);
    if (bits < 8)
        return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), one));
    /* 255 * 127 * 2 does not fit in 16 bits: by nibbles */
    __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, nibble), x);
    __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble), x);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low, one));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
#endif
}
AC_INLINE vi vi_dot(const int bits, vi acc, vi codes, vi x) {
    return (vi){ac_dot256(bits, acc.l, codes.l, x.l), ac_dot256(bits, acc.h, codes.h, x.h)};
}
AC_INLINE void ac_transpose256(__m256i *a, __m256i *b, __m256i *c, __m256i *d) {
    __m256i p = _mm256_unpacklo_epi32(*a, *b), q = _mm256_unpackhi_epi32(*a, *b);
    __m256i r = _mm256_unpacklo_epi32(*c, *d), s = _mm256_unpackhi_epi32(*c, *d);
    *a = _mm256_unpacklo_epi64(p, r), *b = _mm256_unpackhi_epi64(p, r);
    *c = _mm256_unpacklo_epi64(q, s), *d = _mm256_unpackhi_epi64(q, s);
}
AC_INLINE void vi_transpose4(vi a[4]) {
    ac_transpose256(&a[0].l, &a[1].l, &a[2].l, &a[3].l);
    ac_transpose256(&a[0].h, &a[1].h, &a[2].h, &a[3].h);
}
AC_INLINE vf vf_set1(float a) { return (vf){_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
AC_INLINE vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
AC_INLINE void vf_store(float *p, vf a) {
    _mm256_storeu_ps(p, a.l);
    _mm256_storeu_ps(p + 8, a.h);
}
AC_INLINE vf vf_int(vi a) { return (vf){_mm256_cvtepi32_ps(a.l), _mm256_cvtepi32_ps(a.h)}; }
AC_INLINE vf vf_add(vf a, vf b) { return (vf){_mm256_add_ps(a.l, b.l), _mm256_add_ps(a.h, b.h)}; }
AC_INLINE vf vf_mul(vf a, vf b) { return (vf){_mm256_mul_ps(a.l, b.l), _mm256_mul_ps(a.h, b.h)}; }
AC_INLINE vf vf_fma(vf a, vf b, vf c) {
    return (vf){_mm256_fmadd_ps(a.l, b.l, c.l), _mm256_fmadd_ps(a.h, b.h, c.h)};
}
AC_INLINE vf vf_max_abs(vf a, vf b) {
    const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return (vf){_mm256_max_ps(a.l, _mm256_and_ps(b.l, m)), _mm256_max_ps(a.h, _mm256_and_ps(b.h, m))};
}
AC_INLINE float vf_max(vf a) {
    __m256 both = _mm256_max_ps(a.l, a.h);
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
AC_INLINE float vf_sum(vf a) {
    __m256 both = _mm256_add_ps(a.l, a.h);
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_shuffle_ps(m, m, 1)));
}
AC_INLINE __m256 ac_bf16x8(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
AC_INLINE vf vf_load_bf16(const uint16_t *p) { return (vf){ac_bf16x8(p), ac_bf16x8(p + 8)}; }
AC_INLINE vf vf_load_f16(const uint16_t *p) {
    const __m128i *q = (const __m128i *)p;
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
AC_INLINE __m256i ac_round256(__m256 a) { /* bf16 in the low halves of 32-bit lanes */
    __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(1 << 22));
    up = _mm256_blendv_epi8(up, nan, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
    return _mm256_srli_epi32(up, 16);
}
AC_INLINE void vf_store_bf16(uint16_t *p, vf a) {
    __m256i packed = _mm256_packus_epi32(ac_round256(a.l), ac_round256(a.h));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
AC_INLINE vi vf_store_int8(int8_t *p, vf a) {
    vi rounded = {_mm256_cvtps_epi32(a.l), _mm256_cvtps_epi32(a.h)};
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(rounded.l, rounded.h), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)p, bytes);
    return rounded;
}
AC_INLINE int32_t vi_sum(vi a) {
    __m256i both = _mm256_add_epi32(a.l, a.h);
    __m128i m = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}

/* ---------------------------------------------------------------------------------------------------------- */
#else
#include <math.h>
#define AC_VARIANT "plain"
typedef int32_t vi __attribute__((vector_size(64), aligned(16)));
typedef uint32_t ac_u32 __attribute__((vector_size(64), aligned(16)));
typedef uint16_t ac_u16 __attribute__((vector_size(64), aligned(16)));
typedef int16_t ac_i16 __attribute__((vector_size(64), aligned(16)));
typedef uint8_t ac_u8 __attribute__((vector_size(64), aligned(16)));
typedef float vf __attribute__((vector_size(64), aligned(16)));

AC_INLINE vi vi_load(const void *p) {
    vi a;
    memcpy(&a, p, 64);
    return a;
}
AC_INLINE void vi_store(void *p, vi a) { memcpy(p, &a, 64); }
AC_INLINE vi vi_set1(int32_t a) { return a - (vi){0}; }
AC_INLINE vi vi_add(vi a, vi b) { return a + b; }
AC_INLINE vi vi_mul(vi a, vi b) { return a * b; }
AC_INLINE vi vi_shl(vi a, int n) { return (vi)((ac_u32)a << n); }
AC_INLINE vi vi_bytes(const uint8_t *p) {
    vi a;
    for (int i = 0; i < 16; i++)
        a[i] = p[i];
    return a;
}
AC_INLINE vi vi_field(vi a, int n, int mask) {
    ac_u16 b = n > 0 ? (ac_u16)a >> n : n < 0 ? (ac_u16)a << -n : (ac_u16)a;
    return (vi)(b & (uint16_t)(mask * 257));
}
AC_INLINE vi vi_join(vi low, vi a, int n, int mask) { return low | vi_field(a, n, mask); }
/* Products of a code and a byte fit in 16 bits: multiply even and odd bytes there, then widen. */
AC_INLINE vi vi_dot(const int bits, vi acc, vi codes, vi x) {
    (void)bits;
    ac_i16 even = (ac_i16)((ac_u16)codes & 255) * (((ac_i16)x << 8) >> 8);
    ac_i16 odd = (ac_i16)((ac_u16)codes >> 8) * ((ac_i16)x >> 8);
    acc += (((vi)even << 16) >> 16) + ((vi)even >> 16);
    return acc + (((vi)odd << 16) >> 16) + ((vi)odd >> 16);
}
AC_INLINE void vi_transpose4(vi a[4]) {
    vi b[4];
    for (int i = 0; i < 4; i++)
        for (int lane = 0; lane < 16; lane++)
            b[i][lane] = a[lane & 3][(lane & ~3) + i];
    memcpy(a, b, sizeof b);
}
AC_INLINE vf vf_set1(float a) { return a - (vf){0}; }
AC_INLINE vf vf_load(const float *p) {
    vf a;
    memcpy(&a, p, 64);
    return a;
}
AC_INLINE void vf_store(float *p, vf a) { memcpy(p, &a, 64); }
AC_INLINE vf vf_int(vi a) { return __builtin_convertvector(a, vf); }
AC_INLINE vf vf_add(vf a, vf b) { return a + b; }
AC_INLINE vf vf_mul(vf a, vf b) { return a * b; }
AC_INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
AC_INLINE vf vf_max_abs(vf a, vf b) {
    vf c = (vf)((vi)b & 0x7fffffff);
    vi more = a > c;
    return (vf)(((vi)a & more) | ((vi)c & ~more));
}
AC_INLINE float vf_max(vf a) {
    float most = a[0];
    for (int i = 1; i < 16; i++)
        most = a[i] > most ? a[i] : most;
    return most;
}
AC_INLINE float vf_sum(vf a) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            a[i] += a[i + half];
    return a[0];
}
AC_INLINE vf vf_load_bf16(const uint16_t *p) {
    vf a;
    for (int i = 0; i < 16; i++)
        a[i] = ac_from_bf16(p[i]);
    return a;
}
AC_INLINE vf vf_load_f16(const uint16_t *p) {
    vf a;
    for (int i = 0; i < 16; i++)
        a[i] = ac_from_f16(p[i]);
    return a;
}
AC_INLINE void vf_store_bf16(uint16_t *p, vf a) {
    for (int i = 0; i < 16; i++)
        p[i] = ac_to_bf16(a[i]);
}
AC_INLINE vi vf_store_int8(int8_t *p, vf a) {
    vi rounded;
    for (int i = 0; i < 16; i++)
        p[i] = (int8_t)(rounded[i] = a[i] == a[i] ? (int32_t)rintf(a[i]) : 0);
    return rounded;
}
AC_INLINE int32_t vi_sum(vi a) {
    int32_t sum = 0;
    for (int i = 0; i < 16; i++)
        sum += a[i];
    return sum;
}
#endif
#endif
