/* How the attention of one step is shared out.
 *
 * The work is cut into items of up to 16 neighbouring rows of one chunk, which read each key and
 * value once for all of them. Where one item would keep the others waiting, such as one long
 * context among short ones, it is split once more into spans of whole parts; the parts are then
 * merged in the same order as without. The cut changes who computes, never what.
 */
#include "mf_paged_attention.h"

#define ROWS 16
#define ITEMS_PER_THREAD 4

/* How finely a step's work is cut. */
struct cut {
    int64_t heads_per_item;
    int64_t work_per_item; /* rows x parts x heads; 0: whatever it is */
};

static struct cut choose_cut(struct mf_heads heads, const struct mf_chunks *chunks,
                             int32_t threads) {
    int64_t work = 0, groups = 0, wanted = threads * ITEMS_PER_THREAD;
    if (threads == 1)
        return (struct cut){.heads_per_item = heads.num_kv};
    for (int64_t c = 0; c < chunks->count; c++) {
        work += mf_num_parts(chunks, c) * chunks->num_rows[c] * heads.num_kv;
        groups += mf_ceil_div(chunks->num_rows[c], ROWS);
    }
    /* Heads lie side by side in a unit, so one item that reads them all streams longer runs. */
    return (struct cut){.heads_per_item = groups >= wanted ? heads.num_kv : 1,
                        .work_per_item = mf_ceil_div(work, wanted)};
}

static int64_t num_spans(struct cut cut, const struct mf_chunks *chunks, int64_t chunk) {
    if (cut.work_per_item == 0)
        return 1;
    int64_t rows = chunks->num_rows[chunk] < ROWS ? chunks->num_rows[chunk] : ROWS;
    int64_t parts = cut.work_per_item / (rows * cut.heads_per_item);
    return mf_ceil_div(mf_num_parts(chunks, chunk), parts > 1 ? parts : 1);
}

static int64_t num_views(struct mf_heads heads, const struct mf_chunks *chunks, int64_t chunk) {
    return chunks->num_rows[chunk] * mf_num_parts(chunks, chunk) * heads.num_queries;
}

int64_t mf_num_partials(struct mf_heads heads, const struct mf_chunks *chunks, int32_t threads) {
    const struct cut cut = choose_cut(heads, chunks, threads);
    int64_t count = 0;
    for (int64_t c = 0; c < chunks->count; c++)
        if (num_spans(cut, chunks, c) > 1)
            count += num_views(heads, chunks, c);
    return count;
}

void mf_plan_attention(struct mf_heads heads, const struct mf_chunks *chunks, int32_t threads,
                       struct mf_attention_plan *plan) {
    const struct cut cut = choose_cut(heads, chunks, threads);
    int64_t items = 0, partials = 0;
    for (int64_t c = 0; c < chunks->count; c++) {
        plan->num_spans[c] = num_spans(cut, chunks, c);
        plan->first_items[c] = items;
        plan->first_partials[c] = partials;
        items += mf_ceil_div(chunks->num_rows[c], ROWS) * plan->num_spans[c] *
                 (heads.num_kv / cut.heads_per_item);
        if (plan->num_spans[c] > 1)
            partials += num_views(heads, chunks, c);
    }
    plan->first_items[chunks->count] = plan->num_items = items;
    plan->heads_per_item = cut.heads_per_item;
}

static int64_t chunk_of_item(const struct mf_attention_plan *plan, int64_t num_chunks,
                             int64_t number) {
    int64_t low = 0, high = num_chunks - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (plan->first_items[middle] <= number)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* Item `number`: within a chunk by group of rows, the longest contexts first, span and heads. */
struct mf_item mf_find_item(struct mf_heads heads, const struct mf_chunks *chunks,
                            const struct mf_attention_plan *plan, int64_t number) {
    int64_t chunk = chunk_of_item(plan, chunks->count, number);
    int64_t spans = plan->num_spans[chunk], rest = number - plan->first_items[chunk];
    int64_t columns = heads.num_kv / plan->heads_per_item;
    int64_t groups = mf_ceil_div(chunks->num_rows[chunk], ROWS);
    int64_t group = groups - 1 - rest / (spans * columns);
    int64_t left = chunks->num_rows[chunk] - group * ROWS;
    int64_t span = rest / columns % spans;
    int64_t parts_per_span = mf_ceil_div(mf_num_parts(chunks, chunk), spans);
    struct mf_item item = {.chunk = chunk, .first_row = group * ROWS};
    item.num_rows = left < ROWS ? left : ROWS;
    item.first_head = rest % columns * plan->heads_per_item;
    item.end_head = item.first_head + plan->heads_per_item;
    int64_t end =
        mf_ceil_div(chunks->starts[chunk] + item.first_row + item.num_rows, MF_PART);
    item.first_part = span * parts_per_span;
    item.end_part = item.first_part + parts_per_span < end ? item.first_part + parts_per_span : end;
    return item;
}
