/* Root mean square normalisation. */
#ifndef MF_NORM_H
#define MF_NORM_H

#include <stdint.h>

/* out[t, d] = x / sqrt(mean(x * x) + eps) * weight, row by row; ``out`` may be ``x``.
 * Called by the whole OpenMP team; ends with a barrier. */
void mf_rms_norm(const float *x, const float *weight, float eps, int64_t t, int64_t d, float *out);

#endif
