/* rows.c: parameters in files, and an embedding whose rows are looked up as tokens occur: in blocks, or in a
 * file. A file is not mapped: a read past the end of one that has become shorter is an error, and an access
 * to a mapped page is a signal. */
#include "error.h"
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

enum { STRIP = 32, TILE = 8, READ_ROWS = 256 };

static int check_open(int descriptor) {
    if (fcntl(descriptor, F_GETFD) >= 0) return GPT_OK;
    return fail(GPT_ERR_ARGUMENT, "descriptor %d is not an open file", descriptor);
}

/* The bytes of n numbers that a file has from `offset` on, or fewer where it ends. */
static size_t read_at(int descriptor, int64_t offset, int64_t n, float *out) {
    size_t bytes = (size_t)n * sizeof *out, done = 0;
    while (done < bytes) {
        ssize_t got = pread(descriptor, (char *)out + done, bytes - done, offset + (off_t)done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) break;
        done += (size_t)got;
    }
    return done;
}

static int fetch(int descriptor, int64_t offset, int64_t n, float *out) {
    size_t done = read_at(descriptor, offset, n, out);
    if (done == (size_t)n * sizeof *out) return GPT_OK;
    return fail(GPT_ERR_FILE,
                "the file became shorter while it was read, or cannot be read: it has no byte %lld "
                "now; copy it again",
                (long long)(offset + (int64_t)done));
}

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Columns of out (rows, cols) from strip (n, rows), in tiles whose lines stay in the first cache. */
static void transpose(const float *strip, int64_t n, int64_t rows, int64_t cols, float *out) {
    for (int64_t i = 0; i < rows; i += TILE)
        for (int64_t j = 0; j < n; j += TILE)
            for (int64_t k = j; k < smaller(j + TILE, n); k++)
                for (int64_t r = i; r < smaller(i + TILE, rows); r++)
                    out[r * cols + k] = strip[k * rows + r];
}

int lent_fetch(int descriptor, int64_t offset, int64_t rows, int64_t cols, bool transposed,
               float *out) {
    TRY(check_open(descriptor));
    if (!transposed) return fetch(descriptor, offset, rows * cols, out);
    float *strip = malloc(sizeof(float) * STRIP * (size_t)rows);
    if (!strip) return fail(GPT_ERR_MEMORY, "no memory to transpose a parameter");
    int status = GPT_OK;
    for (int64_t j = 0; j < cols && status == GPT_OK; j += STRIP) {
        int64_t n = smaller(STRIP, cols - j);
        status = fetch(descriptor, offset + j * rows * (int64_t)sizeof *out, n * rows, strip);
        if (status == GPT_OK) transpose(strip, n, rows, cols, out + j);
    }
    free(strip);
    return status;
}

int lent_open(gpt_model *m, int descriptor, int64_t offset) {
    TRY(check_open(descriptor));
    int own = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
    if (own < 0) return fail(GPT_ERR_FILE, "too many files are open");
    lent_close(m);
    m->lent = (lent_file){.is_open = true, .descriptor = own, .offset = offset};
    return GPT_OK;
}

void lent_close(gpt_model *m) {
    if (m->lent.is_open) close(m->lent.descriptor);
    m->lent.is_open = false;
}

int lent_read(const gpt_model *m, int64_t first, int64_t n, float *out) {
    int64_t offset = m->lent.offset + first * (int64_t)sizeof *out;
    size_t done = read_at(m->lent.descriptor, offset, n, out);
    if (done == (size_t)n * sizeof *out) return GPT_OK;
    return fail(
        GPT_ERR_FILE,
        "the file of the model's token embedding was changed or removed while the model was "
        "in use: byte %lld cannot be read; load the model again",
        (long long)(offset + (int64_t)done));
}

static const gpt_segment *blocks_of(const gpt_model *m) {
    const gpt_segment *embedding = &m->layout.segments[EMBEDDING];
    return embedding->n_stacked ? embedding : NULL;
}

bool rows_are_looked_up(const gpt_model *m) {
    return m->lent.is_open || blocks_of(m);
}

int rows_look_up(const gpt_model *m, const acts *a, const int32_t *tokens, int n) {
    int64_t C = m->config.n_embd;
    if (blocks_of(m)) {
        m->ops->blocks_unpack(m->ctx, a->wte_rows, blocks_of(m), tokens, n);
        return GPT_OK;
    }
    for (int i = 0; i < n; i++) TRY(lent_read(m, tokens[i] * C, C, a->wte_rows + i * C));
    return GPT_OK;
}

int rows_read(const gpt_model *m, const gpt_segment *s, int first, int n, float *out) {
    const gpt_ops *ops = m->ops;
    int32_t rows[READ_ROWS];
    int64_t most = n < READ_ROWS ? n : READ_ROWS;
    size_t row_bytes = sizeof *out * (size_t)s->cols, bytes = row_bytes * (size_t)most;
    float *there = ops->packs_host_memory ? out : ops->buffer_alloc(m->ctx, bytes, BUFFER_WHOLE);
    if (!there) return fail(GPT_ERR_MEMORY, "no memory to read %lld rows", (long long)most);
    for (int done = 0, some; done < n; done += some) {
        float *to = out + (int64_t)done * s->cols;
        some = n - done < most ? n - done : (int)most;
        for (int i = 0; i < some; i++) rows[i] = first + done + i;
        ops->blocks_unpack(m->ctx, there == out ? to : there, s, rows, some);
        if (there != out) ops->download(m->ctx, to, there, row_bytes * (size_t)some);
    }
    if (there != out) ops->buffer_free(m->ctx, there, bytes);
    return GPT_OK;
}
