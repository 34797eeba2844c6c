/* The two calls that are little more than one product: a linear layer, and the end of the model. */
#include "mf_output.h"

#include "mf_norm.h"

int64_t mf_linear_scratch_bytes(const struct mf_matrix *w, int64_t t)
{
    return mf_rows_bytes(w, t);
}

void mf_linear(const struct mf_matrix *w, const float *x, int64_t t, float *out, void *scratch,
               int32_t threads)
{
#pragma omp parallel num_threads(threads)
    {
        mf_pack_rows(w, x, t, w->k, scratch);
        mf_matmul(w, scratch, t, out, w->n);
    }
}

int64_t mf_output_scratch_bytes(const struct mf_output *output, int64_t t)
{
    return mf_round_up(t * output->matrix->k * 4, 64) + mf_rows_bytes(output->matrix, t);
}

void mf_output_run(const struct mf_output *output, const float *x, int64_t t, float *out,
                   void *scratch, int32_t threads)
{
    const struct mf_matrix *w = output->matrix;
    float *normed = scratch;
    void *rows = (char *)scratch + mf_round_up(t * w->k * 4, 64);
#pragma omp parallel num_threads(threads)
    {
        mf_rms_norm(x, output->norm, output->norm_eps, t, w->k, normed);
        mf_pack_rows(w, normed, t, w->k, rows);
        mf_matmul(w, rows, t, out, w->n);
    }
}
