/* The attention half of a layer: norm, projections, rotary embedding, cache, attention, output. */
#include "mf_attention.h"

#include "mf_norm.h"
#include "mf_paged_attention.h"

/* Everything between the phases. */
struct work {
    float *normed; /* [T, D] */
    void *rows;    /* packed, of the product under way */
    float *qkv;    /* [T, (H + 2G) * A] */
    uint16_t *queries;
    float *stats;
    float *mixed; /* [T, H * A] */
    float *partials;
    struct mf_attention_plan plan;
};

static void *take(char **at, int64_t bytes) {
    void *taken = *at;
    *at += mf_round_up(bytes, 64);
    return taken;
}

/* Lay the work out in memory from *at on, but for the partial results, which the plan counts. */
static struct work lay_out(const struct mf_attention *layer, int64_t num_chunks, int64_t t,
                           char **at) {
    const struct mf_heads heads = layer->heads;
    const int64_t width = heads.num_queries * heads.dim;
    const int64_t in = mf_rows_bytes(layer->wqkv, t), out = mf_rows_bytes(layer->wo, t);
    struct work work = {.normed = take(at, t * layer->wqkv->k * 4)};
    work.rows = take(at, in > out ? in : out);
    work.qkv = take(at, t * layer->wqkv->n * 4);
    work.queries = take(at, t * width * 2);
    work.stats = take(at, t * heads.num_queries * 8);
    work.mixed = take(at, t * width * 4);
    work.plan.first_items = take(at, (num_chunks + 1) * 8);
    work.plan.num_spans = take(at, num_chunks * 8);
    work.plan.first_partials = take(at, num_chunks * 8);
    return work;
}

int64_t mf_attention_scratch_bytes(const struct mf_attention *layer,
                                   const struct mf_chunks *chunks, int64_t t, int32_t threads) {
    char *at = (char *)64;
    lay_out(layer, chunks->count, t, &at);
    const int64_t partials = mf_num_partials(layer->heads, chunks, threads);
    return at - (char *)64 + partials * (layer->heads.dim + 2) * 4;
}

void mf_attention_run(const struct mf_attention *layer, const struct mf_chunks *chunks,
                      const struct mf_kv *kv, const float *x, int64_t t, float *out, void *scratch,
                      int32_t threads) {
    const int64_t d = layer->wqkv->k;
    char *at = scratch;
    struct work work = lay_out(layer, chunks->count, t, &at);
    work.partials = (float *)at;
    mf_plan_attention(layer->heads, chunks, threads, &work.plan);
    float *delta = out == x ? work.normed : out;
#pragma omp parallel num_threads(threads)
    {
        mf_rms_norm(x, layer->norm, layer->norm_eps, t, d, work.normed);
        mf_pack_rows(layer->wqkv, work.normed, t, d, work.rows);
        mf_matmul(layer->wqkv, work.rows, t, work.qkv, layer->wqkv->n);
        mf_rotate_and_store(layer, chunks, kv, work.qkv, t, work.queries);
        mf_attend(layer->heads, chunks, kv, &work.plan, work.queries, t, work.partials, work.stats,
                  work.mixed);
        mf_pack_rows(layer->wo, work.mixed, t, layer->wo->k, work.rows);
        mf_matmul(layer->wo, work.rows, t, delta, d);
        if (delta != out) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < t * d; i++)
                out[i] += delta[i];
        }
    }
}
