/* The arithmetic of attention: a few queries of one KV head against one part of one sequence.
 *
 * A part is 256 positions, aligned to the sequence's beginning. Every query does in it, in this
 * order: all scores, their maximum, exponentials and sum, then the mix of values, pair of positions
 * by pair; parts are merged in order. None of it depends on which queries are beside it, so a row
 * has the same bits in a decode and in a prompt of any cut.
 */
#ifndef MF_ATTENTION_KERNEL_H
#define MF_ATTENTION_KERNEL_H

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "mf_exp.h"
#include "mf_paged_attention.h"

#define MF_PART_UNITS (MF_PART / MF_UNIT)
#define MF_QUERIES 6 /* with 4 registers each: 24 sums, 4 loads and a broadcast in 32 registers */
#define MF_TILE 4    /* registers of a query's sums at a time */
#define MF_INLINE static inline __attribute__((always_inline))

/* One part of one sequence and KV head; past its end the pointers repeat the last unit. */
struct mf_part {
    const uint32_t *keys[MF_PART_UNITS];
    const uint16_t *values[MF_PART_UNITS];
    int64_t num_units;
};

/* Queries that look at a part together. What each sees, its view, is A + 2 floats: the mix of
 * values, not divided by the sum of shares yet, then the greatest score and that sum. */
struct mf_block {
    const uint16_t *queries; /* [num][A] bf16 */
    int64_t num;             /* at most MF_QUERIES */
    int64_t head_dim;
    int64_t lengths[MF_QUERIES]; /* positions of the part that each may see, 1 .. 256, ascending */
};

MF_INLINE __m512bh mf_pair_everywhere(const uint16_t *pair) {
    int32_t both;
    memcpy(&both, pair, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

/* Blocks lie anywhere in memory, so the CPU's own prefetching starts anew at each: what is needed
 * next is asked for by hand. Into the second-level cache, which takes more requests at a time. */
MF_INLINE void mf_fetch(const void *line) {
    _mm_prefetch((const char *)line, _MM_HINT_T1);
}

MF_INLINE void mf_fetch_part(const struct mf_part *part, int64_t head_dim) {
    for (int64_t u = 0; u < part->num_units; u++)
        for (int64_t i = 0; i < head_dim / 2; i++)
            mf_fetch(part->keys[u] + i * MF_UNIT);
    for (int64_t u = 0; u < part->num_units; u++)
        for (int64_t i = 0; i < head_dim / 2; i++)
            mf_fetch(part->values[u] + i * 2 * MF_UNIT);
}

/* Scores of num queries against MF_TILE units, to scores[query * MF_PART ..]. */
MF_INLINE void mf_score_tile(const uint16_t *queries, int64_t head_dim, const uint32_t *const *keys,
                             const uint32_t *const *next, __m512 scale, float *scores,
                             const int num) {
    __m512 sums[MF_QUERIES][MF_TILE];
    const uint32_t *k0 = keys[0], *k1 = keys[1], *k2 = keys[2], *k3 = keys[3];
#pragma GCC unroll 6
    for (int q = 0; q < num; q++)
#pragma GCC unroll 4
        for (int u = 0; u < MF_TILE; u++)
            sums[q][u] = _mm512_setzero_ps();
    for (int64_t d = 0; d < head_dim / 2; d++) {
        __m512bh a = (__m512bh)_mm512_loadu_si512(k0 + d * MF_UNIT);
        __m512bh b = (__m512bh)_mm512_loadu_si512(k1 + d * MF_UNIT);
        __m512bh c = (__m512bh)_mm512_loadu_si512(k2 + d * MF_UNIT);
        __m512bh e = (__m512bh)_mm512_loadu_si512(k3 + d * MF_UNIT);
#pragma GCC unroll 4
        for (int u = 0; u < MF_TILE; u++)
            mf_fetch(next[u] + d * MF_UNIT);
#pragma GCC unroll 6
        for (int q = 0; q < num; q++) {
            __m512bh pair = mf_pair_everywhere(queries + q * head_dim + 2 * d);
            sums[q][0] = _mm512_dpbf16_ps(sums[q][0], a, pair);
            sums[q][1] = _mm512_dpbf16_ps(sums[q][1], b, pair);
            sums[q][2] = _mm512_dpbf16_ps(sums[q][2], c, pair);
            sums[q][3] = _mm512_dpbf16_ps(sums[q][3], e, pair);
        }
    }
#pragma GCC unroll 6
    for (int q = 0; q < num; q++)
#pragma GCC unroll 4
        for (int u = 0; u < MF_TILE; u++)
            _mm512_storeu_ps(scores + q * MF_PART + u * MF_UNIT,
                             _mm512_mul_ps(sums[q][u], scale));
}

MF_INLINE void mf_score(const struct mf_part *part, const struct mf_part *next,
                        const struct mf_block *block, float *scores, const int num) {
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf((float)block->head_dim));
    /* The last tile may reach past the part's end; nobody looks at those scores. */
    for (int64_t unit = 0; unit < part->num_units; unit += MF_TILE)
        mf_score_tile(block->queries, block->head_dim, part->keys + unit, next->keys + unit, scale,
                      scores + unit * MF_UNIT, num);
}

/* Scores of one query to shares in bf16; the greatest score and the shares' sum go to stats[0, 1].
 * Slots past the length, whatever they hold, get the share 0 up to the unit's end. */
MF_INLINE void mf_share_out(const float *scores, int64_t length, uint16_t *shares, float *stats) {
    int64_t full = length / MF_UNIT;
    __mmask16 rest = (__mmask16)((1u << (length % MF_UNIT)) - 1);
    __m512 lowest = _mm512_set1_ps(-INFINITY), greatest = lowest;
    for (int64_t u = 0; u < full; u++)
        greatest = _mm512_max_ps(greatest, _mm512_loadu_ps(scores + u * MF_UNIT));
    __m512 tail = rest ? _mm512_mask_loadu_ps(lowest, rest, scores + full * MF_UNIT) : lowest;
    float top = _mm512_reduce_max_ps(_mm512_max_ps(greatest, tail));
    __m512 sum = _mm512_setzero_ps(), tops = _mm512_set1_ps(top);
    for (int64_t u = 0; u < full; u++) {
        __m512 share = mf_exp_negative(_mm512_sub_ps(_mm512_loadu_ps(scores + u * MF_UNIT), tops));
        sum = _mm512_add_ps(sum, share);
        _mm256_storeu_si256((__m256i *)(shares + u * MF_UNIT),
                            (__m256i)_mm512_cvtneps_pbh(share));
    }
    if (rest) {
        __m512 share = _mm512_maskz_mov_ps(rest, mf_exp_negative(_mm512_sub_ps(tail, tops)));
        sum = _mm512_add_ps(sum, share);
        _mm256_storeu_si256((__m256i *)(shares + full * MF_UNIT),
                            (__m256i)_mm512_cvtneps_pbh(share));
    }
    stats[0] = top;
    stats[1] = _mm512_reduce_add_ps(sum);
}

/* Mix of the first num_pairs pairs of positions, registers dim .. dim + width of the head, for num
 * queries at once, to out[query * out_stride ..]. */
MF_INLINE void mf_mix_tile(const struct mf_part *part, const struct mf_part *next,
                           const uint16_t *shares, int64_t num_pairs, int64_t head_dim,
                           int64_t dim, float *out, int64_t out_stride, const int num,
                           const int width) {
    __m512 sums[MF_QUERIES][MF_TILE];
#pragma GCC unroll 6
    for (int q = 0; q < num; q++)
#pragma GCC unroll 4
        for (int w = 0; w < width; w++)
            sums[q][w] = _mm512_setzero_ps();
    for (int64_t first = 0; first < num_pairs; first += MF_UNIT / 2) {
        const uint16_t *values = part->values[first / (MF_UNIT / 2)] + 2 * dim;
        const uint16_t *then = next->values[first / (MF_UNIT / 2)] + 2 * dim;
        const uint16_t *pairs = shares + 2 * first;
        int64_t count = num_pairs - first < MF_UNIT / 2 ? num_pairs - first : MF_UNIT / 2;
        for (int64_t i = 0; i < count; i++) {
            __m512bh v[MF_TILE];
#pragma GCC unroll 4
            for (int w = 0; w < width; w++) {
                v[w] = (__m512bh)_mm512_loadu_si512(values + 2 * (i * head_dim + w * MF_UNIT));
                mf_fetch(then + 2 * (i * head_dim + w * MF_UNIT));
            }
#pragma GCC unroll 6
            for (int q = 0; q < num; q++) {
                __m512bh pair = mf_pair_everywhere(pairs + q * MF_PART + 2 * i);
#pragma GCC unroll 4
                for (int w = 0; w < width; w++)
                    sums[q][w] = _mm512_dpbf16_ps(sums[q][w], v[w], pair);
            }
        }
    }
#pragma GCC unroll 6
    for (int q = 0; q < num; q++)
#pragma GCC unroll 4
        for (int w = 0; w < width; w++)
            _mm512_storeu_ps(out + q * out_stride + dim + w * MF_UNIT, sums[q][w]);
}

/* Go on with one query's mix from pair `from` to its own length; of a last odd position's pair only
 * the position itself is read, because 0 times what a stale slot holds may be a NaN. */
MF_INLINE void mf_mix_rest(const struct mf_part *part, const uint16_t *shares, int64_t from,
                           int64_t length, int64_t head_dim, float *out) {
    for (int64_t pair = from; pair < (length + 1) / 2; pair++) {
        const uint16_t *values =
            part->values[pair / (MF_UNIT / 2)] + 2 * (pair % (MF_UNIT / 2)) * head_dim;
        __mmask32 seen = 2 * pair + 1 < length ? 0xffffffff : 0x55555555;
        __m512bh share = mf_pair_everywhere(shares + 2 * pair);
        for (int64_t dim = 0; dim < head_dim; dim += MF_UNIT) {
            __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(seen, values + 2 * dim);
            _mm512_storeu_ps(out + dim, _mm512_dpbf16_ps(_mm512_loadu_ps(out + dim), v, share));
        }
    }
}

MF_INLINE void mf_mix(const struct mf_part *part, const struct mf_part *next,
                      const struct mf_block *block, const uint16_t *shares, float *out,
                      int64_t out_stride, const int num) {
    int64_t a = block->head_dim, together = block->lengths[0] / 2, dim = 0;
    for (; dim + MF_TILE * MF_UNIT <= a; dim += MF_TILE * MF_UNIT)
        mf_mix_tile(part, next, shares, together, a, dim, out, out_stride, num, MF_TILE);
    for (; dim < a; dim += MF_UNIT)
        mf_mix_tile(part, next, shares, together, a, dim, out, out_stride, num, 1);
    for (int q = 0; q < num; q++)
        mf_mix_rest(part, shares + q * MF_PART, together, block->lengths[q], a,
                    out + q * out_stride);
}

MF_INLINE void mf_look(const struct mf_part *part, const struct mf_part *next,
                       const struct mf_block *block, float *out, int64_t out_stride,
                       const int num) {
    float scores[MF_QUERIES * MF_PART] __attribute__((aligned(64)));
    uint16_t shares[MF_QUERIES * MF_PART] __attribute__((aligned(64)));
    mf_score(part, next, block, scores, num);
    for (int q = 0; q < num; q++)
        mf_share_out(scores + q * MF_PART, block->lengths[q], shares + q * MF_PART,
                     out + q * out_stride + block->head_dim);
    mf_mix(part, next, block, shares, out, out_stride, num);
}

/* Write each query's view of a part to out[query * out_stride ..], and fetch the part `next`. */
static void mf_look_at_part(const struct mf_part *part, const struct mf_part *next,
                            const struct mf_block *block, float *out, int64_t out_stride) {
    switch (block->num) {
    case 1: mf_look(part, next, block, out, out_stride, 1); break;
    case 2: mf_look(part, next, block, out, out_stride, 2); break;
    case 3: mf_look(part, next, block, out, out_stride, 3); break;
    case 4: mf_look(part, next, block, out, out_stride, 4); break;
    case 5: mf_look(part, next, block, out, out_stride, 5); break;
    default: mf_look(part, next, block, out, out_stride, 6); break;
    }
}

/* Add a later part's view to the parts before it: mixed [A] and stats {greatest score, sum}. */
static void mf_merge_part(const float *view, int64_t head_dim, float *mixed, float *stats) {
    float top = fmaxf(stats[0], view[head_dim]);
    __m512 before = mf_exp_negative(_mm512_set1_ps(stats[0] - top));
    __m512 added = mf_exp_negative(_mm512_set1_ps(view[head_dim] - top));
    for (int64_t dim = 0; dim < head_dim; dim += MF_UNIT) {
        __m512 old = _mm512_mul_ps(_mm512_loadu_ps(mixed + dim), before);
        _mm512_storeu_ps(mixed + dim, _mm512_fmadd_ps(_mm512_loadu_ps(view + dim), added, old));
    }
    stats[0] = top;
    stats[1] = fmaf(view[head_dim + 1], _mm512_cvtss_f32(added),
                    stats[1] * _mm512_cvtss_f32(before));
}

static void mf_divide(float *mixed, int64_t head_dim, float sum) {
    __m512 divisor = _mm512_set1_ps(sum);
    for (int64_t dim = 0; dim < head_dim; dim += MF_UNIT)
        _mm512_storeu_ps(mixed + dim, _mm512_div_ps(_mm512_loadu_ps(mixed + dim), divisor));
}

#endif
