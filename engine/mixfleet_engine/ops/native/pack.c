/* Packing of weights, once at load time. */
#include "mf_pack.h"

#include <immintrin.h>
#include <string.h>

/* Steps of K that are written together: as many lines of a panel stay in the first-level cache. */
#define STEPS 64

int64_t mf_packed_n(const struct mf_source *source)
{
    if (!source->gate_up)
        return source->n;
    return mf_ceil_div(source->n / 2, MF_PANEL / 2) * MF_PANEL;
}

static struct mf_matrix shape(const struct mf_source *source)
{
    return (struct mf_matrix){
        .format = source->format, .n = mf_packed_n(source), .k = source->k};
}

/* Four-byte steps of one output. */
static int64_t num_steps(const struct mf_matrix *w)
{
    return mf_row_bytes(w) / (w->format == MF_INT4 ? 8 : 4);
}

int64_t mf_values_bytes(const struct mf_source *source)
{
    const struct mf_matrix w = shape(source);
    return mf_panels(&w) * MF_PANEL * num_steps(&w) * 4;
}

int64_t mf_scales_bytes(const struct mf_source *source)
{
    const struct mf_matrix w = shape(source);
    return w.format == MF_BF16 ? 0 : mf_panels(&w) * MF_PANEL * mf_row_groups(&w) * 4;
}

/* The source's row of a lane of a panel, -1: none, it is padding. */
static int64_t source_row(const struct mf_source *source, int64_t panel, int64_t lane)
{
    const int64_t half = MF_PANEL / 2;
    if (!source->gate_up) {
        const int64_t row = panel * MF_PANEL + lane;
        return row < source->n ? row : -1;
    }
    const int64_t row = panel * half + lane % half, width = source->n / 2;
    return row >= width ? -1 : lane < half ? row : width + row;
}

/* Inputs of one four-byte step, and the bytes of one row. */
static int64_t step_inputs(int32_t format)
{
    return format == MF_BF16 ? 2 : format == MF_INT8 ? 4 : 8;
}

static int64_t source_bytes(const struct mf_source *source)
{
    return source->format == MF_BF16 ? 2 * source->k
           : source->format == MF_INT8 ? source->k
                                       : source->k / 2;
}

/* The same inputs as a panel has them. */
static inline uint32_t converted(int32_t format, uint32_t word)
{
    if (format == MF_BF16)
        return word;
    if (format == MF_INT8)
        return word ^ 0x80808080;
    return (_pdep_u32(word & 0xffff, 0x0f0f0f0f) | _pdep_u32(word >> 16, 0xf0f0f0f0)) ^ 0x88888888;
}

/* One step of a row that may end in it; `row` NULL: padding. */
static uint32_t last_step(const struct mf_source *source, const uint8_t *row, int64_t step)
{
    uint32_t word = 0;
    const int64_t left = source_bytes(source) - step * 4;
    if (row && left > 0)
        memcpy(&word, row + step * 4, left < 4 ? (size_t)left : 4);
    return converted(source->format, word);
}

/* Steps from `start` to `end` of one lane; `row` NULL: padding. */
static inline void pack_lane(const struct mf_source *source, int32_t format, const uint8_t *row,
                             int64_t start, int64_t end, uint32_t *out)
{
    const int64_t whole = row ? source->k / step_inputs(format) : 0;
    int64_t step = start;
    for (; step < end && step < whole; step++) {
        uint32_t word;
        memcpy(&word, row + step * 4, 4);
        out[step * MF_PANEL] = converted(format, word);
    }
    for (; step < end; step++)
        out[step * MF_PANEL] = last_step(source, row, step);
}

static void pack_values(const struct mf_source *source, int64_t panel, int64_t steps,
                        uint32_t *values)
{
    uint32_t *out = values + panel * steps * MF_PANEL;
    for (int64_t start = 0; start < steps; start += STEPS) {
        const int64_t end = start + STEPS < steps ? start + STEPS : steps;
        for (int64_t lane = 0; lane < MF_PANEL; lane++) {
            const int64_t number = source_row(source, panel, lane);
            const uint8_t *row = (const uint8_t *)source->values + number * source_bytes(source);
            if (number < 0)
                row = NULL;
            /* With the format a constant, its branches leave the loop. */
            if (source->format == MF_BF16)
                pack_lane(source, MF_BF16, row, start, end, out + lane);
            else if (source->format == MF_INT8)
                pack_lane(source, MF_INT8, row, start, end, out + lane);
            else
                pack_lane(source, MF_INT4, row, start, end, out + lane);
        }
    }
}

static void pack_scales(const struct mf_source *source, int64_t panel, int64_t groups,
                        float *scales)
{
    for (int64_t group = 0; group < groups; group++)
        for (int64_t lane = 0; lane < MF_PANEL; lane++) {
            const int64_t row = source_row(source, panel, lane);
            scales[(panel * groups + group) * MF_PANEL + lane] =
                row < 0 ? 0.0f : source->scales[row * groups + group];
        }
}

void mf_pack_matrix(const struct mf_source *source, void *values, float *scales, int32_t threads)
{
    const struct mf_matrix w = shape(source);
    const int64_t panels = mf_panels(&w), steps = num_steps(&w), groups = mf_row_groups(&w);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel++) {
        pack_values(source, panel, steps, values);
        if (source->format != MF_BF16)
            pack_scales(source, panel, groups, scales);
    }
}
