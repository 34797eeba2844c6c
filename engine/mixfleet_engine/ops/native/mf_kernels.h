/* The three inner products, one a format; called by mf_tile_product only. */
#ifndef MF_KERNELS_H
#define MF_KERNELS_H

#include <immintrin.h>

#include "mf_matrix.h"

/*
 * Add the product of some steps of K to out [height][32]: bf16 and int4 add fp32, int8 adds int32.
 * `fresh` starts at zero (int8: at the rows' offsets) in place of out.
 */
struct mf_slice {
    const char *weights; /* of the panel, from the first step on */
    const char *rows;    /* of the block, from the first step on */
    int64_t steps;
    int64_t height;
    int fresh;
    void *out;
};

void mf_bf16_slice(const struct mf_slice *slice);
void mf_int8_slice(const struct mf_slice *slice, const int32_t *offsets);
/* One step is a group of 128 inputs; scales [steps][32], offsets [height][groups]. */
void mf_int4_slice(const struct mf_slice *slice, const float *scales, const int32_t *offsets,
                   int64_t groups);

/* Call KERNEL(h, ...) with h a constant, so that its loops unroll into registers. */
#define MF_FOR_HEIGHT(height, KERNEL, ...)          \
    switch (height) {                               \
    case 1: KERNEL(1, __VA_ARGS__); break;          \
    case 2: KERNEL(2, __VA_ARGS__); break;          \
    case 3: KERNEL(3, __VA_ARGS__); break;          \
    case 4: KERNEL(4, __VA_ARGS__); break;          \
    case 5: KERNEL(5, __VA_ARGS__); break;          \
    case 6: KERNEL(6, __VA_ARGS__); break;          \
    case 7: KERNEL(7, __VA_ARGS__); break;          \
    case 8: KERNEL(8, __VA_ARGS__); break;          \
    case 9: KERNEL(9, __VA_ARGS__); break;          \
    case 10: KERNEL(10, __VA_ARGS__); break;        \
    case 11: KERNEL(11, __VA_ARGS__); break;        \
    default: KERNEL(12, __VA_ARGS__); break;        \
    }

#define MF_INLINE static inline __attribute__((always_inline))

/* Four bytes of one row in all 16 lanes. */
MF_INLINE __m512i mf_broadcast(const char *bytes)
{
    int32_t word;
    __builtin_memcpy(&word, bytes, 4);
    return _mm512_set1_epi32(word);
}

#endif
