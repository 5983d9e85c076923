/* weights_bf16.c: weight matrices rounded to bf16 and packed, as pack.h describes. */
#include "pack.h"
#include "weights.h"

_Static_assert((int)STRIP == (int)PANEL, "a strip is a panel");

size_t cpu_weights_bytes(int rows, int cols, int parts, int training) {
    (void)parts; /* pack_forward_size has room for any number up to two */
    int64_t size = pack_forward_size(rows, cols);
    if (training) size += pack_backward_size(rows, cols);
    return (size_t)size * sizeof(bf16);
}

/* One pair of rows of one panel, which is one cache line. */
static inline void put_pairs(pair *out, const pair *from, int streamed) {
    for (int i = 0; i < PANEL; i += LANES) {
        vf x;
        memcpy(&x, from + i, sizeof x);
        if (streamed)
            vf_stream((float *)(out + i), x);
        else
            vf_store((float *)(out + i), x);
    }
}

/* Rows row to row + rows - 1 (16 at most) of w: as one panel of the forward form, and as their
 * pairs of the backward form; either may be NULL. Missing rows or columns are zero in block. */
static void pack_rows(const gpt_segment *s, const float *w, int row, int rows, bf16 *panel,
                      bf16 *backward) {
    enum { WIDTH = 2 * PANEL };
    int streamed = is_streamed(s->packed, (int64_t)s->rows * s->cols);
    for (int col = 0; col < s->cols; col += WIDTH) {
        bf16 block[PANEL][WIDTH] = {{0}};
        int n = cpu_min(WIDTH, s->cols - col);
        for (int r = 0; r < rows; r++) {
            const float *from = w + (int64_t)(row + r) * s->cols + col;
            FOR_LANES (c, k, n) vf_put(block[r] + c, vf_get(from + c, k), k);
        }
        if (panel) {
            pair turned[PANEL][PANEL];
            transpose_pairs(turned[0], PANEL, (const pair *)block, PANEL);
            pair *out = (pair *)panel + (int64_t)col / PAIR * PANEL;
            for (int i = 0; i < pack_pairs(n); i++)
                put_pairs(out + (int64_t)i * PANEL, turned[i], streamed);
        }
        for (int c = 0; backward && c < n; c += PANEL) {
            int64_t first = (col + c) / PANEL * pack_panel_size(s->rows) + (int64_t)row * PANEL;
            for (int r = 0; r < rows; r += PAIR) {
                pair line[PANEL];
                interleave_rows(line, block[r] + c, block[r + 1] + c, PANEL);
                put_pairs((pair *)(backward + first + r * PANEL), line, streamed);
            }
        }
    }
}

static bf16 *backward_form(const gpt_segment *s, int training) {
    return training ? (bf16 *)s->packed + pack_forward_size(s->rows, s->cols) : NULL;
}

/* Panel i of the forward form, counted over all parts: where it is, and which rows it has. */
static bf16 *forward_panel(const gpt_segment *s, int64_t i, int *row, int *rows) {
    int part_rows = s->rows / s->parts, per_part = (int)pack_panels(part_rows);
    int part = (int)i / per_part, in_part = (int)i % per_part * PANEL;
    *row = part * part_rows + in_part;
    *rows = cpu_min(PANEL, part_rows - in_part);
    return (bf16 *)s->packed + i * pack_panel_size(s->cols);
}

int cpu_strips_are_whole(const gpt_segment *s) {
    return s->packed && s->rows / s->parts % PANEL == 0;
}

/* Of so many rows from `row` on, those that are there. */
static int given_rows(const weights_pack *a, int row, int rows) {
    int end = a->given ? a->given : a->segment->rows;
    return cpu_max(0, cpu_min(rows, end - row));
}

static void pack_strip(const weights_pack *a, int64_t strip) {
    int row, rows;
    bf16 *panel = forward_panel(a->segment, strip, &row, &rows);
    pack_rows(a->segment, a->w, row, given_rows(a, row, rows), panel,
              backward_form(a->segment, a->training));
}

void cpu_pack_strip(const gpt_segment *s, const float *w, int64_t strip, int training) {
    pack_strip(&(weights_pack){.w = w, .segment = s, .training = training}, strip);
}

static void pack_strips(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    for (int64_t i = begin; i < end; i++) pack_strip(p, i);
}

/* Where parts end inside a panel, forward and backward cut the rows at different places. */
static void pack_forward(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const weights_pack *a = p;
    for (int64_t i = begin; i < end; i++) {
        int row, rows;
        bf16 *panel = forward_panel(a->segment, i, &row, &rows);
        pack_rows(a->segment, a->w, row, given_rows(a, row, rows), panel, NULL);
    }
}

static void pack_backward(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const weights_pack *a = p;
    const gpt_segment *s = a->segment;
    for (int row = (int)begin * PANEL; row < cpu_min((int)end * PANEL, s->rows); row += PANEL)
        pack_rows(s, a->w, row, given_rows(a, row, PANEL), NULL, backward_form(s, 1));
}

CPU_OP(weights_pack) {
    const gpt_segment *s = op->segment;
    void *args = (void *)op;
    if (cpu_strips_are_whole(s)) {
        cpu_parallel(ctx, pack_strips, args, s->rows / PANEL, 4);
        return;
    }
    cpu_parallel(ctx, pack_forward, args, s->parts * pack_panels(s->rows / s->parts), 4);
    if (op->training) cpu_parallel(ctx, pack_backward, args, pack_panels(s->rows), 4);
}
