/* The parts of mf_attention.h between its two matrix products. Shape letters: see there. */
#ifndef MF_PAGED_ATTENTION_H
#define MF_PAGED_ATTENTION_H

#include "mf_attention.h"

#define MF_PART 256 /* positions whose softmax is taken at once; see mf_attention_kernel.h */

/* The unit that holds a position of the sequence with this block table. */
static inline int64_t mf_unit_of(const struct mf_kv *kv, const int32_t *table, int64_t position) {
    int64_t inside = position % kv->block_size;
    return table[position / kv->block_size] * (kv->block_size / MF_UNIT) + inside / MF_UNIT;
}

/* Where the keys and the values of one unit and KV head begin. */
static inline uint32_t *mf_unit_keys(const struct mf_kv *kv, struct mf_heads heads, int64_t unit,
                                     int64_t kv_head) {
    return kv->keys + (unit * heads.num_kv + kv_head) * (heads.dim / 2) * MF_UNIT;
}

static inline uint16_t *mf_unit_values(const struct mf_kv *kv, struct mf_heads heads, int64_t unit,
                                       int64_t kv_head) {
    return kv->values + (unit * heads.num_kv + kv_head) * heads.dim * MF_UNIT;
}

/* The chunk that a row of the step belongs to. */
static inline int64_t mf_chunk_of(const struct mf_chunks *chunks, int64_t row) {
    int64_t low = 0, high = chunks->count - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (chunks->first_rows[middle] <= row)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* Turn queries and keys of qkv [T, (H + 2G) * A] by their positions, write the queries as bf16 to
 * queries [G, T, R, A], and keys and values as bf16 to the cache.
 * Whole team; ends with a barrier. */
void mf_rotate_and_store(const struct mf_attention *layer, const struct mf_chunks *chunks,
                         const struct mf_kv *kv, const float *qkv, int64_t t, uint16_t *queries);

static inline int64_t mf_num_parts(const struct mf_chunks *chunks, int64_t chunk) {
    return mf_ceil_div((int64_t)chunks->starts[chunk] + chunks->num_rows[chunk], MF_PART);
}

/* How the work of one step is shared out. */
struct mf_attention_plan {
    int64_t num_items;
    int64_t heads_per_item;  /* KV heads: 1 or G */
    int64_t *first_items;    /* [C + 1] */
    int64_t *num_spans;      /* [C] pieces that a chunk's context is split into; 1: not split */
    int64_t *first_partials; /* [C] */
};

/* What one thread computes at a time. Ends are not included. */
struct mf_item {
    int64_t chunk;
    int64_t first_row, num_rows; /* within the chunk */
    int64_t first_part, end_part;
    int64_t first_head, end_head; /* KV heads */
};

/* The views of parts that are kept until all of their row are there. */
int64_t mf_num_partials(struct mf_heads heads, const struct mf_chunks *chunks, int32_t threads);

/* Fill in a plan whose arrays the caller gives. */
void mf_plan_attention(struct mf_heads heads, const struct mf_chunks *chunks, int32_t threads,
                       struct mf_attention_plan *plan);

struct mf_item mf_find_item(struct mf_heads heads, const struct mf_chunks *chunks,
                            const struct mf_attention_plan *plan, int64_t number);

/* mixed [T, H, A] = attention of every row over its own context, in fp32.
 * partials holds mf_num_partials() * (A + 2) floats, stats 2 * T * H.
 * Whole team; ends with a barrier. */
void mf_attend(struct mf_heads heads, const struct mf_chunks *chunks, const struct mf_kv *kv,
               const struct mf_attention_plan *plan, const uint16_t *queries, int64_t t,
               float *partials, float *stats, float *mixed);

#endif
