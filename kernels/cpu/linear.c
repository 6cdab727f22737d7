/* Linear layers with packed (2 to 8 bits) and dense weights on few rows of activations, see linear.h.
 *
 * Layout of packed codes: [n / 16][kp / 32][bits][64 bytes]. A piece is 16 rows of 32 features: 8 code vectors
 * of 64 bytes, vector j holding features 4j..4j+3 of row r in bytes 4r..4r+3, which is what an 8-bit dot product
 * into 16 lanes (one row each) wants. They are squeezed into planes, low bits first:
 *
 *     plane of 4 bits: 4 vectors, vector i = code vectors 2i (low nibbles) and 2i + 1
 *     plane of 2 bits: 2 vectors, vector i = code vectors 4i .. 4i + 3 at bits 0, 2, 4, 6
 *     plane of 1 bit:  1 vector, code vector j at bit j
 *     3 = 2 + 1 bits, 5 = 4 + 1, 6 = 4 + 2; 8 bits are the code vectors themselves
 *
 * so that a piece has `bits` vectors. Scales (16-bit) and zeros (uint8) are [n / 16][groups][16]. Missing rows
 * and features are zeros.
 *
 * Dot products are exact in int32; a scale of the weight times one of the activations joins them in float. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O2") /* O3 copies the unrolled loops once for each kind of weight: 3 times the time to build */
#endif
#include "linear.h"

#include "pool.h"
#include "simd.h"

#include <pthread.h>
#include <stdlib.h>

/* Planes of int8 that the activations have: linear_a8.c compiles this file with one, for 8-bit activations. */
#ifndef AC_PLANES
#define AC_PLANES 2
#endif
/* Bits of `fine`: products of codes below 256 with 64 activations stay below 2^31 when joined. */
enum { FINE = AC_PLANES == 2 ? 7 : 0 };
enum { ROWS = 16, PIECE = 32, VECTOR = 64, PIECES = AC_CHUNK / PIECE };
/* Bytes that codes are fetched ahead: they are read once, in one stream that crosses pages. */
enum { AHEAD = 8192 };
/* Two blocks meet four rows of activations at once, and dense weights WIDE, where registers hold the sums. */
#ifdef AC_AVX512
enum { TWO = 1, WIDE = 8 };
#else
enum { TWO = 0, WIDE = 4 };
#endif
/* Rows of activations from which on a block is computed with, not waited for: two streams of codes are worth it. */
enum { MANY = 16 };
#define UNROLL _Pragma("GCC unroll 16")

static int64_t chunks_of(int64_t k) { return (k + AC_CHUNK - 1) / AC_CHUNK; }
static int64_t groups_of(const ac_weight *w) { return (w->k + w->group - 1) / w->group; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

const char *ac_linear_variant(void) {
#if (defined(AC_AVX512) && defined(__AVX512VNNI__)) || (defined(AC_AVX2) && defined(__AVXVNNI__))
    return AC_VARIANT "-vnni";
#else
    return AC_VARIANT;
#endif
}

/* ---- activations ---- */

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

int64_t ac_input_bytes(int64_t rows, int64_t k) {
    int64_t chunks = rows * chunks_of(k);
    return 2 * aligned(chunks * AC_CHUNK) + aligned(chunks * 4) + aligned(chunks * PIECES * 4);
}

void ac_input_place(ac_input *in, int64_t rows, int64_t k, void *memory) {
    int64_t chunks = rows * chunks_of(k);
    in->rows = rows, in->k = k, in->x = NULL;
    in->q = memory;
    in->fine = in->q + aligned(chunks * AC_CHUNK);
    in->scale = (float *)(in->fine + aligned(chunks * AC_CHUNK));
    in->sums = (int32_t *)((char *)in->scale + aligned(chunks * 4));
    memset(in->q, 0, 2 * aligned(chunks * AC_CHUNK));
}

/* One chunk of 64 features at x, as scale * (128 * q + fine). A NaN or infinity there becomes a scale of NaN. */
static void quantize_chunk(const float *x, int8_t *q, int8_t *fine, float *scale, int32_t *sums) {
    vf a[4], most = vf_set1(0), odd = vf_set1(0);
    vi total[2] = {vi_set1(0), vi_set1(0)};
    for (int i = 0; i < 4; i++) {
        a[i] = vf_load(x + 16 * i);
        most = vf_max_abs(most, a[i]);
        odd = vf_fma(a[i], vf_set1(0), odd);
    }
    float peak = vf_max(most), rest = vf_sum(odd);
    vf inverse = vf_set1(peak > 1e-36f && rest == 0 ? 127.0f / peak : 0.0f);
    for (int i = 0; i < 4; i++) {
        vf scaled = vf_mul(a[i], inverse);
        vi high = vf_store_int8(q + 16 * i, scaled);
        total[i / 2] = vi_add(total[i / 2], vi_shl(high, FINE));
        if (AC_PLANES < 2)
            continue;
        vf left = vf_fma(vf_int(high), vf_set1(-1), scaled); /* exact: within half of 1 */
        vi low = vf_store_int8(fine + 16 * i, vf_mul(left, vf_set1(1 << FINE)));
        total[i / 2] = vi_add(total[i / 2], low);
    }
    *scale = peak > 1e-36f || rest != 0 ? peak * (1.0f / (127 << FINE)) + rest : 0.0f;
    sums[0] = -vi_sum(total[0]);
    sums[1] = -vi_sum(total[1]);
}

void ac_input_quantize(ac_input *in, const float *x, int64_t first, int64_t last) {
    int64_t chunks = chunks_of(in->k);
    in->x = x;
    for (int64_t m = 0; m < in->rows; m++)
        for (int64_t c = first; c < last; c++) {
            const float *from = x + m * in->k + c * AC_CHUNK;
            int64_t at = m * chunks + c, have = in->k - c * AC_CHUNK;
            float padded[AC_CHUNK] = {0};
            if (have < AC_CHUNK)
                from = memcpy(padded, from, have * sizeof(float));
            quantize_chunk(from, in->q + at * AC_CHUNK, in->fine + at * AC_CHUNK, in->scale + at, in->sums + at * PIECES);
        }
}

/* ---- packed weights ---- */

/* Code vector j of the piece at p; bits and j are constants. */
AC_INLINE vi code_vector(const int bits, const uint8_t *p, const int j) {
    if (bits == 8)
        return vi_load(p + VECTOR * j);
    vi low = bits < 4 ? vi_field(vi_load(p + VECTOR * (j / 4)), 2 * (j % 4), 3)
                      : vi_field(vi_load(p + VECTOR * (j / 2)), 4 * (j % 2), 15);
    if (bits == 3)
        return vi_join(low, vi_load(p + VECTOR * 2), j - 2, 4);
    if (bits == 5)
        return vi_join(low, vi_load(p + VECTOR * 4), j - 4, 16);
    if (bits == 6)
        return vi_join(low, vi_load(p + VECTOR * (4 + j / 4)), 2 * (j % 4) - 4, 48);
    return low;
}

static inline int32_t lane_of_4(const int8_t *q) {
    int32_t four;
    memcpy(&four, q, 4);
    return four;
}

static void store_rows(const ac_weight *w, vf value, float *y, int64_t row, int64_t last) {
    if (row + ROWS <= last) {
        vf_store(y + row, w->bias ? vf_add(value, vf_load(w->bias + row)) : value);
        return;
    }
    float lanes[ROWS];
    vf_store(lanes, value);
    for (int64_t r = row; r < last; r++)
        y[r] = lanes[r - row] + (w->bias ? w->bias[r] : 0);
}

/* The scales and zeros of a block and one of its groups. */
typedef struct {
    vf scale;
    vi zero;
} grid;

AC_INLINE grid grid_at(const ac_weight *w, int64_t at) {
    const uint16_t *scale = (const uint16_t *)w->scale + at;
    return (grid){
        .scale = w->type == AC_BF16 ? vf_load_bf16(scale) : vf_load_f16(scale),
        .zero = w->zero ? vi_bytes((const uint8_t *)w->zero + at) : vi_set1(1 << (w->bits - 1)),
    };
}

/* nr blocks from `block` on times mm rows of activations from m0 on; bits, nr and mm are constants. */
AC_INLINE void tile(const int bits, const int nr, const int mm, const ac_weight *w, const ac_input *in, int64_t m0,
                    int64_t block, float *y, int64_t ldy, int64_t last) {
    const int64_t pieces = chunks_of(w->k) * PIECES, chunks = pieces / PIECES, groups = groups_of(w);
    const int64_t per_group = groups > 1 ? w->group / PIECE : pieces, stride = pieces * bits * VECTOR;
    const int whole = per_group % PIECES == 0; /* every chunk lies in one group */
    const uint8_t *codes = (const uint8_t *)w->codes + block * stride;
    const int8_t *q = in->q + m0 * pieces * PIECE, *fine = in->fine + m0 * pieces * PIECE;
    const int32_t *sums = in->sums + m0 * pieces;
    int64_t left = 0, at = block * groups * ROWS;
    grid now[2];
    vf total[2][4];
    vi part[2][4], rest[2][4];
    UNROLL for (int r = 0; r < nr; r++) {
        now[r] = (grid){vf_set1(0), vi_set1(0)};
        UNROLL for (int m = 0; m < mm; m++) total[r][m] = vf_set1(0), part[r][m] = rest[r][m] = vi_set1(0);
    }
    for (int64_t p = 0; p < pieces; p++, codes += bits * VECTOR) {
        if (left-- == 0 && p * PIECE < w->k) { /* padding has no group */
            UNROLL for (int r = 0; r < nr; r++) now[r] = grid_at(w, at + r * groups * ROWS);
            left = per_group - 1;
            at += ROWS;
        }
        UNROLL for (int r = 0; r < nr; r++)
            UNROLL for (int i = 0; i < bits; i++) __builtin_prefetch(codes + r * stride + i * VECTOR + AHEAD);
        UNROLL for (int m = 0; m < mm; m++) {
            vi minus = vi_set1(sums[m * pieces + p]);
            UNROLL for (int r = 0; r < nr; r++)
                rest[r][m] = vi_add(rest[r][m], w->zero ? vi_mul(now[r].zero, minus) : vi_shl(minus, bits - 1));
        }
        UNROLL for (int j = 0; j < 8; j++) {
            vi code[2];
            UNROLL for (int r = 0; r < nr; r++) code[r] = code_vector(bits, codes + r * stride, j);
            UNROLL for (int m = 0; m < mm; m++) {
                const int64_t four = (m * pieces + p) * PIECE + 4 * j;
                vi high = vi_set1(lane_of_4(q + four)), low = vi_set1(lane_of_4(fine + four));
                UNROLL for (int r = 0; r < nr; r++) part[r][m] = vi_dot(bits, part[r][m], code[r], high);
                if (AC_PLANES == 2)
                    UNROLL for (int r = 0; r < nr; r++) rest[r][m] = vi_dot(bits, rest[r][m], code[r], low);
            }
        }
        if (whole && p % PIECES == 0)
            continue;
        UNROLL for (int m = 0; m < mm; m++) {
            vf x_scale = vf_set1(in->scale[(m0 + m) * chunks + p / PIECES]);
            UNROLL for (int r = 0; r < nr; r++) {
                vf sum = vf_int(vi_add(vi_shl(part[r][m], FINE), rest[r][m]));
                total[r][m] = vf_fma(sum, vf_mul(now[r].scale, x_scale), total[r][m]);
                part[r][m] = rest[r][m] = vi_set1(0);
            }
        }
    }
    UNROLL for (int m = 0; m < mm; m++)
        UNROLL for (int r = 0; r < nr; r++)
            store_rows(w, total[r][m], y + (m0 + m) * ldy, (block + r) * ROWS, last);
}

/* Blocks [block, end) for all rows of activations. */
AC_INLINE void blocks(const int bits, const ac_weight *w, const ac_input *in, float *y, int64_t ldy, int64_t block,
                      int64_t end, int64_t last) {
    int64_t m;
#define TILES(nr, mm)                                                                                             \
    for (; m + mm <= in->rows; m += mm)                                                                           \
        tile(bits, nr, mm, w, in, m, block, y, ldy, last)
    for (; TWO && in->rows >= MANY && block + 2 <= end; block += 2) {
        m = 0;
        TILES(2, 4);
        TILES(2, 2);
        TILES(2, 1);
    }
    for (; block < end; block++) {
        m = 0;
        if (TWO)
            TILES(1, 4);
        TILES(1, 2);
        TILES(1, 1);
    }
#undef TILES
}

#define BLOCKS(bits)                                                                                              \
    static void blocks_##bits(const ac_weight *w, const ac_input *in, float *y, int64_t ldy, int64_t block,       \
                              int64_t end, int64_t last) {                                                        \
        blocks(bits, w, in, y, ldy, block, end, last);                                                            \
    }
BLOCKS(2)
BLOCKS(3)
BLOCKS(4)
BLOCKS(5)
BLOCKS(6)
BLOCKS(8)

static void add_outliers(const ac_weight *w, const ac_input *in, float *y, int64_t ldy, int64_t first, int64_t last) {
    for (int64_t m = 0; m < in->rows; m++) {
        const float *x = in->x + m * w->k;
        for (int64_t r = first; r < last; r++) {
            float sum = 0;
            for (int32_t i = w->outlier_start[r]; i < w->outlier_start[r + 1]; i++)
                sum += w->outlier_change[i] * x[w->outlier_column[i]];
            y[m * ldy + r] += sum;
        }
    }
}

#include "linear_dense.h"

/* ---- what others call ---- */

int64_t ac_linear_unit(const ac_weight *w) { return w->bits < 16 ? ROWS : 4; }

void ac_linear_rows(const ac_weight *w, const ac_input *in, float *y, int64_t ldy, int64_t first, int64_t last) {
    const int64_t block = first / ROWS, end = (last + ROWS - 1) / ROWS;
    switch (w->bits) {
#define CASE(bits)                                                                                                \
    case bits:                                                                                                    \
        blocks_##bits(w, in, y, ldy, block, end, last);                                                           \
        break;
        CASE(2)
        CASE(3)
        CASE(4)
        CASE(5)
        CASE(6)
        CASE(8)
    default:
        if (w->type == AC_F32)
            dense(AC_F32, w, in, y, ldy, first, last);
        else if (w->type == AC_BF16)
            dense(AC_BF16, w, in, y, ldy, first, last);
        else
            dense(AC_F16, w, in, y, ldy, first, last);
    }
    if (w->outlier_start)
        add_outliers(w, in, y, ldy, first, last);
}

/* ---- dequantized weights ---- */

/* The code of one weight. */
static int code_at(const ac_weight *w, int64_t r, int64_t c) {
    const int bits = (int)w->bits, j = (int)(c % PIECE) / 4;
    const int64_t piece = r / ROWS * chunks_of(w->k) * PIECES + c / PIECE;
    const uint8_t *p = (const uint8_t *)w->codes + piece * bits * VECTOR + r % ROWS * 4 + c % 4;
    if (bits == 8)
        return p[VECTOR * j];
    int code = bits < 4 ? p[VECTOR * (j / 4)] >> 2 * (j % 4) & 3 : p[VECTOR * (j / 2)] >> 4 * (j % 2) & 15;
    if (bits == 3 || bits == 5)
        code |= (p[VECTOR * (bits - 1)] >> j & 1) << (bits - 1);
    if (bits == 6)
        code |= (p[VECTOR * (4 + j / 4)] >> 2 * (j % 4) & 3) << 4;
    return code;
}

/* Scale of the weight (r, c), and what its code must lose. */
static float scale_at(const ac_weight *w, int64_t r, int64_t c, int *zero) {
    const int64_t at = (r / ROWS * groups_of(w) + c / w->group) * ROWS + r % ROWS;
    const uint16_t scale = ((const uint16_t *)w->scale)[at];
    *zero = w->zero ? ((const uint8_t *)w->zero)[at] : 1 << (w->bits - 1);
    return w->type == AC_BF16 ? ac_from_bf16(scale) : ac_from_f16(scale);
}

static float weight_at(const ac_weight *w, int64_t r, int64_t c) {
    int zero;
    float scale = scale_at(w, r, c, &zero);
    return (float)(code_at(w, r, c) - zero) * scale;
}

void ac_weight_row(const ac_weight *w, int64_t r, float *out) {
    for (int64_t c = 0; w->bits >= 16 && c < w->k; c++)
        out[c] = dense_at((int)w->type, w->codes, r * w->k + c);
    for (int64_t c = 0; w->bits < 16 && c < w->k;) {
        int zero;
        float scale = scale_at(w, r, c, &zero);
        for (int64_t end = least(w->k, (c / w->group + 1) * w->group); c < end; c++)
            out[c] = (float)(code_at(w, r, c) - zero) * scale;
    }
    for (int32_t i = w->outlier_start ? w->outlier_start[r] : 0; w->outlier_start && i < w->outlier_start[r + 1]; i++)
        out[w->outlier_column[i]] += w->outlier_change[i];
}

#include "linear_bf16.h"

static void rows_bf16(const ac_weight *w, int64_t first, int64_t last, uint16_t *out) {
    for (int64_t row = first; row < last; row += ROWS) {
        const int64_t block = row / ROWS, rows = least(ROWS, last - row);
        uint16_t *to = out + (row - first) * w->k;
        switch (w->bits) {
#define BF16_CASE(bits)                                                                                           \
    case bits:                                                                                                    \
        block_bf16(bits, w, block, rows, to);                                                                     \
        break;
            BF16_CASE(2)
            BF16_CASE(3)
            BF16_CASE(4)
            BF16_CASE(5)
            BF16_CASE(6)
            BF16_CASE(8)
        }
    }
    for (int64_t r = first; w->outlier_start && r < last; r++)
        for (int32_t i = w->outlier_start[r]; i < w->outlier_start[r + 1]; i++) {
            int64_t c = w->outlier_column[i];
            out[(r - first) * w->k + c] = ac_to_bf16(weight_at(w, r, c) + w->outlier_change[i]);
        }
}

struct dequantize {
    const ac_weight *w;
    int64_t first, last;
    const int64_t *index;
    uint16_t *half;
    float *full;
};

static void bf16_body(void *context, int thread, int threads) {
    const struct dequantize *d = context;
    long begin, end;
    ac_share(d->last - d->first, ROWS, thread, threads, &begin, &end);
    rows_bf16(d->w, d->first + begin, d->first + end, d->half + begin * d->w->k);
}

void ac_weight_bf16(const ac_weight *w, int64_t first, int64_t last, uint16_t *out, int threads) {
    struct dequantize d = {.w = w, .first = first, .last = last, .half = out};
    ac_region(threads, bf16_body, &d);
}

static void rows_body(void *context, int thread, int threads) {
    const struct dequantize *d = context;
    long begin, end;
    ac_share(d->last, 1, thread, threads, &begin, &end);
    for (long i = begin; i < end; i++)
        ac_weight_row(d->w, d->index[i], d->full + i * d->w->k);
}

void ac_weight_rows(const ac_weight *w, const int64_t *index, int64_t count, float *out, int threads) {
    struct dequantize d = {.w = w, .last = count, .index = index, .full = out};
    ac_region(threads, rows_body, &d);
}

/* ---- a whole linear layer on the threads of the pool ---- */

/* Rows of activations that are quantized together, and weight rows whose results are rounded together. */
enum { SLICE = 128, STRIP = 64 };
/* Multiplications below which one thread is enough. */
enum { ALONE = 1 << 17 };

struct call {
    const ac_weight *w;
    int64_t rows, type;
    const void *x;
    void *y;
    ac_input in;
    float *wide; /* x as float: [rows, k], only for bf16 */
};

/* Work space of the calling thread; it grows and is freed with the thread. */
static pthread_key_t space_key;
static int space_usable;
static void make_space_key(void) { space_usable = pthread_key_create(&space_key, free) == 0; }
struct space {
    int64_t bytes;
    char pad[56];
};

static void *space_of(int64_t bytes) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_space_key);
    struct space *space = space_usable ? pthread_getspecific(space_key) : NULL;
    if (space_usable && (!space || space->bytes < bytes)) {
        free(space);
        space = aligned_alloc(64, sizeof *space + aligned(bytes));
        if (space)
            space->bytes = bytes;
        pthread_setspecific(space_key, space);
    }
    return space ? space + 1 : NULL;
}

/* Chunks [first, last) of x: to float if they aren't, and quantized. */
static void input_body(void *context, long first, long last) {
    struct call *call = context;
    const int64_t k = call->w->k, begin = first * AC_CHUNK, end = least(k, last * AC_CHUNK);
    for (int64_t m = 0; call->wide && m < call->rows; m++) {
        const uint16_t *from = (const uint16_t *)call->x + m * k;
        float *to = call->wide + m * k;
        int64_t i = begin;
        for (; i + 16 <= end; i += 16)
            vf_store(to + i, vf_load_bf16(from + i));
        for (; i < end; i++)
            to[i] = ac_from_bf16(from[i]);
    }
    if (call->w->bits < 16)
        ac_input_quantize(&call->in, call->in.x, first, last);
}

static void round_rows(const float *from, uint16_t *to, int64_t count) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        vf_store_bf16(to + i, vf_load(from + i));
    for (; i < count; i++)
        to[i] = ac_to_bf16(from[i]);
}

/* Weight rows [first, last); for bf16 in strips that are rounded while they are in the cache. */
static void output_body(void *context, long first, long last) {
    const struct call *call = context;
    const int64_t n = call->w->n;
    if (!call->wide) {
        ac_linear_rows(call->w, &call->in, call->y, n, first, last);
        return;
    }
    float strip[SLICE * STRIP];
    for (int64_t row = first; row < last; row += STRIP) {
        const int64_t end = least(last, row + STRIP);
        ac_linear_rows(call->w, &call->in, strip - row, STRIP, row, end);
        for (int64_t m = 0; m < call->rows; m++)
            round_rows(strip + m * STRIP, (uint16_t *)call->y + m * n + row, end - row);
    }
}

int ac_linear(const ac_weight *w, const void *x, void *y, int64_t rows, int64_t type, int threads) {
    const int64_t size = type == AC_BF16 ? 2 : 4, slice = least(rows, SLICE), input = ac_input_bytes(slice, w->k);
    char *memory = space_of(input + (type == AC_BF16 ? slice * w->k * 4 : 0));
    if (!memory)
        return -1;
    struct call call = {.w = w, .type = type, .wide = type == AC_BF16 ? (float *)(memory + input) : NULL};
    for (int64_t m = 0; m < rows; m += slice) {
        call.rows = least(slice, rows - m);
        call.x = (const char *)x + m * w->k * size;
        call.y = (char *)y + m * w->n * size;
        ac_input_place(&call.in, call.rows, w->k, memory);
        call.in.x = call.wide ? call.wide : call.x;
        ac_each(call.rows * w->k < ALONE ? 1 : threads, chunks_of(w->k), 1, input_body, &call);
        ac_each(call.rows * w->k * w->n < ALONE ? 1 : threads, w->n, ac_linear_unit(w), output_body, &call);
    }
    return 0;
}
