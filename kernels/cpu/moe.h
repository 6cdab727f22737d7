/* Rows of activations through the weights of the experts they were routed to; few rows (decoding). */
#ifndef AC_MOE_H
#define AC_MOE_H
#include "linear.h"

/* Weights that lie at equal distances: all experts of a class. */
typedef struct {
    ac_weight first;  /* the weight at place 0 */
    int64_t places;
    int64_t codes_step, scale_step, zero_step; /* bytes from one place to the next */
} ac_pool;

/* Python fills the same fields in order. */
typedef struct {
    int64_t tokens, top_k, per_pair; /* per_pair: x has a row for every pair of token and choice, else one a token */
    int64_t n, k;
    const void *x;    /* AC_F32 or AC_BF16; features lie together */
    int64_t x_stride; /* elements between rows */
    int64_t x_type;   /* also of y */
    const void *expert;  /* [tokens, top_k], int32, or int64 where wide */
    int64_t wide;
    int64_t experts, classes;
    const int32_t *remap; /* [classes, experts]: place in the pool or -1 */
    const float *route;   /* [tokens, top_k], or null: no sum over the choices */
    const ac_pool *pools; /* [classes] */
    void *y;              /* [tokens * top_k, n], or [tokens, n] with route */
} ac_moe;

/* 0, or -1 when there is no memory, or -2 for a place that its pool does not have. */
int ac_moe_linear(const ac_moe *a, int threads);
#endif
