/* Linear layers on few rows of activations: what the operators and the decode step share.
 *
 * Activations become integers of 15 bits once per input, with one scale per 64 features, held as two planes of
 * int8, and are then multiplied with any number of weights (q/k/v, gate/up). Weights of 2 to 8 bits lie in
 * blocks of rows (see linear.c); 16- and 32-bit weights are plain [n, k]. A NaN or infinity in x makes all
 * outputs of its row NaN, if the weight is packed; dense weights follow floating point. */
#ifndef AC_LINEAR_H
#define AC_LINEAR_H
#include <stdint.h>

enum { AC_CHUNK = 64 }; /* features that share a scale of the activations */

/* Types of dense weights and of scales. */
enum { AC_F32 = 0, AC_BF16 = 1, AC_F16 = 2 };

/* A weight [n, k]. bits: 2, 3, 4, 5, 6, 8 (packed), 16 or 32 (dense). Python fills the same fields in order. */
typedef struct {
    int64_t n, k;
    int64_t bits;
    int64_t group;     /* features that share a scale: a multiple of 32 or k; the last group may be short */
    int64_t type;      /* of the scales (AC_BF16, AC_F16), or of dense weights */
    const void *codes; /* packed codes, or the dense weight */
    const void *scale; /* in the order that linear.c reads; null for dense weights */
    const void *zero;  /* uint8, null when symmetric (zero = 2^(bits-1)) */
    const int32_t *outlier_start;  /* [n + 1], null without outliers */
    const int32_t *outlier_column; /* ascending within a row */
    const float *outlier_change;   /* outlier value minus what the codes say there */
    const float *bias;             /* [n] or null */
} ac_weight;

/* Rows of activations as the weights want them. All arrays belong to the caller; kp is k rounded up to a
 * multiple of AC_CHUNK, padding is zero. */
typedef struct {
    int64_t rows, k;
    const float *x; /* [rows, k], as given: for dense weights and outliers */
    int8_t *q;      /* [rows, kp]: the high bits of x = scale * (128 * q + fine) */
    float *scale;   /* [rows, kp / 64] */
    int32_t *sums;  /* [rows, kp / 32]: minus the sum of 32 neighbouring 128 * q + fine */
    int8_t *fine;   /* [rows, kp]: the low bits, -64 .. 64 */
} ac_input;

/* Bytes that ac_input_place needs for `rows` rows of k features (64-byte aligned memory). */
int64_t ac_input_bytes(int64_t rows, int64_t k);
/* Point the arrays of `in` into `memory` (64-byte aligned) and zero the padding. */
void ac_input_place(ac_input *in, int64_t rows, int64_t k, void *memory);
/* Fill them from x [rows, k], which stays in use; chunks [first, last) of every row (so that threads can share
 * the work: the chunks of all threads together must be 0 .. kp / 64). */
void ac_input_quantize(ac_input *in, const float *x, int64_t first, int64_t last);

/* Rows of the weight that are computed together: threads take shares in multiples of it. */
int64_t ac_linear_unit(const ac_weight *w);
/* y[m, r] = x[m] . w[r] + bias[r] for all rows m of `in` and weight rows r in [first, last); y has leading
 * dimension ldy. `first` is a multiple of the unit. */
void ac_linear_rows(const ac_weight *w, const ac_input *in, float *y, int64_t ldy, int64_t first, int64_t last);
/* Dequantized row r of the weight (an embedding look-up): out [k], outliers included. */
void ac_weight_row(const ac_weight *w, int64_t r, float *out);

/* For Python, on `threads` threads of the pool. */

/* y[m, r] = x[m] . w[r] + bias[r]: x [rows, k] and y [rows, n] are contiguous, of `type` AC_F32 or AC_BF16. 0,
 * or -1 when there is no memory. */
int ac_linear(const ac_weight *w, const void *x, void *y, int64_t rows, int64_t type, int threads);
/* Dequantized rows [first, last) of a packed weight as bf16 [last - first, k]; `first` is a multiple of the unit. */
void ac_weight_bf16(const ac_weight *w, int64_t first, int64_t last, uint16_t *out, int threads);
/* Dequantized rows index[0 .. count) as float [count, k]. */
void ac_weight_rows(const ac_weight *w, const int64_t *index, int64_t count, float *out, int threads);
/* Which variant this was compiled to: "avx512-vnni", "avx512", "avx2-vnni", "avx2" or "plain". */
const char *ac_linear_variant(void);
#endif
