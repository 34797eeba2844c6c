/*
 * int4 x int8 -> int32 within a group of 128 inputs, exact; then groups are scaled and added in
 * fp32, in order. Weights are stored + 8; a row's offset of a group takes that off again.
 */
#include "mf_kernels.h"

#define GROUP_STEPS (MF_GROUP / 8)

MF_INLINE void group_sums(const int height, const char *weights, const char *rows,
                          __m512i sums[MF_BLOCK][2])
{
    const __m512i mask = _mm512_set1_epi8(15);
    for (int step = 0; step < GROUP_STEPS; step++) {
        const __m512i first = _mm512_loadu_si512(weights);
        const __m512i second = _mm512_loadu_si512(weights + 64);
        const __m512i low[2] = {_mm512_and_si512(first, mask), _mm512_and_si512(second, mask)};
        const __m512i high[2] = {_mm512_and_si512(_mm512_srli_epi16(first, 4), mask),
                                 _mm512_and_si512(_mm512_srli_epi16(second, 4), mask)};
#pragma GCC unroll 12
        for (int row = 0; row < height; row++) {
            const __m512i x = mf_broadcast(rows + 4 * row);
            const __m512i y = mf_broadcast(rows + 4 * (height + row));
            sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], low[0], x);
            sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], low[1], x);
            sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], high[0], y);
            sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], high[1], y);
        }
        weights += 128;
        rows += 8 * height;
    }
}

MF_INLINE void kernel(const int height, const struct mf_slice *slice, const float *scales,
                      const int32_t *offsets, int64_t groups)
{
    float *out = slice->out;
    for (int64_t group = 0; group < slice->steps; group++) {
        __m512i sums[MF_BLOCK][2];
#pragma GCC unroll 12
        for (int row = 0; row < height; row++)
            sums[row][0] = sums[row][1] = _mm512_set1_epi32(offsets[row * groups + group]);
        const int64_t done = group * GROUP_STEPS;
        group_sums(height, slice->weights + done * 128, slice->rows + done * 8 * height, sums);
#pragma GCC unroll 12
        for (int row = 0; row < height; row++) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                float *at = out + row * 32 + half * 16;
                const __m512 before =
                    slice->fresh && group == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(at);
                const __m512 scale = _mm512_loadu_ps(scales + group * 32 + half * 16);
                const __m512 sum = _mm512_cvtepi32_ps(sums[row][half]);
                _mm512_storeu_ps(at, _mm512_fmadd_ps(sum, scale, before));
            }
        }
    }
}

void mf_int4_slice(const struct mf_slice *slice, const float *scales, const int32_t *offsets,
                   int64_t groups)
{
    MF_FOR_HEIGHT(slice->height, kernel, slice, scales, offsets, groups)
}
