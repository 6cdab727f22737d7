/* A decode step as a list of operations on float buffers; what autocomp/serving/program.py lowers to. */
#ifndef AC_STEP_H
#define AC_STEP_H
#include <stdint.h>

enum { AC_DIMS = 4 };

enum ac_kind {
    /* Elementwise, one operand: out = f(a). */
    AC_COPY, AC_NEG, AC_ABS, AC_SQRT, AC_RSQRT, AC_RECIPROCAL, AC_SQUARE, AC_EXP, AC_LOG, AC_SIN, AC_COS,
    AC_TANH, AC_SIGMOID, AC_SILU, AC_RELU, AC_GELU, AC_GELU_TANH, AC_POW, AC_SCALE, AC_SHIFT, AC_CLAMP,
    AC_FLOOR,
    /* Elementwise, two operands (alpha: factor of b). */
    AC_ADD = 32, AC_MUL, AC_DIV, AC_MAX, AC_MIN,
    /* Over the last dimension of a [n0, n1]: out [n0] or [n0, n1] or [n0, n2]. */
    AC_SUM = 48, AC_AMAX, AC_SOFTMAX, AC_TOPK, AC_LAYER_NORM, AC_RMS_NORM, AC_CUMSUM,
    /* a [n0, n1, n2] @ b [n0, n2, n3], strides given. */
    AC_MATMUL = 64,
    /* With weights and caches. */
    AC_ROWS = 80, AC_QUANTIZE, AC_LINEAR, AC_ATTEND
};

/* Sizes are outermost first, padded with leading ones. Strides are in elements, 0 where an operand repeats.
 * sync: all threads meet before this operation. shared: every thread does its part of it; otherwise thread 0
 * does all. */
typedef struct {
    int64_t kind, sync, shared;
    int64_t size[AC_DIMS], stride_out[AC_DIMS], stride_a[AC_DIMS], stride_b[AC_DIMS];
    float *out;
    const float *a, *b, *c;
    double alpha, beta;
    int64_t n[4];
    const void *object; /* ac_weight (LINEAR, ROWS; an array of them with `pick`), ac_cache (ATTEND) */
    void *input;        /* ac_input (QUANTIZE, LINEAR) */
    const float *pick;  /* index of the weight in the array `object`, read when the step runs */
} ac_op;

typedef struct {
    const ac_op *ops;
    int64_t count;
    int64_t position; /* of the tokens of this step; set by the caller */
    float *space;     /* for attention: `space_size` floats for each thread */
    int64_t space_size;
    float *states;    /* the same, of all threads together (ac_attend_share) */
} ac_program;

/* Run all operations once on `threads` threads. */
void ac_run(const ac_program *program, int threads);
int64_t ac_op_bytes(void); /* sizeof(ac_op), for the caller to compare */
#endif
