/* Rotary embedding of a step's queries and keys, and the way into the paged cache. */
#include <immintrin.h>
#include <string.h>

#include "mf_paged_attention.h"

#define LANES 16

static __mmask16 first_lanes(int64_t count) {
    return count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1);
}

static void store_bf16(uint16_t *out, __mmask16 lanes, __m512 values) {
    _mm256_mask_storeu_epi16(out, lanes, (__m256i)_mm512_cvtneps_pbh(values));
}

/* One head: pair i is (x[i], x[i + A/2]). */
static void rotate(const float *x, const float *cos, const float *sin, int64_t half,
                   uint16_t *out) {
    for (int64_t i = 0; i < half; i += LANES) {
        __mmask16 lanes = first_lanes(half - i);
        __m512 c = _mm512_maskz_loadu_ps(lanes, cos + i), s = _mm512_maskz_loadu_ps(lanes, sin + i);
        __m512 first = _mm512_maskz_loadu_ps(lanes, x + i);
        __m512 second = _mm512_maskz_loadu_ps(lanes, x + half + i);
        store_bf16(out + i, lanes, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)));
        store_bf16(out + half + i, lanes, _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)));
    }
}

static void store_key(const uint16_t *key, int64_t dim, uint32_t *unit, int64_t slot) {
    for (int64_t pair = 0; pair < dim / 2; pair++)
        memcpy(unit + pair * MF_UNIT + slot, key + 2 * pair, sizeof *unit);
}

/* Element by element: the slots beside this one may be another thread's. */
static void store_value(const float *value, int64_t dim, uint16_t *unit, int64_t slot) {
    uint16_t *pair = unit + (slot / 2) * dim * 2 + slot % 2;
    for (int64_t i = 0; i < dim; i += LANES) {
        uint16_t rounded[LANES];
        store_bf16(rounded, 0xffff, _mm512_loadu_ps(value + i));
        for (int64_t lane = 0; lane < LANES; lane++)
            pair[2 * (i + lane)] = rounded[lane];
    }
}

void mf_rotate_and_store(const struct mf_attention *layer, const struct mf_chunks *chunks,
                         const struct mf_kv *kv, const float *qkv, int64_t t, uint16_t *queries) {
    struct mf_heads heads = layer->heads;
    int64_t dim = heads.dim, shared = heads.num_queries / heads.num_kv;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < t; row++) {
        int64_t chunk = mf_chunk_of(chunks, row);
        int64_t position = chunks->starts[chunk] + row - chunks->first_rows[chunk];
        const float *cos = layer->cos + position * (dim / 2);
        const float *sin = layer->sin + position * (dim / 2);
        const float *query = qkv + row * (heads.num_queries + 2 * heads.num_kv) * dim;
        const float *key = query + heads.num_queries * dim, *value = key + heads.num_kv * dim;
        int64_t unit = mf_unit_of(kv, chunks->tables + chunks->table_offsets[chunk], position);
        for (int64_t g = 0; g < heads.num_kv; g++) {
            uint16_t turned[MF_MAX_HEAD_DIM];
            for (int64_t r = 0; r < shared; r++)
                rotate(query + (g * shared + r) * dim, cos, sin, dim / 2,
                       queries + ((g * t + row) * shared + r) * dim);
            rotate(key + g * dim, cos, sin, dim / 2, turned);
            store_key(turned, dim, mf_unit_keys(kv, heads, unit, g), position % MF_UNIT);
            store_value(value + g * dim, dim, mf_unit_values(kv, heads, unit, g),
                        position % MF_UNIT);
        }
    }
}
