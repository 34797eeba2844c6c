/* Rows of activations, packed for the matrix that they meet. */
#include <string.h>

#include "mf_kernels.h"

static int64_t padded_k(const struct mf_matrix *w)
{
    return mf_round_up(w->k, w->format == MF_BF16 ? 2 : w->format == MF_INT8 ? 4 : MF_GROUP);
}

int64_t mf_row_bytes(const struct mf_matrix *w)
{
    return padded_k(w) * (w->format == MF_BF16 ? 2 : 1);
}

int64_t mf_row_groups(const struct mf_matrix *w)
{
    return w->format == MF_INT4 ? padded_k(w) / MF_GROUP : 1;
}

static int64_t scales_bytes(int64_t t)
{
    return mf_round_up(t * 4, 64);
}
static int64_t offsets_bytes(const struct mf_matrix *w, int64_t t)
{
    return mf_round_up(t * mf_row_groups(w) * 4, 64);
}

int64_t mf_rows_bytes(const struct mf_matrix *w, int64_t t)
{
    const int64_t values = mf_round_up(t * mf_row_bytes(w), 64);
    return w->format == MF_BF16 ? values : values + scales_bytes(t) + offsets_bytes(w, t);
}

struct mf_rows mf_rows_at(const struct mf_matrix *w, void *rows, int64_t t)
{
    if (w->format == MF_BF16)
        return (struct mf_rows){.t = t, .values = rows};
    char *offsets = (char *)rows + scales_bytes(t);
    return (struct mf_rows){.t = t,
                            .values = offsets + offsets_bytes(w, t),
                            .scales = rows,
                            .offsets = (int32_t *)offsets};
}

struct mf_rows mf_rows_part(const struct mf_matrix *w, struct mf_rows rows, int64_t first,
                            int64_t t)
{
    struct mf_rows part = {.t = t, .values = rows.values + first * mf_row_bytes(w)};
    if (w->format != MF_BF16) {
        part.scales = rows.scales + first;
        part.offsets = rows.offsets + first * mf_row_groups(w);
    }
    return part;
}

/* Where the first four bytes of a row go, and the distance to its next four. */
static char *row_start(const struct mf_matrix *w, const struct mf_rows *rows, int64_t row,
                       int64_t *stride)
{
    const int64_t blocks = mf_num_blocks(rows->t);
    int64_t block = row * blocks / rows->t;
    while (mf_block_start(rows->t, block) > row)
        block--;
    while (block + 1 < blocks && mf_block_start(rows->t, block + 1) <= row)
        block++;
    const int64_t first = mf_block_start(rows->t, block);
    const int64_t end = block + 1 < blocks ? mf_block_start(rows->t, block + 1) : rows->t;
    *stride = 4 * (end - first);
    return rows->values + first * mf_row_bytes(w) + 4 * (row - first);
}

/* Store up to 16 words at a distance from each other. */
static void scatter(char *at, int64_t stride, __m512i words, int64_t count)
{
    int32_t buffer[16];
    _mm512_storeu_si512(buffer, words);
    for (int64_t i = 0; i < count; i++)
        memcpy(at + i * stride, buffer + i, 4);
}

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* x[0..15] with zeros behind the first `count`. */
static __m512 load_some(const float *x, int64_t count)
{
    if (count >= 16)
        return _mm512_loadu_ps(x);
    return _mm512_maskz_loadu_ps(count > 0 ? (__mmask16)((1u << count) - 1) : 0, x);
}

static void pack_bf16(char *at, int64_t stride, const float *x, int64_t k)
{
    for (int64_t i = 0; i < k; i += 32) {
        const __m512 low = load_some(x + i, k - i), high = load_some(x + i + 16, k - i - 16);
        scatter(at, stride, (__m512i)_mm512_cvtne2ps_pbh(high, low),
                smaller(16, mf_ceil_div(k - i, 2)));
        at += 16 * stride;
    }
}

/* Largest magnitude; not a number counts as larger than infinity, so that it is not lost. */
static float largest(const float *x, int64_t k)
{
    __m512i most = _mm512_setzero_si512();
    const __m512i positive = _mm512_set1_epi32(0x7fffffff);
    for (int64_t i = 0; i < k; i += 16) {
        const __m512i bits = _mm512_castps_si512(load_some(x + i, k - i));
        most = _mm512_max_epi32(most, _mm512_and_si512(bits, positive));
    }
    const int32_t bits = _mm512_reduce_max_epi32(most);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static __m512i quantised(const float *x, int64_t count, __m512 inverse)
{
    return _mm512_cvtps_epi32(_mm512_mul_ps(load_some(x, count), inverse));
}

/*
 * 64 inputs at a time, with zeros from k to k_padded; returns through `offsets` -shift times the
 * sum of each group.
 */
static void pack_int8(char *at, int64_t stride, const float *x, int64_t k, int64_t k_padded,
                      int64_t group, float inverse, int32_t shift, int32_t *offsets)
{
    const __m512 factor = _mm512_set1_ps(inverse);
    for (int64_t start = 0; start < k_padded; start += group) {
        const int64_t end = smaller(k_padded, start + group);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = start; i < end; i += 64) {
            __m512i bytes = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) {
                const int64_t from = i + 16 * part;
                const __m512i numbers = quantised(x + from, k - from, factor);
                sum = _mm512_add_epi32(sum, numbers);
                const __m128i narrow = _mm512_cvtepi32_epi8(numbers);
                bytes = part == 0   ? _mm512_inserti32x4(bytes, narrow, 0)
                        : part == 1 ? _mm512_inserti32x4(bytes, narrow, 1)
                        : part == 2 ? _mm512_inserti32x4(bytes, narrow, 2)
                                    : _mm512_inserti32x4(bytes, narrow, 3);
            }
            scatter(at, stride, bytes, smaller(16, mf_ceil_div(end - i, 4)));
            at += 16 * stride;
        }
        *offsets++ = (int32_t)(-(uint32_t)shift * (uint32_t)_mm512_reduce_add_epi32(sum));
    }
}

void mf_pack_row(const struct mf_matrix *w, const struct mf_rows *rows, int64_t row,
                 const float *x)
{
    int64_t stride;
    char *at = row_start(w, rows, row, &stride);
    if (w->format == MF_BF16) {
        pack_bf16(at, stride, x, w->k);
        return;
    }
    const float most = largest(x, w->k);
    /* Below this the inverse would overflow; such a row is zero for any purpose. */
    const int nothing = most < 1e-30f;
    rows->scales[row] = nothing ? 0.0f : most / 127.0f;
    const int whole = w->format == MF_INT8;
    pack_int8(at, stride, x, w->k, mf_row_bytes(w), whole ? mf_row_bytes(w) : MF_GROUP,
              nothing ? 0.0f : 127.0f / most, whole ? 128 : 8,
              rows->offsets + row * mf_row_groups(w));
}

void mf_pack_rows(const struct mf_matrix *w, const float *x, int64_t t, int64_t ldx, void *rows)
{
    const struct mf_rows packed = mf_rows_at(w, rows, t);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < t; row++)
        mf_pack_row(w, &packed, row, x + row * ldx);
}
