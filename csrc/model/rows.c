/* rows.c: an embedding whose rows are looked up as tokens occur: in blocks, or in a file. A file is not
 * mapped: a read past the end of one that has become shorter is an error, and an access to a mapped page
 * is a signal. */
#include "error.h"
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

int lent_open(gpt_model *m, int descriptor, int64_t offset) {
    int own = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
    if (own < 0) return fail(GPT_ERR_ARGUMENT, "descriptor %d is not an open file", descriptor);
    lent_close(m);
    m->lent = (lent_file){.is_open = true, .descriptor = own, .offset = offset};
    return GPT_OK;
}

void lent_close(gpt_model *m) {
    if (m->lent.is_open) close(m->lent.descriptor);
    m->lent.is_open = false;
}

int lent_read(const gpt_model *m, int64_t first, int64_t n, float *out) {
    char *at = (char *)out, *end = (char *)(out + n);
    int64_t offset = m->lent.offset + first * (int64_t)sizeof *out;
    while (at < end) {
        ssize_t got = pread(m->lent.descriptor, at, (size_t)(end - at), offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0)
            return fail(GPT_ERR_FILE,
                        "the file of the model's token embedding was changed or removed while the "
                        "model was in use: byte %lld cannot be read; load the model again",
                        (long long)offset);
        at += got;
        offset += got;
    }
    return GPT_OK;
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
