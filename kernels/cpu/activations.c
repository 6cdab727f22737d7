#include "activations.h"

#include "linear.h"
#include "pool.h"
#include "simd.h"

#include <math.h>
#include <stdlib.h>

/* Weights go into the products as unsigned bytes, because that is what the instructions take: int8 codes plus
 * 128, 4-bit codes minus their zero point plus 16. The sum of the activations times that is subtracted again.
 * All of it is exact: sums wrap around in 32 bits and the true result fits (k is at most 65536).
 *
 * Every group of features is padded to whole vectors of 64, with zeros in the activations, so that no vector
 * holds two scales. A tile is TILE_M tokens by TILE_N rows of the weight, in registers. Blocks of weight rows
 * are sized to stay in the second-level cache while all tokens pass by. */

#if defined(AC_AVX512)
enum { TILE_M = 6, GROUP_TILE_M = 3, TILE_N = 4 };
#else
enum { TILE_M = 2, GROUP_TILE_M = 2, TILE_N = 2 };
#endif
enum { VECTOR = 64, BLOCK_BYTES = 1 << 16, KEPT_BYTES = 16 << 20 };
#define SMALLEST 1e-30f
#define UNROLL _Pragma("GCC unroll 16")

/* What simd.h lacks. */
#if defined(AC_AVX512)
AC_INLINE vi flip(vi a) { return _mm512_xor_si512(a, _mm512_set1_epi8((char)0x80)); }
AC_INLINE vi lane0(int32_t a) { return _mm512_maskz_set1_epi32(1, a); }
#elif defined(AC_AVX2)
AC_INLINE vi flip(vi a) {
    const __m256i top = _mm256_set1_epi8((char)0x80);
    return (vi){_mm256_xor_si256(a.l, top), _mm256_xor_si256(a.h, top)};
}
AC_INLINE vi lane0(int32_t a) {
    return (vi){_mm256_inserti128_si256(_mm256_setzero_si256(), _mm_cvtsi32_si128(a), 0), _mm256_setzero_si256()};
}
#else
AC_INLINE vi flip(vi a) { return a ^ vi_set1((int32_t)0x80808080); }
AC_INLINE vi lane0(int32_t a) { return (vi){a}; }
#endif
/* acc += products of the unsigned bytes `codes` (of so many bits) and the signed bytes `x`. As an instruction,
 * because GCC 12 copies accumulators before and after its builtin. LOAD_ONCE: it would also repeat a load for
 * every product. */
#if defined(AC_AVX512) && defined(__AVX512VNNI__)
#define DOT(bits, acc, codes, x) __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x))
#define LOAD_ONCE(a) __asm__("" : "+v"(a))
#else
#define DOT(bits, acc, codes, x) ((acc) = vi_dot(bits, acc, codes, x))
#define LOAD_ONCE(a) ((void)0)
#endif

typedef struct {
    const ac_a8 *a;
    int64_t groups, width, padded; /* groups in a row; bytes of one in vectors; bytes of a row */
    int64_t tokens;                /* in a tile, at most TILE_M or GROUP_TILE_M */
    int64_t block;                 /* rows of the weight that are unpacked together */
    int8_t *q;                     /* [tiles, padded / 64, tokens, 64]: a tile's vectors lie in the order of use */
    int32_t *sums;                 /* [m, groups]: the sum of q times -128 or -16 */
    float *x_scale;                /* [m] */
    float *row;                    /* [threads, row_floats]: a row as floats, then as codes */
    uint8_t *codes;                /* [threads, block, padded], null when the weight is read in place */
    float *scale;                  /* [threads, block, groups], beside codes */
    int64_t row_floats;
} job;

static int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

static int32_t offset_of(const ac_a8 *a) { return a->bits == 8 ? 128 : 16; }

/* ---- activations ---- */

/* One row as floats; the bits of its largest magnitude (NaN is above infinity, and both above numbers). */
static uint32_t widen(const ac_a8 *a, int64_t m, float *restrict f) {
    if (a->x_type == AC_BF16) {
        const uint16_t *restrict x = (const uint16_t *)a->x + m * a->x_stride;
        for (int64_t i = 0; i < a->k; i++)
            f[i] = ac_from_bf16(x[i]);
    } else {
        memcpy(f, (const float *)a->x + m * a->x_stride, (size_t)a->k * 4);
    }
    uint32_t most = 0;
    for (int64_t i = 0; i < a->k; i++) {
        uint32_t bits = ac_float_bits(f[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most;
}

/* Round to nearest even: adding 1.5 * 2^23 leaves the integer in the low bits of the sum. */
AC_INLINE int8_t to_int8(float value) {
    return (int8_t)((int32_t)ac_float_bits(value + 12582912.0f) - 0x4b400000);
}

static void quantize_row(const job *j, int64_t m, float *restrict f) {
    const ac_a8 *a = j->a;
    uint32_t most = widen(a, m, f);
    float factor, largest = ac_bits_float(most);
    if (a->x_scale) {
        j->x_scale[m] = most > 0x7f800000 ? NAN : *a->x_scale;
        factor = 1.0f / *a->x_scale;
    } else {
        largest = largest > SMALLEST ? largest : SMALLEST;
        j->x_scale[m] = most >= 0x7f800000 ? NAN : largest / 127.0f;
        factor = 127.0f / largest;
    }
    for (int64_t i = 0; i < a->k; i++) {
        float scaled = f[i] * factor;
        scaled = scaled > 127.0f ? 127.0f : scaled;
        f[i] = scaled < -127.0f ? -127.0f : scaled;
    }
    int8_t *restrict q = (int8_t *)(f + up(a->k, 16));
    for (int64_t g = 0; g < j->groups; g++, q += j->width) {
        const float *restrict part = f + g * a->group;
        int64_t count = a->k - g * a->group < a->group ? a->k - g * a->group : a->group;
        int32_t sum = 0;
        for (int64_t i = 0; i < count; i++)
            q[i] = to_int8(part[i]);
        memset(q + count, 0, (size_t)(j->width - count));
        for (int64_t i = 0; i < count; i++)
            sum += q[i];
        j->sums[m * j->groups + g] = -offset_of(a) * sum;
    }
    q -= j->padded;
    int8_t *to = j->q + (m / j->tokens * j->tokens * j->padded) + m % j->tokens * VECTOR;
    for (int64_t k = 0; k < j->padded; k += VECTOR)
        memcpy(to + k * j->tokens, q + k, VECTOR);
}

/* ---- weights ---- */

static float scale_at(const ac_a8 *a, int64_t index) {
    if (a->scale_type == AC_BF16)
        return ac_from_bf16(((const uint16_t *)a->scale)[index]);
    if (a->scale_type == AC_F16)
        return ac_from_f16(((const uint16_t *)a->scale)[index]);
    return ((const float *)a->scale)[index];
}

/* `count` nibbles (rounded up to even) as bytes, plus `shift`. */
static void unpack(const uint8_t *restrict from, uint8_t *restrict to, int64_t count, uint8_t shift) {
    int64_t i = 0;
#if defined(AC_AVX512)
    const __m256i mask = _mm256_set1_epi8(15);
    const __m512i more = _mm512_set1_epi8((char)shift);
    for (; i + 64 <= count; i += 64) {
        __m256i pair = _mm256_loadu_si256((const __m256i *)(from + i / 2));
        __m512i low = _mm512_cvtepu8_epi16(_mm256_and_si256(pair, mask));
        __m512i high = _mm512_cvtepu8_epi16(_mm256_and_si256(_mm256_srli_epi16(pair, 4), mask));
        _mm512_storeu_si512(to + i, _mm512_add_epi8(_mm512_or_si512(low, _mm512_slli_epi16(high, 8)), more));
    }
#endif
    for (; i < count; i += 2) {
        to[i] = (uint8_t)((from[i / 2] & 15) + shift);
        to[i + 1] = (uint8_t)((from[i / 2] >> 4) + shift);
    }
}

/* Row n of the weight as padded groups of bytes, and its scales. */
static void unpack_row(const job *j, int64_t n, uint8_t *to, float *scale) {
    const ac_a8 *a = j->a;
    const uint8_t *from = (const uint8_t *)a->w + n * a->w_stride;
    for (int64_t g = 0; g < j->groups; g++)
        scale[g] = scale_at(a, n * j->groups + g);
    if (a->bits == 8) {
        memcpy(to, from, (size_t)a->k);
        return;
    }
    for (int64_t g = 0; g < j->groups; g++) {
        int64_t start = g * a->group, count = a->k - start < a->group ? a->k - start : a->group;
        int zero = a->zero ? a->zero[n * j->groups + g] : 8;
        unpack(from + start / 2, to + g * j->width, count, (uint8_t)(offset_of(a) - zero));
    }
}

/* ---- products ---- */

/* Tiles leave their lanes in memory, so that what comes after does not disturb the registers of the products. */
typedef union {
    int32_t i[TILE_M][4][16];
    float f[TILE_M][4][16];
} lanes;
typedef uint32_t u4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef float f4 __attribute__((vector_size(16)));
typedef uint16_t h4 __attribute__((vector_size(8)));

/* Write y[m, n .. n+count-1]. */
AC_INLINE void put(const ac_a8 *a, int64_t m, int64_t n, int count, f4 value) {
    int64_t at = m * a->n + n;
    if (a->bias) {
        f4 bias = {0};
        memcpy(&bias, a->bias + n, (size_t)count * 4);
        value += bias;
    }
    if (a->x_type == AC_F32) {
        memcpy((float *)a->y + at, &value, (size_t)count * 4);
        return;
    }
    u4 bits = (u4)value, nan = (u4)(value != value);
    u4 rounded = bits + 0x7fff + (bits >> 16 & 1);
    h4 half = __builtin_convertvector((((bits | 1 << 22) & nan) | (rounded & ~nan)) >> 16, h4);
    memcpy((uint16_t *)a->y + at, &half, (size_t)count * 2);
}

/* Sums of 16 lanes in each of 4 vectors, scaled and written. */
AC_INLINE void finish_token(const job *j, int64_t m, int64_t n, int count, const int32_t (*lane)[16], f4 scale) {
    vi a[4] = {vi_load(lane[0]), vi_load(lane[1]), vi_load(lane[2]), vi_load(lane[3])};
    vi_transpose4(a);
    if (j->a->bits == 8) {
        u4 part[4];
        vi_store(part, vi_add(vi_add(a[0], a[1]), vi_add(a[2], a[3])));
        /* modulo 2^32: on its way the sum may pass through numbers that don't fit */
        i4 sum = (i4)(part[0] + part[1] + part[2] + part[3] + (uint32_t)j->sums[m]);
        put(j->a, m, n, count, __builtin_convertvector(sum, f4) * j->x_scale[m] * scale);
    } else {
        f4 part[16], sum = {0};
        for (int r = 0; r < 4; r++)
            vi_store(part + 4 * r, a[r]);
        for (int i = 0; i < 16; i++)
            sum += part[i];
        put(j->a, m, n, count, sum * j->x_scale[m]);
    }
}
static void finish(const job *j, int64_t m, int tokens, int64_t n, int count, const lanes *lane,
                   const float *const s[TILE_N]) {
    f4 scale = {*s[0], *s[1 % TILE_N], *s[2 % TILE_N], *s[3 % TILE_N]};
    for (int i = 0; i < tokens; i++)
        if (count == 4)
            finish_token(j, m + i, n, 4, lane->i[i], scale);
        else
            finish_token(j, m + i, n, count, lane->i[i], scale);
}

/* Tokens m .. m+MM-1 by the weight rows at w (int8). */
AC_INLINE void tile(const int MM, const job *j, int64_t m, const uint8_t *const w[TILE_N], lanes *lane) {
    vi acc[TILE_M][TILE_N];
    UNROLL for (int i = 0; i < MM; i++) UNROLL for (int r = 0; r < TILE_N; r++) acc[i][r] = vi_set1(0);
    const int8_t *q = j->q + m * j->padded;
    for (int64_t k = 0; k < j->padded; k += VECTOR) {
        vi codes[TILE_N];
        UNROLL for (int r = 0; r < TILE_N; r++) {
            codes[r] = flip(vi_load(w[r] + k));
            if (MM <= 2) /* the memory sets the time: fetch the next tile's rows */
                __builtin_prefetch(w[r] + k + TILE_N * j->a->w_stride);
        }
        UNROLL for (int i = 0; i < MM; i++) {
            vi x = vi_load(q + k * j->tokens + i * VECTOR);
            LOAD_ONCE(x);
            UNROLL for (int r = 0; r < TILE_N; r++) DOT(8, acc[i][r], codes[r], x);
        }
    }
    UNROLL for (int i = 0; i < MM; i++) UNROLL for (int r = 0; r < TILE_N; r++) vi_store(lane->i[i][r], acc[i][r]);
}

/* The same with a scale a group, and w as unsigned bytes below 32; a group has STEPS vectors (0: any number). */
AC_INLINE void group_tile(const int MM, const int STEPS, const job *j, int64_t m, const uint8_t *const w[TILE_N],
                          const float *const scale[TILE_N], lanes *lane) {
    vf sum[GROUP_TILE_M][TILE_N];
    UNROLL for (int i = 0; i < MM; i++) UNROLL for (int r = 0; r < TILE_N; r++) sum[i][r] = vf_set1(0);
    const int8_t *q = j->q + m * j->padded;
    const int64_t width = STEPS ? STEPS * VECTOR : j->width;
    for (int64_t g = 0; g < j->groups; g++) {
        vi acc[GROUP_TILE_M][TILE_N];
        UNROLL for (int i = 0; i < MM; i++) UNROLL for (int r = 0; r < TILE_N; r++) {
            acc[i][r] = lane0(j->sums[(m + i) * j->groups + g]);
            LOAD_ONCE(acc[i][r]);
        }
        for (int64_t k = g * width; k < (g + 1) * width; k += VECTOR) {
            vi codes[TILE_N];
            UNROLL for (int r = 0; r < TILE_N; r++) {
                codes[r] = vi_load(w[r] + k);
                LOAD_ONCE(codes[r]);
            }
            UNROLL for (int i = 0; i < MM; i++) {
                vi x = vi_load(q + k * j->tokens + i * VECTOR);
                LOAD_ONCE(x);
                UNROLL for (int r = 0; r < TILE_N; r++) DOT(5, acc[i][r], codes[r], x);
            }
        }
        UNROLL for (int r = 0; r < TILE_N; r++) {
            vf s = vf_set1(scale[r][g]);
            UNROLL for (int i = 0; i < MM; i++) sum[i][r] = vf_fma(vf_int(acc[i][r]), s, sum[i][r]);
        }
    }
    UNROLL for (int i = 0; i < MM; i++) UNROLL for (int r = 0; r < TILE_N; r++) vf_store(lane->f[i][r], sum[i][r]);
}

#define GROUP_TILE(MM)                                              \
    j->width == VECTOR       ? group_tile(MM, 1, j, m, w, s, &lane) \
    : j->width == 2 * VECTOR ? group_tile(MM, 2, j, m, w, s, &lane) \
                             : group_tile(MM, 0, j, m, w, s, &lane)

/* Tokens m .. m+tokens-1 by the weight rows n .. n+count-1. What is missing in a tile is computed as a copy of
 * its last row and dropped. `codes` and `scales` hold the unpacked rows from `n` on, or are null. */
static void run_tile(const job *j, int64_t m, int tokens, int64_t n, int count, const uint8_t *codes,
                     const float *scales) {
    const ac_a8 *a = j->a;
    const uint8_t *w[TILE_N];
    const float *s[TILE_N];
    for (int i = 0; i < TILE_N; i++) {
        int row = i < count ? i : count - 1;
        w[i] = codes ? codes + row * j->padded : (const uint8_t *)a->w + (n + row) * a->w_stride;
        s[i] = scales ? scales + row * j->groups : (const float *)a->scale + n + row;
    }
    lanes lane;
    if (a->bits == 8) {
        switch (tokens) {
        case 1: tile(1, j, m, w, &lane); break;
        case 2: tile(2, j, m, w, &lane); break;
#if defined(AC_AVX512)
        case 3: tile(3, j, m, w, &lane); break;
        case 4: tile(4, j, m, w, &lane); break;
        case 5: tile(5, j, m, w, &lane); break;
        case 6: tile(6, j, m, w, &lane); break;
#endif
        }
    } else {
        switch (tokens) {
        case 1: GROUP_TILE(1); break;
        case 2: GROUP_TILE(2); break;
#if defined(AC_AVX512)
        case 3: GROUP_TILE(3); break;
#endif
        }
    }
    finish(j, m, tokens, n, count, &lane, s);
}

static void body(void *context, int thread, int threads) {
    const job *j = context;
    const ac_a8 *a = j->a;
    int64_t first, last;
    ac_share(a->m, 1, thread, threads, &first, &last);
    for (int64_t m = first; m < last; m++)
        quantize_row(j, m, j->row + thread * j->row_floats);
    ac_barrier(threads);

    uint8_t *codes = j->codes ? j->codes + thread * j->block * j->padded : NULL;
    float *scales = j->codes ? j->scale + thread * j->block * j->groups : NULL;
    const int64_t tokens = j->tokens;
    ac_share(a->n, TILE_N, thread, threads, &first, &last);
    for (int64_t start = first; start < last; start += j->block) {
        int64_t end = start + j->block < last ? start + j->block : last;
        for (int64_t n = start; codes && n < end; n++)
            unpack_row(j, n, codes + (n - start) * j->padded, scales + (n - start) * j->groups);
        for (int64_t m = 0; m < a->m; m += tokens)
            for (int64_t n = start; n < end; n += TILE_N) {
                const int rows = (int)(a->m - m < tokens ? a->m - m : tokens);
                const int count = (int)(end - n < TILE_N ? end - n : TILE_N);
                run_tile(j, m, rows, n, count, codes ? codes + (n - start) * j->padded : NULL,
                         scales ? scales + (n - start) * j->groups : NULL);
            }
    }
}

/* ---- memory ---- */

/* Scratch of the calling thread, kept for the next call unless it is large. */
static _Thread_local struct {
    void *memory;
    int64_t bytes;
} kept;

static uint8_t *scratch(int64_t bytes) {
    if (bytes > kept.bytes) {
        free(kept.memory);
        kept.memory = aligned_alloc(64, (size_t)up(bytes, 64));
        kept.bytes = kept.memory ? bytes : 0;
    }
    return kept.memory;
}

static void release(void) {
    if (kept.bytes > KEPT_BYTES) {
        free(kept.memory);
        kept.memory = NULL;
        kept.bytes = 0;
    }
}

/* Cut `memory` into the arrays of the job (sizes only when it is null); the bytes that it takes. */
static int64_t place(job *j, uint8_t *memory, int threads) {
    const ac_a8 *a = j->a;
    const int64_t unpacked = a->bits == 4 || a->k % VECTOR || a->scale_type != AC_F32;
    const int64_t sums = up(a->m, j->tokens) * j->padded;
    const int64_t x_scale = sums + up(a->m * j->groups * 4, 64);
    const int64_t row = x_scale + up(a->m * 4, 64);
    const int64_t scale = row + threads * j->row_floats * 4;
    const int64_t codes = scale + (unpacked ? up(threads * j->block * j->groups * 4, 64) : 0);
    if (memory) {
        j->q = (int8_t *)memory;
        j->sums = (int32_t *)(memory + sums);
        j->x_scale = (float *)(memory + x_scale);
        j->row = (float *)(memory + row);
        j->scale = (float *)(memory + scale);
        j->codes = unpacked ? memory + codes : NULL;
    }
    return codes + (unpacked ? threads * j->block * j->padded : 0);
}

int ac_a8_linear(const ac_a8 *a, int threads) {
    job j = {.a = a};
    if (threads > AC_MAX_THREADS)
        threads = AC_MAX_THREADS;
    j.groups = (a->k + a->group - 1) / a->group;
    j.width = up(a->group, VECTOR);
    j.padded = j.groups * j.width;
    const int64_t most = a->bits == 8 ? TILE_M : GROUP_TILE_M;
    j.tokens = a->m < most ? a->m : most;
    j.row_floats = up(a->k, 16) + j.padded / 4;
    j.block = a->m <= GROUP_TILE_M ? TILE_N : up(BLOCK_BYTES / j.padded + 1, TILE_N);
    uint8_t *memory = scratch(place(&j, NULL, threads));
    if (!memory)
        return -1;
    place(&j, memory, threads);
    ac_region(threads, body, &j);
    release();
    return 0;
}

/* ---- e4m3 ---- */

typedef struct {
    const uint8_t *from;
    void *to;
    int64_t count, type;
} widening;

/* The bits of a float: exponents are 120 apart; below 2^-6 a number is a multiple of 2^-9. */
AC_INLINE uint32_t e4m3_bits(uint32_t byte) {
    uint32_t rest = byte & 127;
    uint32_t normal = (rest << 20) + (120u << 23), small = ac_float_bits((float)(int32_t)rest * 0x1p-9f);
    uint32_t number = rest < 8 ? small : normal;
    return (rest == 127 ? 0x7fc00000 : number) | (byte & 128) << 24;
}

static void widen_share(void *context, int thread, int threads) {
    const widening *j = context;
    const uint8_t *restrict from = j->from;
    int64_t first, last;
    ac_share(j->count, 4096, thread, threads, &first, &last);
    if (j->type == AC_BF16) {
        uint16_t *restrict to = j->to;
        for (int64_t i = first; i < last; i++)
            to[i] = (uint16_t)(e4m3_bits(from[i]) >> 16);
    } else {
        uint32_t *restrict to = j->to;
        for (int64_t i = first; i < last; i++)
            to[i] = e4m3_bits(from[i]);
    }
}

void ac_e4m3_widen(const uint8_t *from, void *to, int64_t count, int64_t type, int threads) {
    widening j = {from, to, count, type};
    ac_region(threads, widen_share, &j);
}
