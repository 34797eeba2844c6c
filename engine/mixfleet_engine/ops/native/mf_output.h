/* The two calls that are little more than one product: a linear layer, and the end of the model. */
#ifndef MF_OUTPUT_H
#define MF_OUTPUT_H

#include "mf_matrix.h"

/* The last norm and the output matrix [V, D]. */
struct mf_output {
    const float *norm; /* [D] */
    float norm_eps;
    const struct mf_matrix *matrix;
};

/* x [T, K] -> out [T, N]; scratch aligned to 64. */
int64_t mf_linear_scratch_bytes(const struct mf_matrix *w, int64_t t);
void mf_linear(const struct mf_matrix *w, const float *x, int64_t t, float *out, void *scratch,
               int32_t threads);

/* Running sums x [T, D] -> logits out [T, V]; scratch aligned to 64. */
int64_t mf_output_scratch_bytes(const struct mf_output *output, int64_t t);
void mf_output_run(const struct mf_output *output, const float *x, int64_t t, float *out,
                   void *scratch, int32_t threads);

#endif
