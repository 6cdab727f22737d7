#include "step.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "attention.h"
#include "linear.h"
#include "pool.h"

/* exp(x) to about 2 ulp in straight-line code that compilers vectorize: 2^n times a polynomial in
 * [-ln2/2, ln2/2] (Taylor to degree 7; the error at 0.35 is below 1e-8). */
static inline float fast_exp(float x) {
    float clipped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = __builtin_floorf(clipped * 1.44269504f + 0.5f);
    float r = clipped - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { int32_t i; float f; } power;
    power.i = ((int32_t)n + 127) << 23;
    float y = p * power.f;
    return x != x ? x : x < -87.0f ? 0.0f : y; /* NaN stays NaN */
}

static inline float fast_tanh(float x) {
    float e = fast_exp(-2.0f * (x < 0 ? -x : x));
    float y = (1.0f - e) / (1.0f + e);
    /* Near zero the difference of two almost equal numbers has no digits left: the series has. */
    float small = x * (1.0f - x * x * (1.0f / 3.0f));
    return x > -0.02f && x < 0.02f ? small : x < 0 ? -y : y;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

static inline float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + fast_tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
}

static inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067812f)); }

/* ---- elementwise ---- */

#define LOOP(expression)                                                     \
    do {                                                                     \
        if (sa == 1 && so == 1)                                              \
            for (int64_t i = 0; i < n; i++) { float x = a[i]; o[i] = (expression); } \
        else                                                                 \
            for (int64_t i = 0; i < n; i++) { float x = a[i * sa]; o[i * so] = (expression); } \
    } while (0)

static void unary_run(const ac_op *op, float *o, const float *a, int64_t n, int64_t so, int64_t sa) {
    float alpha = (float)op->alpha, beta = (float)op->beta;
    switch (op->kind) {
    case AC_COPY:
        if (sa == 1 && so == 1) memmove(o, a, (size_t)n * sizeof(float));
        else LOOP(x);
        break;
    case AC_NEG: LOOP(-x); break;
    case AC_ABS: LOOP(x < 0 ? -x : x); break;
    case AC_SQRT: LOOP(__builtin_sqrtf(x)); break;
    case AC_RSQRT: LOOP(1.0f / __builtin_sqrtf(x)); break;
    case AC_RECIPROCAL: LOOP(1.0f / x); break;
    case AC_SQUARE: LOOP(x * x); break;
    case AC_EXP: LOOP(fast_exp(x)); break;
    case AC_LOG: LOOP(logf(x)); break;
    case AC_SIN: LOOP(sinf(x)); break;
    case AC_COS: LOOP(cosf(x)); break;
    case AC_TANH: LOOP(fast_tanh(x)); break;
    case AC_SIGMOID: LOOP(sigmoid(x)); break;
    case AC_SILU: LOOP(x * sigmoid(x)); break;
    case AC_RELU: LOOP(x > 0 ? x : 0.0f); break;
    case AC_GELU: LOOP(gelu(x)); break;
    case AC_GELU_TANH: LOOP(gelu_tanh(x)); break;
    case AC_POW: LOOP(powf(x, alpha)); break;
    case AC_SCALE: LOOP(x * alpha); break;
    case AC_SHIFT: LOOP(x + alpha); break;
    case AC_CLAMP: LOOP(x < alpha ? alpha : x > beta ? beta : x); break;
    case AC_FLOOR: LOOP(__builtin_floorf(x)); break;
    }
}

#define LOOP2(expression)                                                                        \
    do {                                                                                         \
        if (so == 1 && sa == 1 && sb == 1)                                                       \
            for (int64_t i = 0; i < n; i++) { float x = a[i], y = b[i]; o[i] = (expression); }   \
        else if (so == 1 && sa == 1 && sb == 0) {                                                \
            float y = b[0];                                                                      \
            for (int64_t i = 0; i < n; i++) { float x = a[i]; o[i] = (expression); }             \
        } else                                                                                   \
            for (int64_t i = 0; i < n; i++) { float x = a[i * sa], y = b[i * sb]; o[i * so] = (expression); } \
    } while (0)

static void binary_run(const ac_op *op, float *o, const float *a, const float *b, int64_t n, int64_t so,
                       int64_t sa, int64_t sb) {
    float alpha = (float)op->alpha;
    switch (op->kind) {
    case AC_ADD:
        if (alpha == 1.0f) LOOP2(x + y);
        else LOOP2(x + alpha * y);
        break;
    case AC_MUL: LOOP2(x * y); break;
    case AC_DIV: LOOP2(x / y); break;
    case AC_MAX: LOOP2(x > y ? x : y); break;
    case AC_MIN: LOOP2(x < y ? x : y); break;
    }
}

static void elementwise(const ac_op *op) {
    const int64_t *s = op->size, *so = op->stride_out, *sa = op->stride_a, *sb = op->stride_b;
    for (int64_t i = 0; i < s[0]; i++)
        for (int64_t j = 0; j < s[1]; j++)
            for (int64_t k = 0; k < s[2]; k++) {
                float *o = op->out + i * so[0] + j * so[1] + k * so[2];
                const float *a = op->a + i * sa[0] + j * sa[1] + k * sa[2];
                if (op->kind < AC_ADD)
                    unary_run(op, o, a, s[3], so[3], sa[3]);
                else
                    binary_run(op, o, a, op->b + i * sb[0] + j * sb[1] + k * sb[2], s[3], so[3], sa[3], sb[3]);
            }
}

/* ---- over rows: contiguous a [n0, n1] ---- */

static float row_sum(const float *a, int64_t n) {
    float part[16] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++)
            part[l] += a[i + l];
    for (; i < n; i++)
        sum += a[i];
    for (int l = 0; l < 16; l++)
        sum += part[l];
    return sum;
}

static float row_max(const float *a, int64_t n) {
    float m = -FLT_MAX;
    for (int64_t i = 0; i < n; i++)
        m = a[i] > m ? a[i] : m;
    return m;
}

static void softmax_row(const float *a, float *o, int64_t n) {
    float m = row_max(a, n);
    for (int64_t i = 0; i < n; i++)
        o[i] = fast_exp(a[i] - m);
    float scale = 1.0f / row_sum(o, n);
    for (int64_t i = 0; i < n; i++)
        o[i] *= scale;
}

/* The k largest in falling order, values to o and positions to index; the first of equals wins. */
static void topk_row(const float *a, float *o, float *index, int64_t n, int64_t k) {
    float bound = INFINITY;
    int64_t last = -1;
    for (int64_t t = 0; t < k; t++) {
        int64_t best = -1;
        for (int64_t i = 0; i < n; i++) {
            int taken = a[i] > bound || (a[i] == bound && i <= last);
            if (!taken && (best < 0 || a[i] > a[best]))
                best = i;
        }
        best = best < 0 ? t : best; /* NaN: any position, the value says what is wrong */
        o[t] = a[best], index[t] = (float)best;
        bound = a[best], last = best;
    }
}

/* weight c and bias b may be null; eps is alpha. */
static void layer_norm_row(const float *a, float *o, const float *weight, const float *bias, int64_t n, float eps,
                           int centred) {
    float mean = centred ? row_sum(a, n) / (float)n : 0.0f, square[16] = {0}, rest = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++)
            square[l] += (a[i + l] - mean) * (a[i + l] - mean);
    for (; i < n; i++)
        rest += (a[i] - mean) * (a[i] - mean);
    float scale = 1.0f / sqrtf((rest + row_sum(square, 16)) / (float)n + eps);
    for (i = 0; i < n; i++)
        o[i] = (a[i] - mean) * scale * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
}

static void over_rows(const ac_op *op) {
    int64_t n = op->n[1], k = op->n[2];
    for (int64_t r = 0; r < op->n[0]; r++) {
        const float *a = op->a + r * n;
        switch (op->kind) {
        case AC_SUM: op->out[r] = row_sum(a, n) * (float)op->alpha; break;
        case AC_AMAX: op->out[r] = row_max(a, n); break;
        case AC_SOFTMAX: softmax_row(a, op->out + r * n, n); break;
        case AC_TOPK: topk_row(a, op->out + r * k, (float *)op->b + r * k, n, k); break;
        case AC_LAYER_NORM: layer_norm_row(a, op->out + r * n, op->c, op->b, n, (float)op->alpha, 1); break;
        case AC_RMS_NORM: layer_norm_row(a, op->out + r * n, op->c, op->b, n, (float)op->alpha, 0); break;
        case AC_CUMSUM: {
            float sum = 0;
            for (int64_t i = 0; i < n; i++)
                op->out[r * n + i] = sum += a[i];
            break;
        }
        }
    }
}

static void matmul(const ac_op *op) {
    const int64_t *so = op->stride_out, *sa = op->stride_a, *sb = op->stride_b;
    for (int64_t t = 0; t < op->n[0]; t++)
        for (int64_t i = 0; i < op->n[1]; i++)
            for (int64_t j = 0; j < op->n[3]; j++) {
                float sum = 0;
                for (int64_t k = 0; k < op->n[2]; k++)
                    sum += op->a[t * sa[1] + i * sa[2] + k * sa[3]] * op->b[t * sb[1] + k * sb[2] + j * sb[3]];
                op->out[t * so[1] + i * so[2] + j * so[3]] = sum;
            }
}

/* ---- weights and caches ---- */

static const ac_weight *weight_of(const ac_op *op) {
    const ac_weight *w = op->object;
    return op->pick ? w + (int64_t)op->pick[0] : w;
}

static void look_up(const ac_op *op) {
    const ac_weight *w = op->object;
    for (int64_t i = 0; i < op->n[0]; i++)
        ac_weight_row(w, (int64_t)op->a[i], op->out + i * w->k);
}

static void linear_share(const ac_op *op, int thread, int threads) {
    const ac_weight *w = weight_of(op);
    long first, last;
    ac_share(w->n, ac_linear_unit(w), thread, threads, &first, &last);
    if (first < last)
        ac_linear_rows(w, op->input, op->out, w->n, first, last);
}

static void attend(const ac_program *program, const ac_op *op, int thread, int threads) {
    ac_attend_share(op->object, op->a, op->b, op->c, op->out, program->position, (float)op->alpha, (float)op->beta,
                    op->n[0], thread, threads, program->space + thread * program->space_size, program->states);
}

static void run_one(const ac_program *program, const ac_op *op, int thread, int threads) {
    if (op->kind == AC_LINEAR)
        linear_share(op, thread, threads);
    else if (op->kind == AC_ATTEND)
        attend(program, op, thread, threads);
    else if (op->kind == AC_QUANTIZE) {
        ac_input *in = op->input;
        ac_input_quantize(in, op->a, 0, (in->k + AC_CHUNK - 1) / AC_CHUNK);
    } else if (op->kind == AC_ROWS)
        look_up(op);
    else if (op->kind == AC_MATMUL)
        matmul(op);
    else if (op->kind >= AC_SUM)
        over_rows(op);
    else
        elementwise(op);
}

static void body(void *context, int thread, int threads) {
    const ac_program *program = context;
    for (int64_t i = 0; i < program->count; i++) {
        const ac_op *op = &program->ops[i];
        if (op->sync)
            ac_barrier(threads);
        if (op->shared || thread == 0)
            run_one(program, op, thread, threads);
    }
}

void ac_run(const ac_program *program, int threads) { ac_region(threads, body, (void *)program); }

int64_t ac_op_bytes(void) { return sizeof(ac_op); }
