/* Attention of a step's rows over their sequences' blocks: one item after the other. */
#include <stdbool.h>

#include "mf_attention_kernel.h"
#include "mf_paged_attention.h"

struct step {
    struct mf_heads heads;
    const struct mf_chunks *chunks;
    const struct mf_kv *kv;
    const struct mf_attention_plan *plan;
    const uint16_t *queries;
    int64_t t;
    float *partials, *stats, *mixed;
};

/* Where a row's view of one part is kept until all are there. */
static float *partial_of(const struct step *step, int64_t chunk, int64_t row, int64_t part,
                         int64_t head) {
    int64_t view = row * mf_num_parts(step->chunks, chunk) + part;
    int64_t place = step->plan->first_partials[chunk] + view * step->heads.num_queries + head;
    return step->partials + place * (step->heads.dim + 2);
}

/* A part of an item's sequence for one KV head, and who looks at it. */
struct place {
    const struct mf_item *item;
    int64_t part, head;
};

static bool next_place(struct place *place) {
    if (++place->head == place->item->end_head) {
        place->head = place->item->first_head;
        place->part++;
    }
    return place->part < place->item->end_part;
}

static void find_part(const struct step *step, const struct place *place, struct mf_part *part) {
    const struct mf_item *item = place->item;
    const int32_t *table = step->chunks->tables + step->chunks->table_offsets[item->chunk];
    int64_t end = step->chunks->starts[item->chunk] + item->first_row + item->num_rows;
    int64_t length = end - place->part * MF_PART;
    part->num_units = mf_ceil_div(length < MF_PART ? length : MF_PART, MF_UNIT);
    for (int64_t u = 0; u < MF_PART_UNITS; u++) {
        if (u >= part->num_units) {
            part->keys[u] = part->keys[u - 1];
            part->values[u] = part->values[u - 1];
            continue;
        }
        int64_t unit = mf_unit_of(step->kv, table, place->part * MF_PART + u * MF_UNIT);
        part->keys[u] = mf_unit_keys(step->kv, step->heads, unit, place->head);
        part->values[u] = mf_unit_values(step->kv, step->heads, unit, place->head);
    }
}

/* Add part `number` to what a query head has of the parts before it. */
static void add_part(const struct step *step, int64_t query_head, int64_t number,
                     const float *view) {
    int64_t dim = step->heads.dim;
    float *mixed = step->mixed + query_head * dim, *stats = step->stats + 2 * query_head;
    if (number > 0) {
        mf_merge_part(view, dim, mixed, stats);
        return;
    }
    memcpy(mixed, view, (size_t)dim * sizeof *view);
    memcpy(stats, view + dim, 2 * sizeof *view);
}

/* Keep or add what queries first .. + num - 1 saw, counted over the item's rows and R heads. */
static void keep_views(const struct step *step, const struct place *place, int64_t first,
                       int64_t num, const float *views) {
    int64_t num_heads = step->heads.num_queries, shared = num_heads / step->heads.num_kv;
    int64_t chunk = place->item->chunk;
    for (int64_t i = 0; i < num; i++) {
        int64_t row = place->item->first_row + (first + i) / shared;
        int64_t head = place->head * shared + (first + i) % shared;
        const float *view = views + i * (step->heads.dim + 2);
        if (step->plan->num_spans[chunk] > 1)
            memcpy(partial_of(step, chunk, row, place->part, head), view,
                   (size_t)(step->heads.dim + 2) * sizeof *view);
        else
            add_part(step, (step->chunks->first_rows[chunk] + row) * num_heads + head, place->part,
                     view);
    }
}

static void look(const struct step *step, const struct place *place, const struct mf_part *part,
                 const struct mf_part *next) {
    const struct mf_item *item = place->item;
    int64_t dim = step->heads.dim, shared = step->heads.num_queries / step->heads.num_kv;
    int64_t row = step->chunks->first_rows[item->chunk] + item->first_row;
    const uint16_t *queries = step->queries + (place->head * step->t + row) * shared * dim;
    /* Row i may see begin + i positions of this part: none, some or all. */
    int64_t begin = step->chunks->starts[item->chunk] + item->first_row + 1 - place->part * MF_PART;
    int64_t first = begin > 0 ? 0 : (1 - begin) * shared, end = item->num_rows * shared;
    for (int64_t left = mf_ceil_div(end - first, MF_QUERIES); left > 0; left--) {
        float views[MF_QUERIES * (MF_MAX_HEAD_DIM + 2)];
        struct mf_block block = {.queries = queries + first * dim, .head_dim = dim};
        block.num = mf_ceil_div(end - first, left);
        for (int64_t i = 0; i < block.num; i++) {
            int64_t length = begin + (first + i) / shared;
            block.lengths[i] = length < MF_PART ? length : MF_PART;
        }
        mf_look_at_part(part, next, &block, views, dim + 2);
        keep_views(step, place, first, block.num, views);
        first += block.num;
        next = part; /* what is to come is fetched once */
    }
}

static void do_item(const struct step *step, const struct mf_item *item) {
    struct mf_part parts[2];
    struct place place = {item, item->first_part, item->first_head};
    if (place.part >= item->end_part)
        return;
    find_part(step, &place, &parts[0]);
    mf_fetch_part(&parts[0], step->heads.dim);
    for (int64_t now = 0, more = 1; more; now = 1 - now) {
        struct place next = place;
        more = next_place(&next);
        if (more)
            find_part(step, &next, &parts[1 - now]);
        look(step, &place, &parts[now], more ? &parts[1 - now] : &parts[now]);
        place = next;
    }
}

/* Bring a row's parts together if they were kept apart, and divide by the sum of shares. */
static void finish_row(const struct step *step, int64_t row) {
    int64_t num_heads = step->heads.num_queries, chunk = mf_chunk_of(step->chunks, row);
    int64_t inside = row - step->chunks->first_rows[chunk];
    int64_t parts = mf_ceil_div(step->chunks->starts[chunk] + inside + 1, MF_PART);
    for (int64_t head = 0; head < num_heads; head++) {
        int64_t query_head = row * num_heads + head;
        for (int64_t part = 0; step->plan->num_spans[chunk] > 1 && part < parts; part++)
            add_part(step, query_head, part, partial_of(step, chunk, inside, part, head));
        mf_divide(step->mixed + query_head * step->heads.dim, step->heads.dim,
                  step->stats[2 * query_head + 1]);
    }
}

void mf_attend(struct mf_heads heads, const struct mf_chunks *chunks, const struct mf_kv *kv,
               const struct mf_attention_plan *plan, const uint16_t *queries, int64_t t,
               float *partials, float *stats, float *mixed) {
    struct step step = {heads, chunks, kv, plan, queries, t, partials, stats, mixed};
#pragma omp for schedule(dynamic)
    for (int64_t number = 0; number < plan->num_items; number++) {
        struct mf_item item = mf_find_item(heads, chunks, plan, number);
        do_item(&step, &item);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < t; row++)
        finish_row(&step, row);
}
