/* Attention of one new token over a cache, shared by the operators and the decode step. */
#ifndef AC_ATTENTION_H
#define AC_ATTENTION_H
#include <stdint.h>

enum { AC_KV_F32 = 32, AC_KV_BF16 = 16, AC_KV_INT8 = 8, AC_KV_INT4 = 4 };

/* Keys and values of one layer: [batch, kv_heads, capacity, dim], one ring per (batch, kv head).
 * Head h keeps the first sink[h] tokens and the last window[h] ones: slot(t) = t < sink ? t :
 * sink + (t - sink) % window; without spans (null) slot(t) = t and nothing is ever dropped. Keys are stored
 * after the rotary embedding, so their order in memory doesn't matter. Quantized entries have one scale and
 * one minimum per (token, head): x = scale * code + minimum, 4-bit codes two a byte, even feature low.
 * Keys and values may have different types. dim: up to 2048, even for 4 bits. Rows needn't be aligned. */
typedef struct {
    int64_t batch, heads, kv_heads, dim, capacity;
    int64_t key_bits, value_bits; /* AC_KV_* */
    void *k, *v;
    float *k_scale, *k_min, *v_scale, *v_min; /* [batch, kv_heads, capacity]; null unless quantized */
    const int32_t *window, *sink;             /* [kv_heads] or null: everything is kept */
    const int64_t *head_start;                /* ragged: first slot of each kv head [kv_heads + 1], else null;
                                                 k, v are then [batch, head_start[kv_heads], dim] */
} ac_cache;

/* Store one token's k, v [batch, kv_heads, dim] (float) as number `position` (0-based) of its sequence. */
void ac_cache_append(const ac_cache *c, const float *k, const float *v, int64_t position, int64_t b, int64_t head);
/* Work space (floats) that one call of ac_attend needs. */
int64_t ac_attend_space(const ac_cache *c, int64_t length);
/* out[h] = softmax(scale * q[h] . K) V for the query heads of kv head `head` of sequence b, over `length`
 * tokens seen so far (with spans: those of them that are kept); zeros when there are none. q, out: [batch,
 * heads, dim]. softcap > 0: scores become softcap * tanh(score / softcap). window > 0: only the last `window`
 * tokens (a model's own sliding window on a cache that keeps all). */
void ac_attend(const ac_cache *c, const float *q, float *out, int64_t length, int64_t b, int64_t head,
               float scale, float softcap, int64_t window, float *space);

/* The same in pieces, for threads that share one head: each piece leaves a running softmax in its `state`
 * (ac_attend_state floats), merge turns `count` states that lie one after another into the result. */
int64_t ac_attend_tokens(const ac_cache *c, int64_t length, int64_t head, int64_t window); /* that are seen */
int64_t ac_attend_state(const ac_cache *c);
/* Tokens [first, last) of those seen. */
void ac_attend_part(const ac_cache *c, const float *q, float *state, int64_t length, int64_t b, int64_t head,
                    int64_t first, int64_t last, float scale, float softcap, int64_t window, float *space);
void ac_attend_merge(const ac_cache *c, const float *states, int64_t count, float *out, int64_t b, int64_t head);

/* What each of a region's threads does to store token number `position` (k, v as above) of all sequences and to
 * attend to it. The tokens of all heads, laid end to end, are cut evenly: heads of unlike spans, or fewer heads
 * than threads, keep all threads busy. space: of this thread, ac_attend_space floats; states: of all threads,
 * (threads + batch * kv_heads) * ac_attend_state. The result is complete at the next meeting of the threads. */
void ac_attend_share(const ac_cache *c, const float *q, const float *k, const float *v, float *out, int64_t position,
                     float scale, float softcap, int64_t window, int thread, int threads, float *space,
                     float *states);
#endif
