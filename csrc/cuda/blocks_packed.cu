/* blocks_packed.cu: blocks of GGUF's types become rows of packed.h, number by number: nothing is rounded. The host
 * does that while a file is read; the device has the rows alone. */
#include "packed.h"

extern "C" CUDA_ACTS_OP(weights_pack);

/* ---- the form ---- */

/* Without bytes where a type is not known, or its blocks do not fill rows. */
static packed_head lay_out(const gpt_segment *s) {
    packed_head head = {}, none = {};
    head.n_parts = s->n_stacked;
    int64_t at = sizeof head;
    for (int part = 0; part < s->n_stacked; part++) {
        const block_type *t = block_type_of(s->stacked[part].block);
        if (!t || s->cols % t->size) return none;
        head.parts[part] = packed_part_of(quant_forms[t->form], s->stacked[part].rows, s->cols, at);
        at += head.parts[part].rows * head.parts[part].row_bytes;
    }
    head.bytes = at;
    return head;
}

size_t cuda_blocks_bytes(const gpt_segment *s) {
    return (size_t)lay_out(s).bytes;
}

size_t cuda_weight_bytes(gpt_ctx *ctx, const weight *w) {
    packed_head head;
    cuda_download(ctx, &head, w, sizeof head);
    return (size_t)head.bytes;
}

/* ---- packing ---- */

/* The 32 integers of group g of a row, which is zero there. */
static void put_group(const packed_part *p, uint8_t *row, int g, const uint8_t *u) {
    uint8_t *low = row + g * (p->bits == 8 ? 32 : 16), *upper = row + p->upper;
    for (int k = 0; k < QUANT_GROUP; k++) {
        if (p->bits == 8)
            low[k] = u[k];
        else
            low[k % 16] |= (uint8_t)((u[k] & 15) << k / 16 * 4);
        if (p->bits == 5) upper[g * 4 + k / 8] |= (uint8_t)(u[k] >> 4 << k % 8);
        if (p->bits == 6) upper[g * 8 + k / 4] |= (uint8_t)(u[k] >> 4 << k % 4 * 2);
    }
}

/* Terms `first` and on of a row. */
static void put_block(const packed_part *p, const block_type *t, uint8_t *row, int first,
                      const block_parts *b) {
    int of = p->of_16 ? 16 : QUANT_GROUP, step = 1 + p->has_minima;
    uint16_t *halves = (uint16_t *)(row + (p->of_block ? p->blocks : p->scales));
    int at = first / (p->of_block ? QUANT_BLOCK : of) * step;
    for (int k = 0; k < t->size; k += QUANT_GROUP)
        put_group(p, row, (first + k) / QUANT_GROUP, b->u + k);
    halves[at] = b->d;
    if (p->has_minima) halves[at + 1] = b->d_least;
    for (int g = 0; p->of_block && g < t->size / of; g++) {
        int8_t *scale = (int8_t *)row + p->scales + (first / of + g) * step;
        scale[0] = b->scale[g];
        if (p->has_minima) scale[1] = b->least[g];
    }
}

static const uint8_t *pack_row(const packed_part *p, const block_type *t, uint8_t *row, int cols,
                               const uint8_t *block) {
    memset(row, 0, (size_t)p->row_bytes);
    for (int k = 0; k < cols; k += t->size, block += t->bytes) {
        block_parts b = {};
        t->take(block, &b);
        put_block(p, t, row, k, &b);
    }
    return block;
}

enum { PIECE_BYTES = 1 << 20 }; /* of rows that leave together */

void cuda_blocks_pack(gpt_ctx *ctx, const gpt_segment *s, int part, const void *blocks) {
    packed_head head = lay_out(s);
    const packed_part *p = &head.parts[part];
    const block_type *t = block_type_of(s->stacked[part].block);
    int most_rows = (int)most<int64_t>(PIECE_BYTES / p->row_bytes, 1);
    uint8_t *rows = (uint8_t *)malloc((size_t)(most_rows * p->row_bytes));
    const uint8_t *block = (const uint8_t *)blocks;
    if (!rows) {
        cuda_remember(ctx, cudaErrorMemoryAllocation);
        return;
    }
    cuda_upload(ctx, s->packed, &head, sizeof head);
    for (int first = 0, n; first < p->rows; first += n) {
        n = least(most_rows, p->rows - first);
        for (int i = 0; i < n; i++) block = pack_row(p, t, rows + i * p->row_bytes, s->cols, block);
        cuda_upload(ctx, (char *)s->packed + p->at + first * p->row_bytes, rows,
                    (size_t)(n * p->row_bytes));
    }
    free(rows);
}

/* ---- unpacking ---- */

/* So many rows' numbers are an argument of a kernel. */
enum { NAMED_ROWS = 64 };

typedef struct named_rows {
    int32_t row[NAMED_ROWS];
    int n;
    bool has_names; /* else these are the first n rows */
} named_rows;

/* The numbers of some rows, (n, K). A thread a group. */
static __global__ void unpack_rows_kernel(float *out, const packed_head *w,
                                          const __grid_constant__ named_rows rows, int K) {
    int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x, G = K / QUANT_GROUP;
    if (i >= rows.n * G) return;
    int g = (int)(i % G), at = (int)(i / G);
    packed_row row = packed_row_of(w, rows.has_names ? rows.row[at] : at);
    float q[QUANT_GROUP] = {};
#define UNPACK(BITS) read_group<BITS>(q, row, g, K)
    BY_BITS(row.part.bits, UNPACK)
#undef UNPACK
    store(out + at * (int64_t)K + (int64_t)g * QUANT_GROUP, q);
}

void cuda_blocks_unpack(gpt_ctx *ctx, float *out, const gpt_segment *s, const int32_t *rows,
                        int n) {
    named_rows some = {};
    some.has_names = rows != NULL;
    for (int first = 0; first < n; first += some.n) {
        some.n = rows ? least<int>(n - first, NAMED_ROWS) : n;
        if (rows) memcpy(some.row, rows + first, sizeof *rows * (size_t)some.n);
        int64_t groups = (int64_t)some.n * (s->cols / QUANT_GROUP);
        launch(ctx, unpack_rows_kernel, dim3((unsigned)div_up(groups, BLOCK_THREADS)),
               BLOCK_THREADS, 0, out + (int64_t)first * s->cols, (const packed_head *)s->packed,
               some, s->cols);
    }
}

/* ---- matrices that stay bf16 ---- */

static __global__ void weights_pack_kernel(packed_head *to, packed_head head, const float *w,
                                           int64_t n) {
    int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x;
    if (i == 0) *to = head;
    if (i < n) ((elem *)(to + 1))[i] = from_float<elem>(w[i]);
}

/* A bias has no head. */
size_t cuda_weights_bytes(int rows, int cols, int parts, int training) {
    (void)training;
    size_t numbers = sizeof(elem) * (size_t)rows * (size_t)cols;
    return parts == 0 ? numbers : sizeof(packed_head) + numbers;
}

CUDA_OP(weights_pack) {
    const gpt_segment *s = op->segment;
    if (s->parts == 0) {
        CUDA_ACTS_NAME(weights_pack)(ctx, op);
        return;
    }
    packed_head head = {};
    head.bytes = (int64_t)cuda_weights_bytes(s->rows, s->cols, s->parts, op->training);
    head.n_parts = 1;
    head.parts[0].at = sizeof head;
    head.parts[0].row_bytes = (int64_t)sizeof(elem) * s->cols;
    head.parts[0].rows = s->rows;
    head.parts[0].bits = BF16_BITS;
    launch(ctx, weights_pack_kernel, dim3((unsigned)div_up(s->size, BLOCK_THREADS)), BLOCK_THREADS,
           0, (packed_head *)s->packed, head, op->w, s->size);
}
