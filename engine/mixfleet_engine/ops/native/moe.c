/* The experts' half of a decoder layer: norm, router, rows sorted by expert, two products, mix. */
#include "mf_moe.h"

#include "mf_exp.h"
#include "mf_norm.h"
#include "mf_route.h"

#define STRIP 512 /* numbers of a row that one thread mixes at a time */
#define TILE_ROWS (MF_TILE_BLOCKS * MF_BLOCK)

/* Everything between the phases. S rows of all experts: T * K, or T where experts are shared. */
struct work {
    const struct mf_moe *moe;
    int64_t t, num_rows; /* T and S */
    struct mf_route route;
    float *scores;         /* [T, E] */
    float *normed;         /* [T, D] */
    float *gated;          /* [S, F] */
    float *outputs;        /* [S, D] */
    struct mf_rows inputs; /* of w13 */
    struct mf_rows hidden; /* of w2 */
};

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static void *take(char **at, int64_t bytes)
{
    void *taken = *at;
    *at += mf_round_up(bytes, 64);
    return taken;
}

/* Lay the work out in memory from *at on; with *at NULL nothing may be read, but *at ends right. */
static struct work lay_out(const struct mf_moe *moe, int64_t t, char **at)
{
    const int64_t choices = t * moe->top_k, rows = moe->shared ? t : choices;
    struct work work = {.moe = moe, .t = t, .num_rows = rows};
    work.route = (struct mf_route){
        .num_experts = moe->num_experts,
        .top_k = moe->top_k,
        .chosen = take(at, choices * 4),
        .shares = take(at, choices * 4),
        .places = take(at, choices * 8),
        .starts = take(at, (moe->num_experts + 1) * 8),
    };
    work.scores = take(at, t * moe->num_experts * 4);
    work.normed = take(at, t * moe->d * 4);
    work.gated = take(at, rows * moe->f * 4);
    work.outputs = take(at, rows * moe->d * 4);
    work.inputs = mf_rows_at(moe->w13, take(at, mf_rows_bytes(moe->w13, rows)), rows);
    work.hidden = mf_rows_at(moe->w2, take(at, mf_rows_bytes(moe->w2, rows)), rows);
    return work;
}

int64_t mf_moe_scratch_bytes(const struct mf_moe *moe, int64_t t)
{
    char *at = (char *)64;
    lay_out(moe, t, &at);
    return at - (char *)64;
}

/* Rows of one expert: with shared experts all are the first one's. */
static int64_t expert_start(const struct work *work, int64_t expert)
{
    if (work->moe->shared)
        return expert == 0 ? 0 : work->t;
    return work->route.starts[expert];
}

static struct mf_rows expert_rows(const struct work *work, const struct mf_matrix *w,
                                  struct mf_rows rows, int64_t expert)
{
    const int64_t first = expert_start(work, expert);
    return mf_rows_part(w, rows, first, expert_start(work, expert + 1) - first);
}

static int64_t place_of(const struct work *work, int64_t choice)
{
    return work->moe->shared ? choice / work->moe->top_k : work->route.places[choice];
}

static void choose(const struct work *work)
{
    const struct mf_moe *moe = work->moe;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < work->t; token++)
        mf_route_token(&work->route, moe->gate, work->normed + token * moe->d, moe->d, token,
                       work->scores + token * moe->num_experts);
#pragma omp single
    mf_route_sort(&work->route, work->t);
}

static void pack_inputs(const struct work *work)
{
    const struct mf_moe *moe = work->moe;
    const int64_t top_k = moe->top_k, step = moe->shared ? top_k : 1;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < work->num_rows; i++) {
        const int64_t choice = i * step, place = place_of(work, choice);
        const int64_t expert = moe->shared ? 0 : work->route.chosen[choice];
        const struct mf_rows rows = expert_rows(work, moe->w13, work->inputs, expert);
        mf_pack_row(moe->w13, &rows, place - expert_start(work, expert),
                    work->normed + choice / top_k * moe->d);
    }
}

static void pack_hidden(const struct work *work)
{
    const struct mf_moe *moe = work->moe;
    for (int64_t expert = 0; expert < moe->num_experts; expert++) {
        const struct mf_rows rows = expert_rows(work, moe->w2, work->hidden, expert);
        const float *gated = work->gated + expert_start(work, expert) * moe->f;
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < rows.t; row++)
            mf_pack_row(moe->w2, &rows, row, gated + row * moe->f);
    }
#pragma omp barrier
}

/* silu(gate) * up of one tile, whose panel holds 16 gates and their 16. */
static void store_gated(const float *tile, int64_t count, int64_t panel, int64_t f, float *gated)
{
    const int64_t column = panel * 16;
    const __mmask16 lanes = f - column >= 16 ? 0xffff : (__mmask16)((1u << (f - column)) - 1);
    for (int64_t row = 0; row < count; row++) {
        const __m512 gate = _mm512_loadu_ps(tile + row * MF_PANEL);
        const __m512 up = _mm512_loadu_ps(tile + row * MF_PANEL + 16);
        _mm512_mask_storeu_ps(gated + row * f + column, lanes, _mm512_mul_ps(mf_silu(gate), up));
    }
}

static void store_output(const float *tile, int64_t count, int64_t panel, int64_t d, float *out)
{
    const int64_t width = smaller(MF_PANEL, d - panel * MF_PANEL);
    for (int64_t row = 0; row < count; row++)
        for (int64_t i = 0; i < width; i++)
            out[row * d + panel * MF_PANEL + i] = tile[row * MF_PANEL + i];
}

/* One of the two products, for all experts; ends with a barrier. */
static void multiply(const struct work *work, const struct mf_matrix *matrices,
                     struct mf_rows packed, int first_product)
{
    const struct mf_moe *moe = work->moe;
    const int64_t panels = mf_panels(matrices);
    int64_t items = 0;
    for (int64_t expert = 0; expert < moe->num_experts; expert++)
        items += panels * mf_num_tiles(expert_rows(work, matrices, packed, expert).t);
    /* Experts have unequal numbers of rows, and a thread may be held up by another process. */
#pragma omp for schedule(guided, 2)
    for (int64_t item = 0; item < items; item++) {
        int64_t expert = 0, left = item;
        struct mf_rows rows = expert_rows(work, matrices, packed, 0);
        while (left >= panels * mf_num_tiles(rows.t)) {
            left -= panels * mf_num_tiles(rows.t);
            rows = expert_rows(work, matrices, packed, ++expert);
        }
        const int64_t tiles = mf_num_tiles(rows.t), panel = left / tiles;
        float tile[TILE_ROWS * MF_PANEL];
        int64_t first;
        const int64_t count =
            mf_tile_product(matrices + expert, panel, &rows, left % tiles, &first, tile);
        first += expert_start(work, expert);
        if (first_product)
            store_gated(tile, count, panel, moe->f, work->gated + first * moe->f);
        else
            store_output(tile, count, panel, moe->d, work->outputs + first * moe->d);
    }
}

/* The shares of a token's choices times their rows, added in the order of its choices. */
static void mix(const struct work *work, const float *x, float *out)
{
    const int64_t d = work->moe->d, top_k = work->moe->top_k, strips = mf_ceil_div(d, STRIP);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < work->t * strips; item++) {
        const int64_t token = item / strips, from = item % strips * STRIP;
        const int64_t to = smaller(d, from + STRIP);
        for (int64_t at = from; at < to; at += 16) {
            const __mmask16 lanes = to - at >= 16 ? 0xffff : (__mmask16)((1u << (to - at)) - 1);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t choice = token * top_k; choice < (token + 1) * top_k; choice++) {
                const float *row = work->outputs + place_of(work, choice) * d;
                const __m512 share = _mm512_set1_ps(work->route.shares[choice]);
                sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, row + at), share, sum);
            }
            if (x == out)
                sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, x + token * d + at));
            _mm512_mask_storeu_ps(out + token * d + at, lanes, sum);
        }
    }
}

void mf_moe_run(const struct mf_moe *moe, const float *x, int64_t t, float *out, void *scratch,
                int32_t threads)
{
    char *at = scratch;
    const struct work work = lay_out(moe, t, &at);
#pragma omp parallel num_threads(threads)
    {
        mf_rms_norm(x, moe->norm, moe->norm_eps, t, moe->d, work.normed);
        choose(&work);
        pack_inputs(&work);
        multiply(&work, moe->w13, work.inputs, 1);
        pack_hidden(&work);
        multiply(&work, moe->w2, work.hidden, 0);
        mix(&work, x, out);
    }
}
