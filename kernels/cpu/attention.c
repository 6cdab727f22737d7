/* Decode attention over a cache of 32, 16, 8 or 4 bits, and storing into it. */
#include "attention.h"

#include <stdatomic.h>

#include "attention_block.h"
#include "pool.h"

/* Number of the first slot of (b, head) in the whole cache. */
static int64_t first_slot(const ac_cache *c, int64_t b, int64_t head) {
    if (c->head_start)
        return b * c->head_start[c->kv_heads] + c->head_start[head];
    return (b * c->kv_heads + head) * c->capacity;
}

/* ---- storing ---- */

/* Codes, scale and minimum of one row, as the reference computes them, bit for bit. */
static void quantize_row(const float *x, int64_t dim, int64_t bits, uint8_t *codes, float *scale, float *minimum) {
    float low = x[0], high = x[0];
    for (int64_t d = 1; d < dim; d++) {
        low = x[d] < low ? x[d] : low;
        high = x[d] > high ? x[d] : high;
    }
    int top = (1 << bits) - 1;
    float step = (high - low) / (float)top;
    *scale = step;
    *minimum = low;
    for (int64_t d = 0; d < dim; d++) {
        float code = step > 0 ? rintf((x[d] - low) / step) : 0.0f;
        uint8_t u = (uint8_t)(code < 0 ? 0 : code > (float)top ? (float)top : code);
        if (bits == 8)
            codes[d] = u;
        else
            codes[d / 2] = (uint8_t)(d % 2 ? codes[d / 2] | u << 4 : u);
    }
}

static void store_row(void *rows, float *scale, float *minimum, int64_t slot, int64_t dim, int64_t bits, const float *x) {
    if (bits == AC_KV_F32)
        memcpy((float *)rows + slot * dim, x, (size_t)dim * sizeof(float));
    else if (bits == AC_KV_BF16)
        for (int64_t d = 0; d < dim; d++)
            ((uint16_t *)rows)[slot * dim + d] = to_bf16(x[d]);
    else
        quantize_row(x, dim, bits, (uint8_t *)rows + slot * row_bytes(bits, dim), scale + slot, minimum + slot);
}

void ac_cache_append(const ac_cache *c, const float *k, const float *v, int64_t position, int64_t b, int64_t head) {
    int64_t slot = position;
    if (c->window) {
        int64_t window = c->window[head], sink = c->sink[head];
        if (position >= sink) {
            if (!window)
                return;
            slot = sink + (position - sink) % window;
        }
    }
    slot += first_slot(c, b, head);
    int64_t row = (b * c->kv_heads + head) * c->dim;
    store_row(c->k, c->k_scale, c->k_min, slot, c->dim, c->key_bits, k + row);
    store_row(c->v, c->v_scale, c->v_min, slot, c->dim, c->value_bits, v + row);
}

/* ---- which slots are seen ---- */

typedef struct {
    int64_t first, last;
} run;

/* The slots of the tokens that are seen, as at most three runs; returns how many there are. */
static int seen_runs(const ac_cache *c, int64_t length, int64_t head, int64_t window, run runs[3]) {
    int64_t from = window > 0 && window < length ? length - window : 0;
    int count = 0;
    if (!c->window) {
        runs[count++] = (run){from, length};
        return count;
    }
    int64_t span = c->window[head], sink = c->sink[head];
    if (from < least(sink, length))
        runs[count++] = (run){from, least(sink, length)};
    int64_t start = most(most(from, sink), length - span), tokens = length - start;
    if (tokens <= 0)
        return count;
    int64_t slot = tokens == span ? 0 : (start - sink) % span;
    runs[count++] = (run){sink + slot, sink + least(slot + tokens, span)};
    if (slot + tokens > span)
        runs[count++] = (run){sink, sink + slot + tokens - span};
    return count;
}

int64_t ac_attend_tokens(const ac_cache *c, int64_t length, int64_t head, int64_t window) {
    run runs[3];
    int64_t tokens = 0;
    for (int i = 0, n = seen_runs(c, length, head, window, runs); i < n; i++)
        tokens += runs[i].last - runs[i].first;
    return tokens;
}

/* ---- attention ---- */

static int64_t padded_dim(const ac_cache *c) { return ceil_to(c->dim, 128); }

int64_t ac_attend_state(const ac_cache *c) { return c->heads / c->kv_heads * (padded_dim(c) + 2); }

static int64_t part_space(const ac_cache *c) {
    int64_t groups = c->heads / c->kv_heads, padded = padded_dim(c);
    return groups * (padded + 2 * padded / 4 + 2 + TOKENS) + 16;
}

int64_t ac_attend_space(const ac_cache *c, int64_t length) {
    (void)length;
    return part_space(c) + ac_attend_state(c);
}

/* Lay the queries of one group out in `space` and start their softmax. */
static void prepare(const ac_cache *c, group *g, const float *q, float *state, float scale, float softcap,
                    float *space) {
    *g = (group){.dim = c->dim, .padded = padded_dim(c), .groups = c->heads / c->kv_heads, .softcap = softcap};
    g->q = space;
    g->halves = (int8_t *)(g->q + g->groups * g->padded);
    g->q_step = g->q + g->groups * (g->padded + 2 * g->padded / 4);
    g->q_sum = g->q_step + g->groups;
    g->p = g->q_sum + g->groups;
    g->state = state;
    for (int64_t h = 0; h < g->groups; h++) {
        float *row = g->q + h * g->padded, sum = 0;
        for (int64_t d = 0; d < g->padded; d++)
            row[d] = d < g->dim ? q[h * g->dim + d] * scale : 0.0f;
        for (int64_t d = 0; d < g->dim; d++)
            sum += row[d];
        g->q_step[h] = 1.0f;
        g->q_sum[h] = sum;
        memset(state + h * (g->padded + 2), 0, (size_t)(g->padded + 2) * sizeof(float));
        state[h * (g->padded + 2)] = -1e30f;
    }
#if INTEGER_KEYS
    if (c->key_bits <= AC_KV_INT8)
        prepare_integers(g, c->key_bits);
#endif
}

void ac_attend_part(const ac_cache *c, const float *q, float *state, int64_t length, int64_t b, int64_t head,
                    int64_t first, int64_t last, float scale, float softcap, int64_t window, float *space) {
    group g;
    run runs[3];
    int64_t base = first_slot(c, b, head), passed = 0;
    prepare(c, &g, q + (b * c->heads + head * (c->heads / c->kv_heads)) * c->dim, state, scale, softcap, space);
    for (int i = 0, count = seen_runs(c, length, head, window, runs); i < count; i++) {
        int64_t from = runs[i].first + most(first - passed, 0);
        int64_t to = least(runs[i].last, runs[i].first + last - passed);
        passed += runs[i].last - runs[i].first;
        for (int64_t slot = from; slot < to; slot += TOKENS)
            attend_block(c, &g, base + slot, least(TOKENS, to - slot));
    }
}

void ac_attend_merge(const ac_cache *c, const float *states, int64_t count, float *out, int64_t b, int64_t head) {
    int64_t groups = c->heads / c->kv_heads, row = padded_dim(c) + 2, size = groups * row;
    for (int64_t h = 0; h < groups; h++) {
        const float *state = states + h * row;
        float *y = out + (b * c->heads + head * groups + h) * c->dim, maximum = -1e30f, sum = 0;
        for (int64_t i = 0; i < count; i++)
            maximum = state[i * size] > maximum ? state[i * size] : maximum;
        for (int64_t i = 0; i < count; i++)
            sum += state[i * size + 1] * expf(state[i * size] - maximum);
        memset(y, 0, (size_t)c->dim * sizeof(float));
        for (int64_t i = 0; i < count; i++) {
            float share = sum > 0 ? expf(state[i * size] - maximum) / sum : 0.0f;
            for (int64_t d = 0; d < c->dim; d++)
                y[d] += share * state[i * size + 2 + d];
        }
    }
}

void ac_attend(const ac_cache *c, const float *q, float *out, int64_t length, int64_t b, int64_t head,
               float scale, float softcap, int64_t window, float *space) {
    float *state = space + part_space(c);
    int64_t tokens = ac_attend_tokens(c, length, head, window);
    ac_attend_part(c, q, state, length, b, head, 0, tokens, scale, softcap, window, space);
    ac_attend_merge(c, state, 1, out, b, head);
}

/* ---- entry points of the operators: all sequences and heads, shared out among threads ---- */

typedef struct {
    const ac_cache *c;
    const float *q;
    float *out;
    const int32_t *lengths; /* [batch] */
    float scale, softcap;
    int64_t window, piece, pieces; /* tokens of a piece, most pieces of a head */
    float *states, *spaces;
    atomic_llong next;
} decode;

static void decode_body(void *context, int thread, int threads) {
    decode *x = context;
    const ac_cache *c = x->c;
    int64_t pairs = c->batch * c->kv_heads, size = ac_attend_state(c);
    float *space = x->spaces + thread * part_space(c);
    for (;;) {
        int64_t task = atomic_fetch_add_explicit(&x->next, 1, memory_order_relaxed);
        if (task >= pairs * x->pieces)
            break;
        int64_t b = task / x->pieces / c->kv_heads, head = task / x->pieces % c->kv_heads;
        int64_t first = task % x->pieces * x->piece, tokens = ac_attend_tokens(c, x->lengths[b], head, x->window);
        ac_attend_part(c, x->q, x->states + task * size, x->lengths[b], b, head, first,
                       least(first + x->piece, tokens), x->scale, x->softcap, x->window, space);
    }
    ac_barrier(threads);
    for (int64_t pair = thread; pair < pairs; pair += threads)
        ac_attend_merge(c, x->states + pair * x->pieces * size, x->pieces, x->out, pair / c->kv_heads, pair % c->kv_heads);
}

/* Tokens of a piece: some pieces a thread, so that heads of unlike length even out, none too small. */
static int64_t piece_tokens(const ac_cache *c, const int32_t *lengths, int64_t window, int64_t threads, int64_t *longest) {
    int64_t total = 0;
    *longest = 0;
    for (int64_t pair = 0; pair < c->batch * c->kv_heads; pair++) {
        int64_t tokens = ac_attend_tokens(c, lengths[pair / c->kv_heads], pair % c->kv_heads, window);
        total += tokens;
        *longest = most(*longest, tokens);
    }
    return most(ceil_to(total / (threads * 4) + 1, TOKENS), 4 * TOKENS);
}

/* Floats that ac_decode needs. */
int64_t ac_decode_space(const ac_cache *c, const int32_t *lengths, int64_t window, int64_t threads) {
    int64_t longest, piece = piece_tokens(c, lengths, window, threads, &longest);
    int64_t pieces = most((longest + piece - 1) / piece, 1);
    return c->batch * c->kv_heads * pieces * ac_attend_state(c) + threads * part_space(c);
}

/* ac_attend for all sequences and heads; lengths [batch]. */
void ac_decode(const ac_cache *c, const float *q, float *out, const int32_t *lengths, float scale, float softcap,
               int64_t window, int64_t threads, float *space) {
    int64_t longest, piece = piece_tokens(c, lengths, window, threads, &longest);
    int64_t pieces = most((longest + piece - 1) / piece, 1);
    decode x = {c, q, out, lengths, scale, softcap, window, piece, pieces, space, NULL, 0};
    x.spaces = space + c->batch * c->kv_heads * pieces * ac_attend_state(c);
    ac_region((int)threads, decode_body, &x);
}

/* One token of all sequences and heads, number positions[b] (0-based) of its own sequence. */
void ac_append_each(const ac_cache *c, const float *k, const float *v, const int32_t *positions) {
    for (int64_t pair = 0; pair < c->batch * c->kv_heads; pair++)
        ac_cache_append(c, k, v, positions[pair / c->kv_heads], pair / c->kv_heads, pair % c->kv_heads);
}

/* ---- the decode step: threads that are in a region already ---- */

/* How many of one head's `tokens`, which begin at `start` of a `total` over all heads and sequences, come before
 * the share of `thread`. */
static int64_t edge(int64_t start, int64_t tokens, int64_t total, int thread, int threads) {
    int64_t cut = total * thread / threads - start;
    return least(most(ceil_to(cut, TOKENS / 4), 0), tokens);
}

void ac_attend_share(const ac_cache *c, const float *q, const float *k, const float *v, float *out, int64_t position,
                     float scale, float softcap, int64_t window, int thread, int threads, float *space,
                     float *states) {
    int64_t heads = c->kv_heads, pairs = c->batch * heads, size = ac_attend_state(c), length = position + 1;
    int64_t total = 0, start = 0;
    for (int64_t head = 0; head < heads; head++)
        total += c->batch * ac_attend_tokens(c, length, head, window);
    for (int64_t pair = thread; pair < pairs; pair += threads)
        ac_cache_append(c, k, v, position, pair / heads, pair % heads);
    ac_barrier(threads);
    /* Shares are in the order of heads, so no two (thread, head) that meet have the same sum. */
    for (int64_t pair = 0; pair < pairs; pair++) {
        int64_t tokens = ac_attend_tokens(c, length, pair % heads, window);
        int64_t first = edge(start, tokens, total, thread, threads), last = edge(start, tokens, total, thread + 1, threads);
        if (first < tokens && last > 0)
            ac_attend_part(c, q, states + (thread + pair) * size, length, pair / heads, pair % heads, first, last,
                           scale, softcap, window, space);
        start += tokens;
    }
    ac_barrier(threads);
    start = 0;
    for (int64_t pair = 0; pair < pairs; pair++) {
        int64_t tokens = ac_attend_tokens(c, length, pair % heads, window);
        int from = 0, to = threads;
        while (pair % threads == thread && from < to && edge(start, tokens, total, from + 1, threads) == 0)
            from++;
        while (pair % threads == thread && to > from && edge(start, tokens, total, to - 1, threads) == tokens)
            to--;
        if (pair % threads == thread)
            ac_attend_merge(c, states + (from + pair) * size, to - from, out, pair / heads, pair % heads);
        start += tokens;
    }
}

typedef struct {
    const float *x;
    int64_t rows, dim, bits;
    uint8_t *codes;
    float *scale, *minimum;
} quantize;

static void quantize_body(void *context, int thread, int threads) {
    const quantize *a = context;
    long first, last;
    ac_share(a->rows, 16, thread, threads, &first, &last);
    for (long r = first; r < last; r++)
        quantize_row(a->x + r * a->dim, a->dim, a->bits, a->codes + r * row_bytes(a->bits, a->dim), a->scale + r, a->minimum + r);
}

/* Rows x [rows, dim] as codes [rows, dim * bits / 8] with scale and minimum [rows]. */
void ac_kv_quantize(const float *x, int64_t rows, int64_t dim, int64_t bits, uint8_t *codes, float *scale,
                    float *minimum, int64_t threads) {
    quantize a = {x, rows, dim, bits, codes, scale, minimum};
    ac_region((int)threads, quantize_body, &a);
}
