/* The experts' half of a decoder layer. */
#ifndef MF_MOE_H
#define MF_MOE_H

#include "mf_matrix.h"

/* Letters: T tokens, D model width, F expert width, E experts, K experts per token. */
struct mf_moe {
    int64_t num_experts, top_k; /* E and K */
    int64_t d, f;
    int32_t shared; /* w13 and w2 have one matrix each, which all experts share */
    float norm_eps;
    const float *norm;            /* [D] */
    const float *gate;            /* [E, D] */
    const struct mf_matrix *w13;  /* [E] of [2F, D], packed as gates with what they gate */
    const struct mf_matrix *w2;   /* [E] of [D, F] */
};

int64_t mf_moe_scratch_bytes(const struct mf_moe *moe, int64_t t);

/*
 * Write what the block adds to the running sums x [T, D] to out [T, D], or, where `out` is x, add
 * it on. Scratch is aligned to 64.
 */
void mf_moe_run(const struct mf_moe *moe, const float *x, int64_t t, float *out, void *scratch,
                int32_t threads);

#endif
