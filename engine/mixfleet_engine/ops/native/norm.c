/* Root mean square normalisation of fp32 rows. */
#include "mf_norm.h"

#include <immintrin.h>
#include <math.h>

/* Four chains of sums hide the latency of one. Which element goes to which lane depends on its
 * place in the row only, so the sum has the same bits whatever else is in the step. */
#define CHAINS 4
#define LANES 16

static __mmask16 first_lanes(int64_t count) {
    return count >= LANES ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

static float mean_of_squares(const float *x, int64_t d) {
    __m512 sums[CHAINS];
    for (int64_t i = 0; i < CHAINS; i++)
        sums[i] = _mm512_setzero_ps();
    for (int64_t start = 0; start < d; start += CHAINS * LANES) {
        for (int64_t i = 0; i < CHAINS; i++) {
            int64_t at = start + i * LANES;
            __mmask16 lanes = first_lanes(d - at);
            __m512 part = _mm512_maskz_loadu_ps(lanes, x + (lanes ? at : 0));
            sums[i] = _mm512_fmadd_ps(part, part, sums[i]);
        }
    }
    __m512 pairs = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    return _mm512_reduce_add_ps(pairs) / (float)d;
}

void mf_rms_norm(const float *x, const float *weight, float eps, int64_t t, int64_t d, float *out) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < t; row++) {
        const float *in = x + row * d;
        __m512 factor = _mm512_set1_ps(1.0f / sqrtf(mean_of_squares(in, d) + eps));
        for (int64_t at = 0; at < d; at += LANES) {
            __mmask16 lanes = first_lanes(d - at);
            __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, in + at), factor);
            __m512 weighted = _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(lanes, weight + at));
            _mm512_mask_storeu_ps(out + row * d + at, lanes, weighted);
        }
    }
}
