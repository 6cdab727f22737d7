/* What attention_tiles.c works on: its arguments, its plan, and how keys and values are packed. */
#ifndef AC_ATTENTION_TILES_H
#define AC_ATTENTION_TILES_H
#include <stdatomic.h>
#include <stddef.h>

#include "attention_vector.h"

enum { QUERIES = 64, KEYS = 64, ROWS = 4, PANELS = KEYS / AC_LANES, WIDE = AC_LANES == 16 ? 4 : 2 };
enum { SPANS = 0, WINDOWS = 1, BLOCKS = 2 };                     /* patterns */
enum { FULL = 0, FULL_SAVE = 1, WINDOW_ADD = 2, REUSE = 3 };     /* what a head of WINDOWS does */
enum { OUTSIDE = 0, INSIDE = 1, EDGE = 2 };                      /* a tile and the pattern */

#if defined(__AVX512BF16__) && AC_LANES == 16
#define PAIRS 1
#else
#define PAIRS 0
#endif

/* Numbers [batch, heads, tokens, dim] with strides in elements (1 for dim); bits: 32 or 16 (bfloat16). */
typedef struct {
    const void *data;
    int64_t batch, head, token, bits;
} view;

typedef struct {
    int64_t batch, heads, kv_heads, tokens, dim, pattern, prefix, block, threads;
    view q, k, v;
    void *out, *saved;          /* [batch, heads, tokens, dim], contiguous, of q's type; saved: WINDOWS only */
    const void *residual;       /* the same, or null */
    const int32_t *window;      /* [heads]: of SPANS, or the half window of WINDOWS */
    const int32_t *sink, *mode; /* [heads] */
    const int32_t *row_ptr, *col; /* BLOCKS: [heads, blocks + 1], [row_ptr's last] */
    const int32_t *order;       /* BLOCKS: [heads, tokens] or null */
    double scale;
} ac_pattern;

/* What follows from the arguments, and where things lie. */
typedef struct {
    const ac_pattern *x;
    int pairs;             /* numbers are pairs of bfloat16 */
    int64_t rows;          /* queries of a task */
    int64_t depth, padded; /* units of a query or key; dim in whole vectors */
    int64_t blocks, block, block_panels; /* keys are packed in blocks, each in whole panels */
    int64_t packs;                       /* packed (batch, head) pairs */
    int64_t key_units, value_units;      /* of one panel */
    int32_t *keys, *values;              /* [packs, blocks * block_panels, units] */
    char *spaces;
    atomic_llong next;
} plan;

/* One thread's work space for one task. Two running softmaxes: of the keys inside of the pattern and, when the
 * residual is wanted, of those outside of it. */
typedef struct {
    const plan *p;
    int64_t b, h, first, count; /* the queries' positions */
    int64_t pack, panels;       /* of the present tile */
    const int32_t *key[PANELS], *value[PANELS];
    int32_t position[KEYS]; /* of the tile's keys; INT32_MAX where there is none */
    int32_t below[QUERIES], from[QUERIES], to[QUERIES]; /* a query sees keys < below and those in [from, to) */
    int32_t least_below, most_below, least_from, most_from, least_to, most_to; /* of all the task's queries */
    _Alignas(64) float scores[QUERIES * KEYS];
    int32_t weights[QUERIES * KEYS];
    float largest[QUERIES], old[QUERIES];
    float maximum[2][QUERIES], sum[2][QUERIES];
    int32_t *query; /* [QUERIES, depth] */
    float *acc[2];  /* [QUERIES, padded] */
} work;

static int64_t ceil_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- reading, packing ---- */

static const void *row_of(const view *v, int64_t b, int64_t h, int64_t token) {
    return (const char *)v->data + (b * v->batch + h * v->head + token * v->token) * v->bits / 8;
}

static int64_t token_at(const ac_pattern *x, int64_t h, int64_t position) {
    return x->order ? x->order[h * x->tokens + position] : position;
}

static float element(const void *row, int64_t d, int64_t bits) {
    if (bits == 32)
        return ((const float *)row)[d];
    uint32_t wide = (uint32_t)((const uint16_t *)row)[d] << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* A row in units: floats, or pairs of neighbouring bfloat16. */
static void read_row(const plan *p, const view *v, const void *row, int32_t *units) {
    const int64_t dim = p->x->dim;
    if (p->pairs) {
        if (dim % 2)
            units[dim / 2] = 0;
        memcpy(units, row, (size_t)dim * 2);
    } else if (v->bits == 32) {
        memcpy(units, row, (size_t)dim * 4);
    } else {
        for (int64_t d = 0; d < dim; d++)
            units[d] = (int32_t)((uint32_t)((const uint16_t *)row)[d] << 16);
    }
}

/* Keys of one panel with lanes side by side, values with features side by side (in pairs: two keys a unit).
 * Lanes without a key are 0. */
static void pack_panel(const plan *p, int64_t pack, int64_t panel, int32_t *row) {
    const ac_pattern *x = p->x;
    const int64_t per_batch = p->packs / x->batch, b = pack / per_batch, h = pack % per_batch;
    const int64_t head = per_batch == x->kv_heads ? h : h / (x->heads / x->kv_heads);
    const int64_t block = panel / p->block_panels, inside = panel % p->block_panels * AC_LANES;
    int32_t *key = p->keys + (pack * p->blocks * p->block_panels + panel) * p->key_units;
    int32_t *value = p->values + (pack * p->blocks * p->block_panels + panel) * p->value_units;
    memset(key, 0, (size_t)p->key_units * 4);
    memset(value, 0, (size_t)p->value_units * 4);
    for (int64_t lane = 0; lane < AC_LANES; lane++) {
        int64_t position = block * p->block + inside + lane;
        if (inside + lane >= p->block || position >= x->tokens)
            break;
        int64_t token = token_at(x, h, position);
        read_row(p, &x->k, row_of(&x->k, b, head, token), row);
        for (int64_t d = 0; d < p->depth; d++)
            key[d * AC_LANES + lane] = row[d];
        const void *from = row_of(&x->v, b, head, token);
        if (p->pairs)
            for (int64_t d = 0; d < x->dim; d++)
                ((uint16_t *)value)[(lane / 2 * p->padded + d) * 2 + lane % 2] = ((const uint16_t *)from)[d];
        else
            read_row(p, &x->v, from, value + lane * p->padded);
    }
}

/* Whether any head attends to these keys: heads that reuse their output don't. */
static int needed(const plan *p, int64_t pack) {
    const ac_pattern *x = p->x;
    const int64_t groups = x->heads * x->batch / p->packs, first = pack % (p->packs / x->batch) * groups;
    for (int64_t h = first; h < first + groups; h++)
        if (x->pattern != WINDOWS || x->mode[h] != REUSE)
            return 1;
    return 0;
}

#endif
