#include "moe.h"

#include "pool.h"
#include "simd.h"

#include <stdlib.h>

/* Pairs of token and choice are sorted by the weight that serves them, so that a weight is read once for all of
 * its rows. A thread computes the same columns of every weight, and then of the result, so that it only needs
 * what it wrote itself. */

typedef struct {
    ac_weight weight;
    int64_t first, count; /* rows in sorted order */
} run;

typedef struct {
    const ac_moe *a;
    int64_t rows, runs; /* rows that have a weight */
    int64_t *where;     /* [pairs]: row of each pair in sorted order, -1 for none */
    int64_t *pair;      /* [rows]: the inverse */
    run *run_of;        /* [runs] */
    float *x;           /* [rows, k] */
    float *y;           /* [rows, n] */
    ac_input input;
} job;

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

/* ---- routing ---- */

static ac_weight weight_at(const ac_pool *pool, int64_t place) {
    ac_weight w = pool->first;
    w.codes = (const char *)w.codes + place * pool->codes_step;
    if (w.scale)
        w.scale = (const char *)w.scale + place * pool->scale_step;
    if (w.zero)
        w.zero = (const char *)w.zero + place * pool->zero_step;
    return w;
}

/* The number of the weight that serves a pair, counted through all pools; -1 for none, -2 when it is not there. */
static int64_t slot_of(const ac_moe *a, int64_t pair) {
    int64_t expert = a->wide ? ((const int64_t *)a->expert)[pair] : ((const int32_t *)a->expert)[pair], base = 0;
    if (expert < 0 || expert >= a->experts)
        return -1;
    for (int64_t c = 0; c < a->classes; base += a->pools[c++].places) {
        int32_t place = a->remap[c * a->experts + expert];
        if (place >= a->pools[c].places)
            return -2;
        if (place >= 0)
            return base + place;
    }
    return -1;
}

/* Sort the pairs by slot into runs; `count` [slots + 1] is zero. 0, or -2. */
static int sort_pairs(job *j, int64_t *slot, int64_t *count) {
    const ac_moe *a = j->a;
    const int64_t pairs = a->tokens * a->top_k;
    int64_t next = 0, s = 0;
    for (int64_t p = 0; p < pairs; p++) {
        slot[p] = slot_of(a, p);
        if (slot[p] == -2)
            return -2;
        if (slot[p] >= 0)
            count[slot[p]]++;
    }
    j->runs = 0;
    for (int64_t c = 0; c < a->classes; c++)
        for (int64_t place = 0; place < a->pools[c].places; place++, s++) {
            int64_t rows = count[s];
            count[s] = next; /* from here on: where the next row of this slot goes */
            if (rows)
                j->run_of[j->runs++] = (run){weight_at(a->pools + c, place), next, rows};
            next += rows;
        }
    for (int64_t p = 0; p < pairs; p++) {
        j->where[p] = slot[p] < 0 ? -1 : count[slot[p]]++;
        if (j->where[p] >= 0)
            j->pair[j->where[p]] = p;
    }
    j->rows = next;
    return 0;
}

/* ---- work of a thread ---- */

/* Rows [first, first + count) of quantized activations, in the layout that linear.h tells. */
_Static_assert(sizeof(ac_input) == 2 * sizeof(int64_t) + 5 * sizeof(void *), "some_rows moves every array");
static ac_input some_rows(const ac_input *in, int64_t first, int64_t count) {
    const int64_t chunks = (in->k + AC_CHUNK - 1) / AC_CHUNK;
    ac_input part = *in;
    part.rows = count;
    part.x += first * in->k;
    part.q += first * chunks * AC_CHUNK;
    part.scale += first * chunks;
    part.sums += first * chunks * (AC_CHUNK / 32);
    part.fine += first * chunks * AC_CHUNK;
    return part;
}

/* Features [first, last) of every sorted row as floats. */
static void gather(const job *j, int64_t first, int64_t last) {
    const ac_moe *a = j->a;
    for (int64_t r = 0; r < j->rows; r++) {
        const int64_t row = a->per_pair ? j->pair[r] : j->pair[r] / a->top_k;
        float *to = j->x + r * a->k;
        if (a->x_type == AC_F32) {
            memcpy(to + first, (const float *)a->x + row * a->x_stride + first, (size_t)(last - first) * 4);
            continue;
        }
        const uint16_t *from = (const uint16_t *)a->x + row * a->x_stride;
        for (int64_t i = first; i < last; i++)
            to[i] = ac_from_bf16(from[i]);
    }
}

/* Columns [first, last) of the result. */
static void combine(const job *j, int64_t first, int64_t last) {
    const ac_moe *a = j->a;
    const int64_t choices = a->route ? a->top_k : 1, rows = a->route ? a->tokens : a->tokens * a->top_k;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t start = first; start < last; start += 64) {
            const int64_t count = last - start < 64 ? last - start : 64;
            float sum[64] = {0};
            for (int64_t c = 0; c < choices; c++) {
                const int64_t p = t * choices + c, row = j->where[p];
                const float *part = j->y + (row < 0 ? 0 : row) * a->n + start;
                const float weight = a->route ? a->route[p] : 1.0f;
                for (int64_t i = 0; row >= 0 && i < count; i++)
                    sum[i] += weight * part[i];
            }
            if (a->x_type == AC_F32)
                memcpy((float *)a->y + t * a->n + start, sum, (size_t)count * 4);
            for (int64_t i = 0; a->x_type != AC_F32 && i < count; i++)
                ((uint16_t *)a->y)[t * a->n + start + i] = ac_to_bf16(sum[i]);
        }
}

static void body(void *context, int thread, int threads) {
    job *j = context;
    const ac_moe *a = j->a;
    const int64_t chunks = (a->k + AC_CHUNK - 1) / AC_CHUNK;
    int64_t unit = 1, first, last;
    ac_share(chunks, 1, thread, threads, &first, &last);
    if (first < last) {
        ac_input input = j->input; /* a copy: every thread would write the same pointer into it */
        gather(j, first * AC_CHUNK, last * AC_CHUNK < a->k ? last * AC_CHUNK : a->k);
        ac_input_quantize(&input, j->x, first, last);
    }
    ac_barrier(threads);
    for (int64_t i = 0; i < j->runs; i++) {
        int64_t own = ac_linear_unit(&j->run_of[i].weight);
        unit = own > unit ? own : unit; /* units are powers of 2 */
    }
    ac_share(a->n, unit, thread, threads, &first, &last);
    for (int64_t i = 0; first < last && i < j->runs; i++) {
        const run *r = j->run_of + i;
        ac_input part = some_rows(&j->input, r->first, r->count);
        ac_linear_rows(&r->weight, &part, j->y + r->first * a->n, a->n, first, last);
    }
    combine(j, first, last);
}

/* ---- memory ---- */

int ac_moe_linear(const ac_moe *a, int threads) {
    job j = {.a = a};
    const int64_t pairs = a->tokens * a->top_k;
    int64_t slots = 0;
    for (int64_t c = 0; c < a->classes; c++)
        slots += a->pools[c].places;
    const int64_t most_runs = slots < pairs ? slots : pairs;
    const int64_t lists = aligned(pairs * 3 * 8 + slots * 8), runs = aligned(most_runs * (int64_t)sizeof(run));
    const int64_t x = aligned(pairs * a->k * 4), y = aligned(pairs * a->n * 4);
    char *memory = aligned_alloc(64, (size_t)(lists + runs + x + y + aligned(ac_input_bytes(pairs, a->k)) + 64));
    if (!memory)
        return -1;
    j.where = (int64_t *)memory;
    j.pair = j.where + pairs;
    j.run_of = (run *)(memory + lists);
    j.x = (float *)(memory + lists + runs);
    j.y = (float *)(memory + lists + runs + x);
    int64_t *count = j.pair + 2 * pairs;
    memset(count, 0, (size_t)slots * 8);
    int failed = sort_pairs(&j, j.pair + pairs, count);
    if (!failed) {
        ac_input_place(&j.input, j.rows, a->k, memory + lists + runs + x + y);
        j.input.x = j.x;
        ac_region(threads, body, &j);
    }
    free(memory);
    return failed;
}
