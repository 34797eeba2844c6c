/* bf16 x bf16 -> fp32: one accumulator per output runs over K in order, two inputs a step. */
#include "mf_kernels.h"

MF_INLINE void kernel(const int height, const struct mf_slice *slice)
{
    __m512 sums[MF_BLOCK][2];
    float *out = slice->out;
#pragma GCC unroll 12
    for (int row = 0; row < height; row++) {
        sums[row][0] = slice->fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(out + row * 32);
        sums[row][1] = slice->fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(out + row * 32 + 16);
    }
    const char *weights = slice->weights, *rows = slice->rows;
    for (int64_t step = 0; step < slice->steps; step++) {
        const __m512bh low = (__m512bh)_mm512_loadu_si512(weights);
        const __m512bh high = (__m512bh)_mm512_loadu_si512(weights + 64);
#pragma GCC unroll 12
        for (int row = 0; row < height; row++) {
            const __m512bh x = (__m512bh)mf_broadcast(rows + 4 * row);
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], low, x);
            sums[row][1] = _mm512_dpbf16_ps(sums[row][1], high, x);
        }
        weights += 128;
        rows += 4 * height;
    }
#pragma GCC unroll 12
    for (int row = 0; row < height; row++) {
        _mm512_storeu_ps(out + row * 32, sums[row][0]);
        _mm512_storeu_ps(out + row * 32 + 16, sums[row][1]);
    }
}

void mf_bf16_slice(const struct mf_slice *slice)
{
    MF_FOR_HEIGHT(slice->height, kernel, slice)
}
