/* Rows times a packed matrix: tiles of rows by panels of outputs. */
#include "mf_kernels.h"

/* Bytes of one panel that stay in a near cache while the blocks of a tile pass by. */
#define CHUNK_BYTES 32768

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* What one step of the format's kernel takes: bytes of a panel and of one row. */
static void step_bytes(const struct mf_matrix *w, int64_t *panel, int64_t *row)
{
    *panel = w->format == MF_INT4 ? MF_GROUP * MF_PANEL / 2 : 128;
    *row = w->format == MF_INT4 ? MF_GROUP : 4;
}

static void run_slice(const struct mf_matrix *w, int64_t panel, const struct mf_rows *rows,
                      int64_t row, int64_t step, const struct mf_slice *slice)
{
    const int64_t groups = mf_row_groups(w);
    switch (w->format) {
    case MF_BF16:
        mf_bf16_slice(slice);
        break;
    case MF_INT8:
        mf_int8_slice(slice, rows->offsets + row);
        break;
    default:
        mf_int4_slice(slice, w->scales + (panel * groups + step) * MF_PANEL,
                      rows->offsets + row * groups + step, groups);
    }
}

/* int8: int32 sums to fp32; int4: the rows' scales. */
static void finish(const struct mf_matrix *w, int64_t panel, const float *row_scales,
                   int64_t count, float *out)
{
    for (int64_t i = 0; i < count * 2; i++) {
        float *at = out + i * 16;
        __m512 sum = _mm512_loadu_ps(at);
        if (w->format == MF_INT8) {
            const float *scales = w->scales + panel * MF_PANEL + i % 2 * 16;
            sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(sum)),
                                _mm512_loadu_ps(scales));
        }
        _mm512_storeu_ps(at, _mm512_mul_ps(sum, _mm512_set1_ps(row_scales[i / 2])));
    }
}

int64_t mf_tile_product(const struct mf_matrix *w, int64_t panel, const struct mf_rows *rows,
                        int64_t tile, int64_t *first, float *out)
{
    int64_t panel_step, row_step;
    step_bytes(w, &panel_step, &row_step);
    const int64_t row_bytes = mf_row_bytes(w), steps = row_bytes / row_step;
    const char *weights = (const char *)w->values + panel * steps * panel_step;
    const int64_t blocks = mf_num_blocks(rows->t), begin = tile * MF_TILE_BLOCKS;
    const int64_t end = smaller(blocks, begin + MF_TILE_BLOCKS);
    const int64_t chunk = end - begin == 1 ? steps : CHUNK_BYTES / panel_step;
    *first = mf_block_start(rows->t, begin);
    for (int64_t step = 0; step < steps; step += chunk) {
        for (int64_t block = begin; block < end; block++) {
            const int64_t row = mf_block_start(rows->t, block);
            const int64_t height = mf_block_start(rows->t, block + 1) - row;
            const struct mf_slice slice = {
                .weights = weights + step * panel_step,
                .rows = rows->values + row * row_bytes + step * row_step * height,
                .steps = smaller(chunk, steps - step),
                .height = height,
                .fresh = step == 0,
                .out = out + (row - *first) * MF_PANEL,
            };
            run_slice(w, panel, rows, row, step, &slice);
        }
    }
    const int64_t count = mf_block_start(rows->t, end) - *first;
    if (w->format != MF_BF16)
        finish(w, panel, rows->scales + *first, count, out);
    return count;
}

static void copy_tile(const float *tile, int64_t count, int64_t width, float *out, int64_t ldo)
{
    for (int64_t row = 0; row < count; row++)
        for (int64_t i = 0; i < width; i++)
            out[row * ldo + i] = tile[row * MF_PANEL + i];
}

void mf_matmul(const struct mf_matrix *w, const void *rows, int64_t t, float *out, int64_t ldo)
{
    const struct mf_rows packed = mf_rows_at(w, (void *)rows, t);
    const int64_t tiles = mf_num_tiles(t), items = mf_panels(w) * tiles;
#pragma omp for schedule(guided, 2)
    for (int64_t item = 0; item < items; item++) {
        const int64_t panel = item / tiles;
        float sums[MF_TILE_BLOCKS * MF_BLOCK * MF_PANEL];
        int64_t first;
        const int64_t count = mf_tile_product(w, panel, &packed, item % tiles, &first, sums);
        copy_tile(sums, count, smaller(MF_PANEL, w->n - panel * MF_PANEL),
                  out + first * ldo + panel * MF_PANEL, ldo);
    }
}
