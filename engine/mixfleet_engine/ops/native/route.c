/* The router of a mixture of experts, in fp32. */
#include "mf_route.h"

#include <immintrin.h>
#include <math.h>

/* Four chains hide the latency of one; the lane of a number depends on its place only. */
static float dot(const float *a, const float *b, int64_t d)
{
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                      _mm512_setzero_ps()};
    int64_t i = 0;
    for (; i + 64 <= d; i += 64)
        for (int64_t part = 0; part < 4; part++) {
            const __m512 x = _mm512_loadu_ps(a + i + 16 * part);
            sums[part] = _mm512_fmadd_ps(x, _mm512_loadu_ps(b + i + 16 * part), sums[part]);
        }
    for (; i < d; i += 16) {
        const __mmask16 lanes = d - i >= 16 ? 0xffff : (__mmask16)((1u << (d - i)) - 1);
        const __m512 x = _mm512_maskz_loadu_ps(lanes, a + i);
        sums[0] = _mm512_fmadd_ps(x, _mm512_maskz_loadu_ps(lanes, b + i), sums[0]);
    }
    return _mm512_reduce_add_ps(
        _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

void mf_route_token(const struct mf_route *route, const float *gate, const float *x, int64_t d,
                    int64_t token, float *scores)
{
    const int64_t num = route->num_experts, top_k = route->top_k;
    int32_t *chosen = route->chosen + token * top_k;
    float *shares = route->shares + token * top_k;
    for (int64_t expert = 0; expert < num; expert++)
        scores[expert] = dot(gate + expert * d, x, d);
    for (int64_t place = 0; place < top_k; place++) {
        int64_t best = -1;
        for (int64_t expert = 0; expert < num; expert++) {
            int taken = 0;
            for (int64_t before = 0; before < place; before++)
                taken |= chosen[before] == expert;
            if (!taken && (best < 0 || scores[expert] > scores[best]))
                best = expert;
        }
        chosen[place] = (int32_t)best;
        shares[place] = scores[best];
    }
    /* Mixtral normalises over the chosen K, not over all E: softmax after top-k. */
    const float top = shares[0];
    float sum = 0.0f;
    for (int64_t place = 0; place < top_k; place++)
        sum += shares[place] = expf(shares[place] - top);
    for (int64_t place = 0; place < top_k; place++)
        shares[place] /= sum;
}

void mf_route_sort(const struct mf_route *route, int64_t t)
{
    int64_t *starts = route->starts;
    const int64_t num = route->num_experts, rows = t * route->top_k;
    for (int64_t expert = 0; expert <= num; expert++)
        starts[expert] = 0;
    for (int64_t row = 0; row < rows; row++)
        starts[route->chosen[row] + 1]++;
    for (int64_t expert = 0; expert < num; expert++)
        starts[expert + 1] += starts[expert];
    for (int64_t row = 0; row < rows; row++)
        route->places[row] = starts[route->chosen[row]]++;
    /* Filling moved each start to the next one's. */
    for (int64_t expert = num; expert > 0; expert--)
        starts[expert] = starts[expert - 1];
    starts[0] = 0;
}
