/* One block of a cache's tokens for the query heads that share a key head: scores, running softmax, weighted
 * sum of the values. A key is read from memory once for all heads of the group. Scale and minimum of quantized
 * entries are folded into scores and weights, so codes are never expanded in memory. */
#ifndef AC_ATTENTION_BLOCK_H
#define AC_ATTENTION_BLOCK_H
#include "attention.h"
#include "attention_vector.h"

enum { TOKENS = 64 }; /* of a block */

#if defined(__AVX512VNNI__) && AC_LANES == 16
#define INTEGER_KEYS 1 /* u8 codes times queries of 16 bits, in two int8 halves */
#else
#define INTEGER_KEYS 0
#endif

static int64_t ceil_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t row_bytes(int64_t bits, int64_t dim) { return bits * dim / 8; }

/* One call's view: queries of one group, prepared, and the running softmax of each. */
typedef struct {
    int64_t dim, padded, groups;
    float softcap;
    float *q;            /* [groups, padded], times the scale */
    int8_t *halves;      /* [groups, 2, padded]: high and low part of the integer queries, in the codes' order */
    float *q_step;       /* [groups]: of the integer queries */
    float *q_sum;        /* [groups]: sum over the features, for the keys' minimum */
    float *p;            /* [groups, TOKENS]: scores, then weights */
    float *state;        /* [groups, padded + 2]: maximum, sum, weighted sum of the values */
    const uint8_t *next; /* rows that are needed after the present ones */
    int64_t next_bytes;  /* of one of these rows */
} group;

/* AC_LANES elements of a row from element d on. */
AC_INLINE vf load(const int bits, const uint8_t *row, int64_t d) {
    const uint8_t *p = row + d * bits / 8;
    if (bits == AC_KV_F32)
        return v_load((const float *)p);
    if (bits == AC_KV_BF16)
        return v_load_bf16((const uint16_t *)p);
    return bits == AC_KV_INT8 ? v_load_u8(p) : v_load_u4(p);
}

/* The last, fewer ones: what lies behind the row is not read and counts as 0. */
AC_INLINE vf load_rest(const int bits, const uint8_t *row, int64_t d, int64_t dim) {
    uint8_t rest[4 * AC_LANES] = {0};
    memcpy(rest, row + d * bits / 8, (size_t)((dim - d) * bits / 8));
    return load(bits, rest, 0);
}

/* Ask for the next rows [t, t + n) from memory while the present ones are worked on. */
AC_INLINE void fetch(const group *g, int64_t t, int64_t n) {
    for (int64_t at = t * g->next_bytes; at < (t + n) * g->next_bytes; at += 64)
        __builtin_prefetch(g->next + at);
}

/* p[h][t] = q[h] . k[t] for `heads` queries from h on and tokens 0 .. n-1, four at a time; the last four may
 * repeat the last token. */
AC_INLINE void dots(const int bits, const int heads, group *g, int64_t h, const uint8_t *k, int64_t n) {
    const int64_t bytes = bits * g->dim / 8;
    for (int64_t t = 0; t < n; t += 4) {
        const uint8_t *row[4];
        vf sum[4][4];
        AC_UNROLL
        for (int i = 0; i < 4; i++)
            row[i] = k + least(t + i, n - 1) * bytes;
        if (h == 0)
            fetch(g, t, 4);
        AC_UNROLL
        for (int j = 0; j < heads * 4; j++)
            sum[j / 4][j % 4] = (vf){0};
        int64_t d = 0;
#define TIMES_QUERIES(key_of_row)                                                                 \
    {                                                                                             \
        vf key[4];                                                                                \
        AC_UNROLL                                                                                 \
        for (int i = 0; i < 4; i++)                                                               \
            key[i] = key_of_row;                                                                  \
        AC_UNROLL                                                                                 \
        for (int j = 0; j < heads; j++) {                                                         \
            vf q = v_load(g->q + (h + j) * g->padded + d);                                        \
            AC_UNROLL                                                                             \
            for (int i = 0; i < 4; i++)                                                           \
                sum[j][i] += q * key[i];                                                          \
        }                                                                                         \
    }
        for (; d + AC_LANES <= g->dim; d += AC_LANES)
            TIMES_QUERIES(load(bits, row[i], d))
        if (d < g->dim)
            TIMES_QUERIES(load_rest(bits, row[i], d, g->dim))
        AC_UNROLL
        for (int j = 0; j < heads; j++)
            v_sum4(sum[j], g->p + (h + j) * TOKENS + t);
    }
}

#if INTEGER_KEYS
/* The same with integers: 64 codes of 8 bits, or 128 of 4 bits (even ones first), a step. */
AC_INLINE void integer_dots(const int bits, const int heads, group *g, int64_t h, const uint8_t *k, int64_t n) {
    const int64_t bytes = bits * g->dim / 8;
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t t = 0; t < n; t += 4) {
        __m512i sum[2][2][4];
        if (h == 0)
            fetch(g, t, 4);
        AC_UNROLL
        for (int j = 0; j < heads * 8; j++)
            sum[j / 8][j / 4 % 2][j % 4] = _mm512_setzero_si512();
        for (int64_t at = 0; at < bytes; at += 64) {
            __mmask64 kept = bytes - at >= 64 ? ~0ull : ~0ull >> (64 - (bytes - at));
            __m512i raw[4];
            AC_UNROLL
            for (int i = 0; i < 4; i++)
                raw[i] = _mm512_maskz_loadu_epi8(kept, k + least(t + i, n - 1) * bytes + at);
            AC_UNROLL
            for (int half = 0; half < 8 / bits; half++) {
                const int8_t *q = g->halves + h * 2 * g->padded + at * (8 / bits) + half * 64;
                AC_UNROLL
                for (int i = 0; i < 4; i++) {
                    __m512i codes = half ? _mm512_srli_epi16(raw[i], 4) : raw[i];
                    if (bits == 4)
                        codes = _mm512_and_si512(codes, low);
                    AC_UNROLL
                    for (int j = 0; j < heads * 2; j++)
                        sum[j / 2][j % 2][i] = _mm512_dpbusd_epi32(sum[j / 2][j % 2][i], codes,
                                                                   _mm512_loadu_si512(q + j * g->padded));
                }
            }
        }
        AC_UNROLL
        for (int j = 0; j < heads; j++) {
            vf x[4];
            AC_UNROLL
            for (int i = 0; i < 4; i++)
                x[i] = (vf)_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum[j][0][i], 8), sum[j][1][i]));
            v_sum4(x, g->p + (h + j) * TOKENS + t);
        }
    }
}

/* Queries as integers of 16 bits, high and low half apart; q_sum becomes that of the rounded queries. */
static void prepare_integers(group *g, int64_t bits) {
    memset(g->halves, 0, (size_t)(g->groups * 2 * g->padded));
    for (int64_t h = 0; h < g->groups; h++) {
        const float *q = g->q + h * g->padded;
        float largest = 0;
        for (int64_t d = 0; d < g->dim; d++)
            largest = fabsf(q[d]) > largest ? fabsf(q[d]) : largest;
        float step = largest > 0 ? largest / 32512.0f : 1.0f;
        int64_t sum = 0;
        for (int64_t d = 0; d < g->dim; d++) {
            int whole = (int)lrintf(q[d] / step), high = (whole + 128) >> 8;
            int64_t at = bits == 8 ? d : d / 128 * 128 + d % 2 * 64 + d % 128 / 2;
            g->halves[h * 2 * g->padded + at] = (int8_t)high;
            g->halves[(h * 2 + 1) * g->padded + at] = (int8_t)(whole - high * 256);
            sum += whole;
        }
        g->q_step[h] = step;
        g->q_sum[h] = step * (float)sum;
    }
}
#endif

#define BY_HEADS(call, limit)                                                                     \
    for (int64_t h = 0; h < g->groups;) {                                                         \
        int64_t left = g->groups - h;                                                             \
        if (left >= 4 && limit >= 4) {                                                            \
            call(4);                                                                              \
            h += 4;                                                                               \
        } else if (left == 3 && limit >= 4) {                                                     \
            call(3);                                                                              \
            h += 3;                                                                               \
        } else if (left >= 2) {                                                                   \
            call(2);                                                                              \
            h += 2;                                                                               \
        } else {                                                                                  \
            call(1);                                                                              \
            h += 1;                                                                               \
        }                                                                                         \
    }

static void scores(group *g, int64_t bits, const uint8_t *k, int64_t n) {
#define F32(heads) dots(AC_KV_F32, heads, g, h, k, n)
#define BF16(heads) dots(AC_KV_BF16, heads, g, h, k, n)
    if (bits == AC_KV_F32)
        BY_HEADS(F32, 4)
    else if (bits == AC_KV_BF16)
        BY_HEADS(BF16, 4)
#if INTEGER_KEYS
#define INT8(heads) integer_dots(AC_KV_INT8, heads > 2 ? 2 : heads, g, h, k, n)
#define INT4(heads) integer_dots(AC_KV_INT4, heads > 2 ? 2 : heads, g, h, k, n)
    else if (bits == AC_KV_INT8)
        BY_HEADS(INT8, 2)
    else
        BY_HEADS(INT4, 2)
#else
#define INT8(heads) dots(AC_KV_INT8, heads, g, h, k, n)
#define INT4(heads) dots(AC_KV_INT4, heads, g, h, k, n)
    else if (bits == AC_KV_INT8)
        BY_HEADS(INT8, 4)
    else
        BY_HEADS(INT4, 4)
#endif
}

/* Sums of the values, [padded] for each head, behind its maximum and sum. */
AC_INLINE float *summed(const group *g, int64_t h) { return g->state + h * (g->padded + 2) + 2; }

/* summed[h] += sum over t of p[h][t] * v[t], for features [d, d + vectors * AC_LANES) or the rest of the row. */
AC_INLINE void weigh(const int bits, const int heads, const int vectors, const int rest, group *g, int64_t h,
                     const uint8_t *v, int64_t n, int64_t d) {
    const int64_t bytes = bits * g->dim / 8;
    vf sum[4][4];
    AC_UNROLL
    for (int j = 0; j < heads * vectors; j++)
        sum[j / vectors][j % vectors] = v_load(summed(g, h + j / vectors) + d + j % vectors * AC_LANES);
    for (int64_t t = 0; t < n; t++, v += bytes) {
        vf x[4];
        if (h == 0 && d == 0)
            fetch(g, t, 1);
        AC_UNROLL
        for (int i = 0; i < vectors; i++)
            x[i] = rest ? load_rest(bits, v, d, g->dim) : load(bits, v, d + i * AC_LANES);
        AC_UNROLL
        for (int j = 0; j < heads; j++) {
            float p = g->p[(h + j) * TOKENS + t];
            AC_UNROLL
            for (int i = 0; i < vectors; i++)
                sum[j][i] += p * x[i];
        }
    }
    AC_UNROLL
    for (int j = 0; j < heads * vectors; j++)
        v_store(summed(g, h + j / vectors) + d + j % vectors * AC_LANES, sum[j / vectors][j % vectors]);
}

enum { WIDE = AC_LANES == 16 ? 4 : 2 }; /* vectors of features whose sums for four heads fit the registers */

AC_INLINE void weigh_all(const int bits, group *g, const uint8_t *v, int64_t n) {
#define WEIGH_WIDE(heads) weigh(bits, heads, WIDE, 0, g, h, v, n, d)
#define WEIGH_ONE(heads) weigh(bits, heads, 1, 0, g, h, v, n, d)
#define WEIGH_REST(heads) weigh(bits, heads, 1, 1, g, h, v, n, d)
    int64_t d = 0;
    for (; d + WIDE * AC_LANES <= g->dim; d += WIDE * AC_LANES)
        BY_HEADS(WEIGH_WIDE, 4)
    for (; d + AC_LANES <= g->dim; d += AC_LANES)
        BY_HEADS(WEIGH_ONE, 4)
    if (d < g->dim)
        BY_HEADS(WEIGH_REST, 4)
}

static void values(group *g, int64_t bits, const uint8_t *v, int64_t n) {
    if (bits == AC_KV_F32)
        weigh_all(AC_KV_F32, g, v, n);
    else if (bits == AC_KV_BF16)
        weigh_all(AC_KV_BF16, g, v, n);
    else if (bits == AC_KV_INT8)
        weigh_all(AC_KV_INT8, g, v, n);
    else
        weigh_all(AC_KV_INT4, g, v, n);
}

/* Scale and minimum of a block's keys and values, 0 behind the last token. */
typedef struct {
    float k_scale[TOKENS], k_min[TOKENS], v_scale[TOKENS], v_min[TOKENS];
} coefficients;

static void copy_padded(float *to, const float *from, int64_t n) {
    memcpy(to, from, (size_t)n * sizeof(float));
    for (int64_t t = n; t < TOKENS; t++)
        to[t] = 0;
}

/* Scores of one head, raw in p, as the softmax wants them: dequantized, capped, -infinity behind n. Returns
 * the largest. */
static float finish_scores(const group *g, int64_t h, int64_t n, const coefficients *of, int coded) {
    float *p = g->p + h * TOKENS;
    vf largest = v_set(-INFINITY);
    for (int64_t t = 0; t < n; t += AC_LANES) {
        vf x = v_load(p + t);
        if (coded)
            x = x * (v_load(of->k_scale + t) * g->q_step[h]) + v_load(of->k_min + t) * g->q_sum[h];
        if (g->softcap > 0)
            x = v_tanh(x * (1.0f / g->softcap)) * g->softcap;
        v_store(p + t, x);
        if (t + AC_LANES > n) {
            for (int64_t i = n; i < t + AC_LANES; i++)
                p[i] = -INFINITY;
            x = v_load(p + t);
        }
        largest = v_max(largest, x);
    }
    return v_largest(largest);
}

/* Weights of one head in place of its scores, and what it has summed so far brought to the new maximum. The
 * values' minimum is added here (the same to all features), their scale goes into the weights. */
static void softmax(const group *g, int64_t h, int64_t n, float largest, const coefficients *of, int coded) {
    float *state = g->state + h * (g->padded + 2), *p = g->p + h * TOKENS;
    float maximum = largest > state[0] ? largest : state[0];
    float old = v_exp(v_set(state[0] - maximum))[0];
    vf sum = {0}, shift = {0};
    for (int64_t t = 0; t < n; t += AC_LANES) {
        vf x = v_exp(v_load(p + t) - maximum);
        sum += x;
        if (coded) {
            shift += x * v_load(of->v_min + t);
            x *= v_load(of->v_scale + t);
        }
        v_store(p + t, x);
    }
    float common = coded ? v_sum(shift) : 0.0f;
    state[0] = maximum;
    state[1] = state[1] * old + v_sum(sum);
    for (int64_t d = 2; d < ceil_to(g->dim, AC_LANES) + 2; d += AC_LANES)
        v_store(state + d, v_load(state + d) * old + common);
}

/* n <= TOKENS slots from `slot` of the whole cache on. */
static void attend_block(const ac_cache *c, group *g, int64_t slot, int64_t n) {
    const int64_t k_bytes = row_bytes(c->key_bits, c->dim), v_bytes = row_bytes(c->value_bits, c->dim);
    const uint8_t *k = (const uint8_t *)c->k + slot * k_bytes, *v = (const uint8_t *)c->v + slot * v_bytes;
    const int k_coded = c->key_bits <= AC_KV_INT8, v_coded = c->value_bits <= AC_KV_INT8;
    coefficients of;
    if (k_coded) {
        copy_padded(of.k_scale, c->k_scale + slot, n);
        copy_padded(of.k_min, c->k_min + slot, n);
    }
    if (v_coded) {
        copy_padded(of.v_scale, c->v_scale + slot, n);
        copy_padded(of.v_min, c->v_min + slot, n);
    }
    g->next = v;
    g->next_bytes = v_bytes;
    scores(g, c->key_bits, k, n);
    for (int64_t h = 0; h < g->groups; h++)
        softmax(g, h, n, finish_scores(g, h, n, &of, k_coded), &of, v_coded);
    g->next = k + n * k_bytes;
    g->next_bytes = k_bytes;
    values(g, c->value_bits, v, n);
}

#endif
