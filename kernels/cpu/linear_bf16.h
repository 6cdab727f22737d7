/* Part of linear.c: blocks of packed weights to bf16. */
/* The first `columns` features of 16 floats. */
static inline void store_columns(uint16_t *out, vf value, int64_t columns) {
    uint16_t tail[16];
    if (columns >= 16) {
        vf_store_bf16(out, value);
        return;
    }
    vf_store_bf16(tail, value);
    memcpy(out, tail, columns * 2);
}

/* A piece (32 features) of the block's rows; a row's part is written at once, since it fills a cache line. */
AC_INLINE void piece_bf16(const int bits, const uint8_t *piece, const float *scale, const float *shift, uint16_t *out,
                          int64_t k, int64_t rows, int64_t columns) {
    uint8_t bytes[2][4][VECTOR];
    UNROLL for (int half = 0; half < 2; half++) {
        vi codes[4];
        UNROLL for (int j = 0; j < 4; j++) codes[j] = code_vector(bits, piece, 4 * half + j);
        vi_transpose4(codes); /* now run i of 16 bytes in vector j is row 4i + j */
        UNROLL for (int j = 0; j < 4; j++) vi_store(bytes[half][j], codes[j]);
    }
    for (int r = 0; r < rows; r++) {
        const vf s = vf_set1(scale[r]), t = vf_set1(shift[r]);
        store_columns(out + r * k, vf_fma(vf_int(vi_bytes(bytes[0][r % 4] + 16 * (r / 4))), s, t), columns);
        if (columns > 16)
            store_columns(out + r * k + 16, vf_fma(vf_int(vi_bytes(bytes[1][r % 4] + 16 * (r / 4))), s, t), columns - 16);
    }
}

AC_INLINE void block_bf16(const int bits, const ac_weight *w, int64_t block, int64_t rows, uint16_t *out) {
    const int64_t groups = groups_of(w);
    const uint8_t *codes = (const uint8_t *)w->codes + block * chunks_of(w->k) * PIECES * bits * VECTOR;
    float scale[ROWS], shift[ROWS];
    for (int64_t c = 0; c < w->k; c += PIECE, codes += bits * VECTOR) {
        if (c % w->group == 0) {
            grid now = grid_at(w, (block * groups + c / w->group) * ROWS);
            vf_store(scale, now.scale);
            vf_store(shift, vf_mul(vf_mul(now.scale, vf_set1(-1)), vf_int(now.zero)));
        }
        __builtin_prefetch(codes + AHEAD / 4);
        piece_bf16(bits, codes, scale, shift, out + c, w->k, rows, w->k - c);
    }
}
