/* window.c: the caches of layers with windows, which keep what later tokens see.
 *
 * Such a cache has fewer rows than a session has positions. A sequence's first row there is that of position
 * session.first[seq]. Before a step that would not fit, the last rows move to the start, so that the rows of a
 * sequence stay neighbours and kernels need only its positions less the first. What moves is copied once in
 * as many tokens as a step may have. */
#include "model.h"

/* `first` is a multiple of ALIGN, so that tiles of keys begin where they would without. KEPT tokens can be
 * rewound at any time. */
enum { ALIGN = 64, KEPT = 64 };

static int rows_for(int window, int n_seq, int n_ctx) {
    int64_t rows = (int64_t)window - 1 + KEPT + ALIGN - 1 + session_max_rows(n_seq, n_ctx);
    rows = (rows + ALIGN - 1) / ALIGN * ALIGN;
    return rows < n_ctx ? (int)rows : n_ctx;
}

int cache_window(const gpt_config *c, int n_seq, int n_ctx) {
    int widest = 0;
    for (int l = 0; l < c->n_layer; l++) {
        int window = config_layer(c, l).window;
        if (window > widest && rows_for(window, n_seq, n_ctx) < n_ctx) widest = window;
    }
    return widest;
}

int cache_rows(const gpt_config *c, int l, int n_seq, int n_ctx) {
    int window = config_layer(c, l).window, widest = cache_window(c, n_seq, n_ctx);
    return window > 0 && window <= widest ? rows_for(widest, n_seq, n_ctx) : n_ctx;
}

bool window_reaches(const gpt_session *s, int seq, int length) {
    return length == 0 || s->first[seq] == 0 || length - (s->window - 1) >= s->first[seq];
}

void window_rewind(gpt_session *s, int seq, int length) {
    s->length[seq] = length;
    if (length == 0) s->first[seq] = 0;
}

/* n rows from `from` on move to `to`, which is before them. */
static void move_rows(const gpt_session *s, char *cache, size_t bytes, int to, int from, int n) {
    const gpt_model *m = s->model;
    for (int i = 0, some; cache && i < n; i += some) { /* what a copy reads it does not write */
        some = n - i < from - to ? n - i : from - to;
        m->ops->copy(m->ctx, cache + bytes * (size_t)(to + i), cache + bytes * (size_t)(from + i),
                     bytes * (size_t)some);
    }
}

/* Moves the rows of a sequence so that the one of position `first` is the first. */
static void move_to(gpt_session *s, int seq, int first) {
    const gpt_config *c = &s->model->config;
    int from = first - s->first[seq], n = s->length[seq] - first;
    size_t row = cache_row_bytes(s);
    for (int l = 0; l < c->n_layer; l++) {
        const layer_acts *la = &s->acts.layers[l];
        if (la->cache_rows == s->n_ctx) continue;
        for (int h = 0; h < c->n_kv_head; h++) {
            int to = (seq * c->n_kv_head + h) * la->cache_rows;
            move_rows(s, la->cache_k, row, to, to + from, n);
            move_rows(s, la->cache_v, row, to, to + from, n);
            move_rows(s, (char *)la->scale_k, sizeof(float), to, to + from, n);
            move_rows(s, (char *)la->scale_v, sizeof(float), to, to + from, n);
        }
    }
    s->first[seq] = first;
}

void window_make_room(gpt_session *s, int seq, int n) {
    if (!s->window || s->length[seq] + n - s->first[seq] <= s->window_rows) return;
    move_to(s, seq, (s->length[seq] - (s->window - 1) - KEPT) / ALIGN * ALIGN);
}
