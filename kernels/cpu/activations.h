/* Linears on 8-bit activations. int8, one scale a token: y = x_scale[m] * sum_g scale[n, g] * sum_k q[m, k] w[n, k]. */
#ifndef AC_ACTIVATIONS_H
#define AC_ACTIVATIONS_H
#include <stdint.h>

/* Python fills the same fields in order. Types are AC_F32, AC_BF16 and AC_F16 of linear.h. */
typedef struct {
    int64_t m, n, k;
    const void *x;    /* [m, k], AC_F32 or AC_BF16; features lie together */
    int64_t x_stride; /* elements between rows */
    int64_t x_type;   /* also of y */
    int64_t bits;     /* 8: w is int8 [n, k]; 4: nibbles, the even feature low, minus their zero point */
    const void *w;
    int64_t w_stride;   /* bytes between rows */
    int64_t group;      /* features that share a scale, 1 .. k; for 8 bits k, for 4 bits k or a multiple of 8 */
    const void *scale;  /* [n, ceil(k / group)] */
    int64_t scale_type; /* any of the three */
    const uint8_t *zero;  /* [n, ceil(k / group)]; null: 8 */
    const float *bias;    /* [n] or null */
    const float *x_scale; /* one static scale of the activations, or null: each row has its own */
    void *y;              /* [m, n] */
} ac_a8;

/* 0, or -1 when there is no memory. */
int ac_a8_linear(const ac_a8 *a, int threads);

/* `count` numbers of float8_e4m3fn as AC_BF16 or AC_F32, exactly. */
void ac_e4m3_widen(const uint8_t *from, void *to, int64_t count, int64_t type, int threads);
#endif
