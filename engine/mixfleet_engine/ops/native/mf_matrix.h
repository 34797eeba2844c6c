/*
 * A packed matrix, rows of activations in the form it wants, and their product.
 *
 * Letters: N outputs, K inputs of a matrix, T rows. One number of a product is always summed in
 * the same order with the same instructions, however many rows, tiles and threads there are, so a
 * row's result does not depend on the rows beside it.
 */
#ifndef MF_MATRIX_H
#define MF_MATRIX_H

#include <stdint.h>

#define MF_PANEL 32     /* outputs of one panel: two vectors of 16 */
#define MF_BLOCK 12     /* most rows of one block: 12 x 2 accumulators fill the registers */
#define MF_TILE_BLOCKS 4 /* blocks that share one pass over a panel */
#define MF_GROUP 128    /* inputs that share a scale in MF_INT4 */

enum mf_format { MF_BF16 = 0, MF_INT8 = 1, MF_INT4 = 2 };

/*
 * W [N, K] in panels of 32 outputs, padded with zeros to whole panels and whole steps of K:
 *   bf16  [N/32][K/2][32][2]   bf16
 *   int8  [N/32][K/4][32][4]   the number + 128
 *   int4  [N/32][K/8][32][4]   low half byte: the number + 8 of input 8j + i; high: of 8j + 4 + i
 */
struct mf_matrix {
    int32_t format;
    int64_t n, k;
    const void *values;
    const float *scales; /* int8 [N padded]; int4 [N/32][K/128][32]; bf16 none */
};

/* T packed rows. In a block of h rows the steps of K follow each other, each with its h rows. */
struct mf_rows {
    int64_t t;
    char *values;
    float *scales;    /* [T], not for bf16 */
    int32_t *offsets; /* [T][groups], -128 or -8 times the sum of the row's numbers */
};

static inline int64_t mf_ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}
static inline int64_t mf_round_up(int64_t a, int64_t b)
{
    return mf_ceil_div(a, b) * b;
}
static inline int64_t mf_panels(const struct mf_matrix *w)
{
    return mf_ceil_div(w->n, MF_PANEL);
}

/* Rows are cut into blocks of nearly equal height: block b starts at this row. */
static inline int64_t mf_num_blocks(int64_t t)
{
    return mf_ceil_div(t, MF_BLOCK);
}
static inline int64_t mf_block_start(int64_t t, int64_t b)
{
    return b * t / mf_num_blocks(t);
}
static inline int64_t mf_num_tiles(int64_t t)
{
    return mf_ceil_div(mf_num_blocks(t), MF_TILE_BLOCKS);
}

/* Bytes of one packed row without its scale and offsets, and the offsets it has. */
int64_t mf_row_bytes(const struct mf_matrix *w);
int64_t mf_row_groups(const struct mf_matrix *w);

/* Scratch bytes for t rows; `rows` below must be aligned to 64. */
int64_t mf_rows_bytes(const struct mf_matrix *w, int64_t t);
struct mf_rows mf_rows_at(const struct mf_matrix *w, void *rows, int64_t t);

/* The t rows from `first` on, as rows of their own. */
struct mf_rows mf_rows_part(const struct mf_matrix *w, struct mf_rows rows, int64_t first,
                            int64_t t);

/* Pack x [K] as row `row`. One thread. */
void mf_pack_row(const struct mf_matrix *w, const struct mf_rows *rows, int64_t row,
                 const float *x);

/*
 * One tile of rows times one panel, into out [rows of the tile][32]. One thread. Returns the
 * number of rows; *first is the first of them.
 */
int64_t mf_tile_product(const struct mf_matrix *w, int64_t panel, const struct mf_rows *rows,
                        int64_t tile, int64_t *first, float *out);

/* The whole team calls these two; each ends with a barrier. */
void mf_pack_rows(const struct mf_matrix *w, const float *x, int64_t t, int64_t ldx, void *rows);
void mf_matmul(const struct mf_matrix *w, const void *rows, int64_t t, float *out, int64_t ldo);

#endif
