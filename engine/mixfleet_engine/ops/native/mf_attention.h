/* The attention half of a decoder layer over a paged KV cache.
 *
 * Shape letters: T rows in the step, D model width, H query heads, G KV heads, R = H / G query
 * heads of one KV head, A head dimension, C chunks in the step.
 *
 * The cache is bf16, in units of 16 neighbouring positions of all KV heads; a block of the
 * allocator is one or more units:
 *
 *     keys    [unit][G][A/2][16][2]   a register holds 16 positions x one pair of dimensions
 *     values  [unit][G][8][A][2]      a register holds 16 dimensions x one pair of positions
 *
 * so neither product needs a sum across the lanes of a register.
 */
#ifndef MF_ATTENTION_H
#define MF_ATTENTION_H

#include "mf_matrix.h"

#define MF_UNIT 16
#define MF_MAX_HEAD_DIM 256

struct mf_heads {
    int64_t num_queries; /* H */
    int64_t num_kv;      /* G */
    int64_t dim;         /* A, a multiple of 16, at most MF_MAX_HEAD_DIM */
};

struct mf_kv {
    uint32_t *keys; /* pairs of bf16 */
    uint16_t *values;
    int64_t block_size; /* positions in a block of the allocator, a multiple of MF_UNIT */
};

/* Chunk c is rows first_rows[c] .. + num_rows[c] - 1 of the step, positions starts[c] and on of its
 * sequence; its blocks are tables[table_offsets[c]] and on. Rows of chunks follow one another. */
struct mf_chunks {
    int64_t count; /* C */
    const int32_t *first_rows;
    const int32_t *num_rows;
    const int32_t *starts;
    const int32_t *table_offsets;
    const int32_t *tables;
};

struct mf_attention {
    struct mf_heads heads;
    const float *norm; /* [D] */
    float norm_eps;
    const struct mf_matrix *wqkv; /* [(H + 2G) * A, D]: queries, then keys, then values */
    const struct mf_matrix *wo;   /* [D, H * A] */
    const float *cos;             /* [positions, A/2] */
    const float *sin;
};

/* For a step of t rows; the longer the contexts that threads share, the more. */
int64_t mf_attention_scratch_bytes(const struct mf_attention *layer,
                                   const struct mf_chunks *chunks, int64_t t, int32_t threads);

/*
 * Write what the block adds to the running sums x [T, D] to out [T, D], or, where `out` is x, add
 * it on; and store the keys and values of the T rows. Scratch is aligned to 64.
 */
void mf_attention_run(const struct mf_attention *layer, const struct mf_chunks *chunks,
                      const struct mf_kv *kv, const float *x, int64_t t, float *out, void *scratch,
                      int32_t threads);

#endif
