/*
 * int8 x int8 -> int32, exact. The instruction wants one unsigned side: weights are stored + 128,
 * and each row's offset of -128 times its sum takes that off again.
 */
#include "mf_kernels.h"

MF_INLINE void kernel(const int height, const struct mf_slice *slice, const int32_t *offsets)
{
    __m512i sums[MF_BLOCK][2];
    int32_t *out = slice->out;
#pragma GCC unroll 12
    for (int row = 0; row < height; row++) {
        const __m512i start = _mm512_set1_epi32(offsets[row]);
        sums[row][0] = slice->fresh ? start : _mm512_loadu_si512(out + row * 32);
        sums[row][1] = slice->fresh ? start : _mm512_loadu_si512(out + row * 32 + 16);
    }
    const char *weights = slice->weights, *rows = slice->rows;
    for (int64_t step = 0; step < slice->steps; step++) {
        const __m512i low = _mm512_loadu_si512(weights);
        const __m512i high = _mm512_loadu_si512(weights + 64);
#pragma GCC unroll 12
        for (int row = 0; row < height; row++) {
            const __m512i x = mf_broadcast(rows + 4 * row);
            sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], low, x);
            sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], high, x);
        }
        weights += 128;
        rows += 4 * height;
    }
#pragma GCC unroll 12
    for (int row = 0; row < height; row++) {
        _mm512_storeu_si512(out + row * 32, sums[row][0]);
        _mm512_storeu_si512(out + row * 32 + 16, sums[row][1]);
    }
}

void mf_int8_slice(const struct mf_slice *slice, const int32_t *offsets)
{
    MF_FOR_HEIGHT(slice->height, kernel, slice, offsets)
}
