/* From a matrix as torch holds it to a packed one. */
#ifndef MF_PACK_H
#define MF_PACK_H

#include "mf_matrix.h"

/* W [N, K], rows one after another: bf16; int8; or int4, two in a byte, the even input's low. */
struct mf_source {
    int32_t format;
    int32_t gate_up; /* the first N/2 rows gate the others: a panel is 16 gates and their 16 */
    int64_t n, k;
    const void *values;
    const float *scales; /* int8 [N]; int4 [N, groups] */
};

/* Outputs of the packed matrix: as many as of the source, but whole panels with gate_up. */
int64_t mf_packed_n(const struct mf_source *source);
/* Bytes of its values and its scales. */
int64_t mf_values_bytes(const struct mf_source *source);
int64_t mf_scales_bytes(const struct mf_source *source);
/* Fill both; they are aligned to 64. */
void mf_pack_matrix(const struct mf_source *source, void *values, float *scales, int32_t threads);

#endif
