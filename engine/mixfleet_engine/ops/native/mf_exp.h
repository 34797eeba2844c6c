/* e^x for 16 numbers at once, the same bits for a number in whatever lane it stands. */
#ifndef MF_EXP_H
#define MF_EXP_H

#include <immintrin.h>

/* For x <= 0: relative error below 2e-7; 0 from -104 on; not a number stays so. After Cephes. */
static inline __attribute__((always_inline)) __m512 mf_exp_negative(__m512 x)
{
    /* In this order a NaN stays a NaN. */
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
    const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512 n =
        _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), nearest);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* x / (1 + e^-x), without overflow on either side. */
static inline __attribute__((always_inline)) __m512 mf_silu(__m512 x)
{
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 small = mf_exp_negative(_mm512_or_ps(x, _mm512_set1_ps(-0.0f)));
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 top = _mm512_mask_mul_ps(x, negative, x, small);
    return _mm512_div_ps(top, _mm512_add_ps(one, small));
}

#endif
