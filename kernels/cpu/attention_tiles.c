/* Attention of many queries with a pattern per head: spans, windows with residual, sparse blocks.
 *
 * Keys and values are packed once (keys transposed, so that a vector holds as many keys as it has lanes), then
 * every task takes QUERIES rows of one head through the tiles of KEYS keys that its pattern touches, with a
 * running softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135). Numbers are held in
 * units of 4 bytes: one float, or two bfloat16 where the CPU multiplies those in pairs. */
#include "attention_tiles.h"

#include "pool.h"

/* ---- one tile ---- */

AC_INLINE vf units(int32_t unit) { return (vf)(unit - (vi){0}); }

AC_INLINE vf product(const int pairs, vf sum, vf a, vf b) {
#if PAIRS
    if (pairs)
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    (void)pairs;
    return sum + a * b;
}

AC_INLINE vf load_units(const int32_t *p) { return v_load((const float *)p); }

/* scores[r, KEYS] = queries times keys, for ROWS rows. */
AC_INLINE void multiply_keys(const int pairs, const work *w, const int32_t *query, float *scores) {
    const int64_t depth = w->p->depth;
    for (int panel = 0; panel < PANELS; panel += WIDE) {
        vf sum[ROWS][WIDE];
        AC_UNROLL
        for (int i = 0; i < ROWS * WIDE; i++)
            sum[i / WIDE][i % WIDE] = (vf){0};
        for (int64_t d = 0; d < depth; d++) {
            vf key[WIDE];
            AC_UNROLL
            for (int i = 0; i < WIDE; i++)
                key[i] = load_units(w->key[panel + i] + d * AC_LANES);
            AC_UNROLL
            for (int r = 0; r < ROWS; r++) {
                vf q = units(query[r * depth + d]);
                AC_UNROLL
                for (int i = 0; i < WIDE; i++)
                    sum[r][i] = product(pairs, sum[r][i], q, key[i]);
            }
        }
        AC_UNROLL
        for (int i = 0; i < ROWS * WIDE; i++)
            v_store(scores + i / WIDE * KEYS + (panel + i % WIDE) * AC_LANES, sum[i / WIDE][i % WIDE]);
    }
}

/* acc = old * acc + weights times values, for ROWS rows and `vectors` vectors of features from d on. */
AC_INLINE void multiply_values(const int pairs, const int vectors, const work *w, int64_t row, int64_t d, float *acc) {
    const int steps = pairs ? AC_LANES / 2 : AC_LANES;
    const int64_t padded = w->p->padded;
    vf sum[ROWS][WIDE];
    AC_UNROLL
    for (int i = 0; i < ROWS * vectors; i++)
        sum[i / vectors][i % vectors] =
            v_load(acc + (row + i / vectors) * padded + d + i % vectors * AC_LANES) * w->old[row + i / vectors];
    for (int64_t panel = 0; panel < w->panels; panel++) {
        const int32_t *value = w->value[panel] + d, *weight = w->weights + row * KEYS + panel * steps;
        for (int k = 0; k < steps; k++) {
            vf v[WIDE];
            AC_UNROLL
            for (int i = 0; i < vectors; i++)
                v[i] = load_units(value + k * padded + i * AC_LANES);
            AC_UNROLL
            for (int r = 0; r < ROWS; r++) {
                vf p = units(weight[r * KEYS + k]);
                AC_UNROLL
                for (int i = 0; i < vectors; i++)
                    sum[r][i] = product(pairs, sum[r][i], p, v[i]);
            }
        }
    }
    AC_UNROLL
    for (int i = 0; i < ROWS * vectors; i++)
        v_store(acc + (row + i / vectors) * padded + d + i % vectors * AC_LANES, sum[i / vectors][i % vectors]);
}

AC_INLINE void all_keys(const int pairs, work *w) {
    for (int64_t r = 0; r < w->count; r += ROWS)
        multiply_keys(pairs, w, w->query + r * w->p->depth, w->scores + r * KEYS);
}

AC_INLINE void all_values(const int pairs, work *w, float *acc) {
    for (int64_t r = 0; r < w->count; r += ROWS) {
        int64_t d = 0;
        for (; d + WIDE * AC_LANES <= w->p->padded; d += WIDE * AC_LANES)
            multiply_values(pairs, WIDE, w, r, d, acc);
        for (; d < w->p->padded; d += AC_LANES)
            multiply_values(pairs, 1, w, r, d, acc);
    }
}

/* Lanes of one row's scores that belong to the set (inside: 1, outside: 0), -infinity elsewhere. */
AC_INLINE vf masked(const work *w, int64_t r, int64_t at, int inside, vf x) {
    vi position;
    memcpy(&position, w->position + at, sizeof position);
    vi seen = (vi)(position < w->below[r]) | ((vi)(position >= w->from[r]) & (vi)(position < w->to[r]));
    if (!inside)
        seen = ~seen & (vi)(position < INT32_MAX);
    return v_select(seen, x, v_set(-INFINITY));
}

/* Weights of the tile's keys for softmax number `set`, and the factor for what it has summed so far. `last`:
 * no other set needs the scores, so that masked ones may stay in their place. */
static void weigh(work *w, int set, int edge, int last) {
    const float scale = (float)w->p->x->scale;
    const int64_t rows = ceil_to(w->count, ROWS);
    float *maximum = w->maximum[set], *sum = w->sum[set];
    for (int64_t r = 0; r < rows; r++) {
        vf largest = v_set(-INFINITY);
        for (int64_t at = 0; at < KEYS; at += AC_LANES) {
            vf x = v_load(w->scores + r * KEYS + at);
            if (edge) {
                x = masked(w, r, at, !set, x);
                if (last)
                    v_store(w->scores + r * KEYS + at, x);
            }
            largest = v_max(largest, x);
        }
        w->largest[r] = v_largest(largest);
    }
    for (int64_t r = 0; r < rows; r += AC_LANES) {
        vf now = v_max(v_load(maximum + r), v_load(w->largest + r) * scale);
        v_store(w->old + r, v_exp(v_load(maximum + r) - now));
        v_store(maximum + r, now);
    }
    for (int64_t r = 0; r < rows; r++) {
        vf total = {0};
        for (int64_t at = 0; at < KEYS; at += AC_LANES) {
            vf x = v_load(w->scores + r * KEYS + at);
            x = v_exp((edge && !last ? masked(w, r, at, !set, x) : x) * scale - maximum[r]);
            total += x;
#if PAIRS
            if (w->p->pairs) {
                _mm256_storeu_si256((__m256i *)(w->weights + r * KEYS + at / 2), (__m256i)_mm512_cvtneps_pbh((__m512)x));
                continue;
            }
#endif
            v_store((float *)(w->weights + r * KEYS + at), x);
        }
        sum[r] = sum[r] * w->old[r] + v_sum(total);
    }
}

static void add_to(work *w, int set, int edge, int last) {
    weigh(w, set, edge, last);
    if (w->p->pairs)
        all_values(1, w, w->acc[set]);
    else
        all_values(0, w, w->acc[set]);
}

/* Take the tile's panels (filled up with empty lanes to a whole tile) into the running softmaxes. */
static void take_tile(work *w, int kind, int split) {
    if (w->panels == 0)
        return;
    for (int64_t i = w->panels; i < PANELS; i++) {
        w->key[i] = w->key[0];
        for (int lane = 0; lane < AC_LANES; lane++)
            w->position[i * AC_LANES + lane] = INT32_MAX;
    }
    int empty = w->panels < PANELS || w->position[KEYS - 1] == INT32_MAX;
    if (w->p->pairs)
        all_keys(1, w);
    else
        all_keys(0, w);
    int outside = split && kind != INSIDE;
    if (kind != OUTSIDE)
        add_to(w, 0, kind == EDGE || empty, !outside);
    if (outside)
        add_to(w, 1, kind == EDGE || empty, 1);
    w->panels = 0;
}

static void add_panel(work *w, int64_t panel) {
    const plan *p = w->p;
    const int64_t at = w->pack * p->blocks * p->block_panels + panel, inside = panel % p->block_panels * AC_LANES;
    w->key[w->panels] = p->keys + at * p->key_units;
    w->value[w->panels] = p->values + at * p->value_units;
    for (int64_t lane = 0; lane < AC_LANES; lane++) {
        int64_t position = panel / p->block_panels * p->block + inside + lane;
        int none = inside + lane >= p->block || position >= p->x->tokens;
        w->position[w->panels * AC_LANES + lane] = none ? INT32_MAX : (int32_t)position;
    }
    w->panels++;
}

/* ---- patterns ---- */

/* What query number r of the task sees. */
static void see(work *w, int64_t r) {
    const ac_pattern *x = w->p->x;
    const int64_t i = w->first + r, n = x->tokens;
    int64_t below = n, from = 0, to = 0; /* all */
    if (x->pattern == SPANS) {
        below = least(x->sink[w->h], i + 1);
        from = most(i + 1 - x->window[w->h], 0);
        to = i + 1;
    } else if (x->pattern == WINDOWS && i >= x->prefix && x->mode[w->h] != FULL) {
        below = least(x->prefix, n);
        from = most(i - x->window[w->h], 0);
        to = least(i + x->window[w->h] + 1, n);
    }
    w->below[r] = (int32_t)below;
    w->from[r] = (int32_t)from;
    w->to[r] = (int32_t)to;
}

static void see_all(work *w) {
    w->least_below = w->least_from = w->least_to = INT32_MAX;
    w->most_below = w->most_from = w->most_to = 0;
    for (int64_t r = 0; r < w->count; r++) {
        see(w, r);
        w->least_below = (int32_t)least(w->least_below, w->below[r]);
        w->most_below = (int32_t)most(w->most_below, w->below[r]);
        w->least_from = (int32_t)least(w->least_from, w->from[r]);
        w->most_from = (int32_t)most(w->most_from, w->from[r]);
        w->least_to = (int32_t)least(w->least_to, w->to[r]);
        w->most_to = (int32_t)most(w->most_to, w->to[r]);
    }
    for (int64_t r = w->count; r < ceil_to(w->count, ROWS); r++) /* rows that fill up the last four */
        w->below[r] = w->from[r] = w->to[r] = 0;
}

/* How keys [first, last) lie to what the task's queries see. EDGE is never wrong, only slower. */
static int place(const work *w, int64_t first, int64_t last) {
    if (last <= w->least_below || (first >= w->most_from && last <= w->least_to))
        return INSIDE;
    return first >= w->most_below && (last <= w->least_from || first >= w->most_to) ? OUTSIDE : EDGE;
}

static void run_pattern(work *w, int split) {
    const ac_pattern *x = w->p->x;
    if (x->pattern == BLOCKS) {
        const int32_t *row = x->row_ptr + w->h * (w->p->blocks + 1) + w->first / w->p->block;
        for (int64_t i = row[0]; i < row[1]; i++)
            for (int64_t panel = 0; panel < w->p->block_panels; panel++) {
                add_panel(w, x->col[i] * w->p->block_panels + panel);
                if (w->panels == PANELS)
                    take_tile(w, INSIDE, 0);
            }
        take_tile(w, INSIDE, 0);
        return;
    }
    const int64_t step = split ? KEYS : AC_LANES; /* nothing is left out: whole tiles; else panels are picked */
    int tile = INSIDE;
    for (int64_t first = 0; first < x->tokens; first += step) {
        int64_t last = least(first + step, x->tokens);
        int kind = place(w, first, last);
        if (kind == OUTSIDE && !split)
            continue;
        for (int64_t panel = first / AC_LANES; panel * AC_LANES < last; panel++)
            add_panel(w, panel);
        tile = split || kind == EDGE ? kind : tile;
        if (split || w->panels == PANELS) {
            take_tile(w, tile, split);
            tile = INSIDE;
        }
    }
    take_tile(w, tile, split);
}

/* ---- one task: some queries of one head ---- */

static void write_row(const ac_pattern *x, void *out, int64_t row, const float *y) {
    if (x->q.bits == 32)
        memcpy((float *)out + row * x->dim, y, (size_t)x->dim * 4);
    else
        for (int64_t d = 0; d < x->dim; d++)
            ((uint16_t *)out)[row * x->dim + d] = to_bf16(y[d]);
}

/* The results of query r: the normalized sums, joined with the residual as the head's mode says. */
static void finish_row(work *w, int64_t r, float *y) {
    const ac_pattern *x = w->p->x;
    const int64_t row = (w->b * x->heads + w->h) * x->tokens + token_at(x, w->h, w->first + r);
    const int64_t bytes = x->dim * x->q.bits / 8, mode = x->pattern == WINDOWS ? x->mode[w->h] : FULL;
    const char *held = x->residual ? (const char *)x->residual + row * bytes : NULL;
    const float *inside = w->acc[0] + r * w->p->padded, *outside = w->acc[1] + r * w->p->padded;
    float near = w->sum[0][r] > 0 ? 1.0f / w->sum[0][r] : 0.0f;
    for (int64_t d = 0; d < x->dim; d++)
        y[d] = inside[d] * near;
    if (mode == WINDOW_ADD && held)
        for (int64_t d = 0; d < x->dim; d++)
            y[d] += element(held, d, x->q.bits);
    if (mode == FULL_SAVE) {
        float *saved = y + x->dim, top = w->maximum[0][r] > w->maximum[1][r] ? w->maximum[0][r] : w->maximum[1][r];
        float a = expf(w->maximum[0][r] - top), b = expf(w->maximum[1][r] - top);
        float all = 1.0f / (a * w->sum[0][r] + b * w->sum[1][r]);
        for (int64_t d = 0; d < x->dim; d++) {
            float full = (a * inside[d] + b * outside[d]) * all;
            saved[d] = full - y[d];
            y[d] = full;
        }
        write_row(x, x->saved, row, saved);
    } else if (x->saved) {
        if (held)
            memcpy((char *)x->saved + row * bytes, held, (size_t)bytes);
        else
            memset((char *)x->saved + row * bytes, 0, (size_t)bytes);
    }
    write_row(x, x->out, row, y);
}

/* A head that computes nothing: its rows are those that are held, or zeros. */
static void reuse_rows(const work *w) {
    const ac_pattern *x = w->p->x;
    const int64_t bytes = x->dim * x->q.bits / 8, at = ((w->b * x->heads + w->h) * x->tokens + w->first) * bytes;
    void *to[2] = {x->out, x->saved};
    for (int i = 0; i < 2; i++) {
        if (to[i] && x->residual)
            memcpy((char *)to[i] + at, (const char *)x->residual + at, (size_t)(w->count * bytes));
        else if (to[i])
            memset((char *)to[i] + at, 0, (size_t)(w->count * bytes));
    }
}

static void run_task(work *w) {
    const plan *p = w->p;
    const ac_pattern *x = p->x;
    const int64_t mode = x->pattern == WINDOWS ? x->mode[w->h] : FULL;
    w->pack = w->b * (p->packs / x->batch) + (x->order ? w->h : w->h / (x->heads / x->kv_heads));
    w->panels = 0;
    if (mode == REUSE) {
        reuse_rows(w);
        return;
    }
    memset(w->query, 0, (size_t)(QUERIES * p->depth) * 4);
    for (int64_t r = 0; r < w->count; r++)
        read_row(p, &x->q, row_of(&x->q, w->b, w->h, token_at(x, w->h, w->first + r)), w->query + r * p->depth);
    see_all(w);
    for (int set = 0; set <= (mode == FULL_SAVE); set++) {
        memset(w->acc[set], 0, (size_t)(QUERIES * p->padded) * 4);
        memset(w->sum[set], 0, sizeof w->sum[set]);
        for (int64_t r = 0; r < QUERIES; r++)
            w->maximum[set][r] = -1e30f;
    }
    run_pattern(w, mode == FULL_SAVE);
    for (int64_t r = 0; r < w->count; r++)
        finish_row(w, r, (float *)w->scores);
}

/* ---- all tasks ---- */

static int64_t space_bytes(const plan *p) {
    return ceil_to((int64_t)sizeof(work) + QUERIES * (p->depth + 2 * p->padded) * 4 + 64, 64);
}

static void body(void *context, int thread, int threads) {
    plan *p = context;
    const ac_pattern *x = p->x;
    work *w = (work *)(p->spaces + thread * space_bytes(p));
    w->p = p;
    w->query = (int32_t *)(intptr_t)ceil_to((int64_t)(intptr_t)(w + 1), 64);
    w->acc[0] = (float *)(w->query + QUERIES * p->depth);
    w->acc[1] = w->acc[0] + QUERIES * p->padded;
    long first, last;
    ac_share(p->packs * p->blocks * p->block_panels, 8, thread, threads, &first, &last);
    for (long i = first; i < last; i++) {
        int64_t panels = p->blocks * p->block_panels;
        if (needed(p, i / panels))
            pack_panel(p, i / panels, i % panels, w->query);
    }
    ac_barrier(threads);
    /* Pieces of a block's queries; the last first, they see most when attention is causal. */
    const int64_t pieces = (p->block + p->rows - 1) / p->rows, tasks = p->blocks * pieces, pairs = x->batch * x->heads;
    for (;;) {
        int64_t task = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
        if (task >= tasks * pairs)
            return;
        int64_t piece = tasks - 1 - task / pairs, begin = piece / pieces * p->block;
        w->b = task % pairs / x->heads;
        w->h = task % pairs % x->heads;
        w->first = begin + piece % pieces * p->rows;
        w->count = least(least(w->first + p->rows, begin + p->block), x->tokens) - w->first;
        if (w->count > 0)
            run_task(w);
    }
}

/* Queries of a task: half as many for windows that then take fewer tiles each. With w keys to each side, a task
 * looks at its own rows + 2 w keys, in whole tiles. */
static int64_t rows_of(const ac_pattern *x) {
    if (x->pattern != WINDOWS || x->prefix > 0)
        return QUERIES;
    int64_t window = 0;
    for (int64_t h = 0; h < x->heads; h++) {
        if (x->mode[h] == FULL || x->mode[h] == FULL_SAVE)
            return QUERIES;
        window = x->mode[h] == WINDOW_ADD ? most(window, x->window[h]) : window;
    }
    int64_t around = 2 * ceil_to(least(window, x->tokens), AC_LANES);
    return ceil_to(QUERIES / 2 + around, KEYS) < ceil_to(QUERIES + around, KEYS) ? QUERIES / 2 : QUERIES;
}

static plan plan_of(const ac_pattern *x) {
    plan p = {.x = x, .padded = ceil_to(x->dim, AC_LANES), .rows = rows_of(x)};
    p.block = x->pattern == BLOCKS ? least(x->block, x->tokens) : x->tokens;
    p.pairs = PAIRS && x->q.bits == 16 && x->k.bits == 16 && x->v.bits == 16;
    p.depth = p.pairs ? (x->dim + 1) / 2 : x->dim;
    p.blocks = (x->tokens + p.block - 1) / p.block;
    p.block_panels = (p.block + AC_LANES - 1) / AC_LANES;
    p.packs = x->batch * (x->order ? x->heads : x->kv_heads);
    p.key_units = p.depth * AC_LANES;
    p.value_units = p.padded * (p.pairs ? AC_LANES / 2 : AC_LANES);
    return p;
}

/* Bytes that ac_attend_pattern needs. */
int64_t ac_pattern_space(const ac_pattern *x) {
    plan p = plan_of(x);
    return p.packs * p.blocks * p.block_panels * (p.key_units + p.value_units) * 4 + x->threads * space_bytes(&p) + 128;
}

void ac_attend_pattern(const ac_pattern *x, void *space) {
    plan p = plan_of(x);
    const int64_t panels = p.packs * p.blocks * p.block_panels;
    p.keys = (int32_t *)(intptr_t)ceil_to((int64_t)(intptr_t)space, 64);
    p.values = p.keys + panels * p.key_units;
    p.spaces = (char *)(intptr_t)ceil_to((int64_t)(intptr_t)(p.values + panels * p.value_units), 64);
    ac_region((int)x->threads, body, &p);
}
