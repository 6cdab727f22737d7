/* Part of linear.c: weights of 16 and 32 bits, several rows of them times several rows of activations. */
AC_INLINE vf dense_load(const int type, const void *p, int64_t at) {
    if (type == AC_F32)
        return vf_load((const float *)p + at);
    return type == AC_BF16 ? vf_load_bf16((const uint16_t *)p + at) : vf_load_f16((const uint16_t *)p + at);
}

AC_INLINE float dense_at(const int type, const void *p, int64_t at) {
    if (type == AC_F32)
        return ((const float *)p)[at];
    return type == AC_BF16 ? ac_from_bf16(((const uint16_t *)p)[at]) : ac_from_f16(((const uint16_t *)p)[at]);
}

AC_INLINE void dense_tile(const int type, const int nr, const int mm, const ac_weight *w, const ac_input *in,
                          int64_t m0, int64_t row, float *y, int64_t ldy) {
    const int64_t size = type == AC_F32 ? 4 : 2, line = w->k * size;
    const char *codes = (const char *)w->codes + row * line + (line < AHEAD ? nr * line : AHEAD / 4);
    vf total[4][WIDE];
    int64_t i = 0;
    UNROLL for (int r = 0; r < nr; r++) UNROLL for (int m = 0; m < mm; m++) total[r][m] = vf_set1(0);
    for (; i + 16 <= w->k; i += 16) {
        UNROLL for (int r = 0; r < nr; r++) __builtin_prefetch(codes + r * line + i * size);
        vf x[WIDE];
        UNROLL for (int m = 0; m < mm; m++) x[m] = vf_load(in->x + (m0 + m) * w->k + i);
        UNROLL for (int r = 0; r < nr; r++) {
            vf a = dense_load(type, w->codes, (row + r) * w->k + i);
            UNROLL for (int m = 0; m < mm; m++) total[r][m] = vf_fma(a, x[m], total[r][m]);
        }
    }
    UNROLL for (int r = 0; r < nr; r++) UNROLL for (int m = 0; m < mm; m++) {
        float sum = vf_sum(total[r][m]) + (w->bias ? w->bias[row + r] : 0);
        for (int64_t j = i; j < w->k; j++)
            sum += dense_at(type, w->codes, (row + r) * w->k + j) * in->x[(m0 + m) * w->k + j];
        y[(m0 + m) * ldy + row + r] = sum;
    }
}

AC_INLINE void dense(const int type, const ac_weight *w, const ac_input *in, float *y, int64_t ldy, int64_t row,
                     int64_t last) {
#define TILE(nr, mm, offset) dense_tile(type, nr, mm, w, in, m, row + offset, y, ldy)
    for (; row < last; row += row + 4 <= last ? 4 : 1) {
        const int four = row + 4 <= last;
        int64_t m = 0;
        for (; WIDE == 8 && four && m + 8 <= in->rows; m += 8) {
            TILE(2, WIDE, 0);
            TILE(2, WIDE, 2);
        }
        for (; m + 4 <= in->rows; m += 4)
            four ? TILE(4, 4, 0) : TILE(1, 4, 0);
        for (; m < in->rows; m++)
            four ? TILE(4, 1, 0) : TILE(1, 1, 0);
    }
#undef TILE
}
